"""The loop: runs that repeat, stop, go on, evaluate, save and fail as a user expects them to."""
import functools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train

PLAIN = (dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor)
UNEQUAL = {"elapsed", "config"}  # what two checkpoints of one curve may differ in: time, and how they were asked for


def state(project, out="out", name="ckpt.pt"):
    return {key: value for key, value in project.checkpoint(out, name).items() if key not in UNEQUAL}


def types(value):
    yield type(value)
    for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(
            value, (list, tuple)) else ():
        yield from types(part)


def letters(count, seed=0):
    """A text without any structure."""
    numbers = torch.randint(26, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(chr(97 + i) for i in numbers)


@pytest.fixture
def gradients():
    """The gradients before each optimizer step, as a list of lists."""
    found = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: found.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]))
    yield found
    hook.remove()


# Learning.


def test_a_batch_is_learned_by_heart(project):
    """One window of noise, the same in every step."""
    text = letters(17)
    project.dataset("one", text, val=text)
    project.train("--dataset=one", "--max_iters=100", "--eval_interval=100")
    assert project.log()[-1]["val_loss"] < 0.1
    assert project.log()[-1]["loss"] < 0.1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_text_is_learned(project, optimizer):
    project.train("--max_iters=200", "--eval_interval=200", f"--optimizer={optimizer}")
    first, last = project.log()[0], project.log()[-1]
    assert first["loss"] > 2 and last["val_loss"] < 0.8


def test_a_run_sees_each_window_once_and_a_resumed_run_the_ones_left(project, monkeypatch):
    """Also when the batch has another size from then on."""
    seen, forward = [], train.GPT.forward

    def spy(model, idx, targets=None, *args, **kwargs):
        seen.extend(idx.tolist() if model.training else [])
        return forward(model, idx, targets, *args, **kwargs)

    monkeypatch.setattr(train.GPT, "forward", spy)
    project.dataset("noise", letters(3000))
    project.train("--dataset=noise", "--max_iters=10", "--gradient_accumulation_steps=2")
    project.train("--dataset=noise", "--max_iters=20", "--batch_size=5", "--gradient_accumulation_steps=1",
                  "--init_from=resume")
    split, starts = project.split("train", "--dataset=noise"), train.window_starts(1337, 0, 130, 2700, 16)
    assert len(set(map(tuple, seen))) == len(seen) == 130
    assert seen == split.read(starts, 16).tolist()


def test_dropout_is_drawn_anew_in_each_step(project):
    text = letters(17)
    project.dataset("one", text, val=text)
    run = ["--dataset=one", "--learning_rate=0", "--zero_init=False", "--log_interval=1", "--batch_size=1"]
    project.train(*run)
    assert len({line["loss"] for line in project.log()}) == 1
    project.train(*run, "--dropout=0.5")
    assert len({line["loss"] for line in project.log()}) == 20


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_equals_one_big_batch(project, gradients, optimizer):
    found = {}
    for batch, passes in ((8, 1), (4, 2), (1, 8)):
        gradients.clear()
        project.train(f"--batch_size={batch}", f"--gradient_accumulation_steps={passes}", f"--optimizer={optimizer}",
                      "--max_iters=8", "--log_interval=1", "--zero_init=False", f"--out_dir=out{batch}")
        found[batch] = gradients[0], project.log(f"out{batch}"), project.checkpoint(f"out{batch}")["model"]
    for batch in (4, 1):
        for a, b in zip(found[8][0], found[batch][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        for a, b in zip(found[8][1], found[batch][1], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name, weight in found[8][2].items():
            assert (weight - found[batch][2][name]).norm() < 1e-3 * weight.norm(), name


def test_bfloat16_learns_as_float32_does(project):
    losses = []
    for dtype in ("float32", "bfloat16", "float16"):
        project.train(f"--dtype={dtype}", "--max_iters=60", "--eval_interval=60", f"--out_dir={dtype}")
        losses.append(project.log(dtype)[-1]["val_loss"])
        assert {p.dtype for p in project.checkpoint(dtype)["model"].values()} == {torch.float32}
    assert losses == pytest.approx([losses[0]] * 3, abs=0.05)


# Repeating, stopping, going on.


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_seeded_runs_are_identical(project, optimizer):
    for out in "ab":
        project.train(f"--out_dir={out}", "--dropout=0.1", f"--optimizer={optimizer}")
    assert same(state(project, "a"), state(project, "b"))
    assert project.log("a") == project.log("b")
    project.train("--out_dir=c", "--dropout=0.1", f"--optimizer={optimizer}", "--seed=1")
    assert project.log("a") != project.log("c")


@pytest.mark.parametrize("seed", [0, 2**31, 20_251_231_235_959, 2**64, 10**30])
def test_a_seed_is_used_or_refused(project, seed):
    if seed < 2**32:
        project.train(f"--seed={seed}", "--max_iters=2")
    elif train.main([*project.tiny, f"--seed={seed}", "--max_iters=2"]) != 0:
        assert "seed" in project.refuse(f"--seed={seed}")


@pytest.mark.parametrize("argv", [
    "--optimizer=muon", "--optimizer=adamw", "--dtype=bfloat16", "--dtype=float16", "--gradient_accumulation_steps=3"])
def test_interrupted_and_resumed_equals_uninterrupted(project, monkeypatch, argv):
    """To the last bit, with dropout, stopped at a step where nothing is logged or saved otherwise, and twice."""
    run = [argv, "--dropout=0.2", "--eval_interval=8"]
    project.train(*run, "--out_dir=whole")
    for step, number, more in ((6, signal.SIGTERM, []), (12, signal.SIGINT, ["--init_from=resume"])):
        with monkeypatch.context() as patch:
            project.signal_at(patch, step, number)
            written = project.train(*run, "--out_dir=cut", *more, status=128 + number)
        assert "--init_from=resume --out_dir=cut" in written.out and written.err == ""
        assert project.checkpoint("cut")["step"] == step + 1
    project.train(*run, "--out_dir=cut", "--init_from=resume")
    assert same(state(project, "cut"), state(project, "whole"))
    assert same(state(project, "cut", "best.pt"), state(project, "whole", "best.pt"))
    assert project.log("cut") == project.log("whole")
    config, whole = (project.checkpoint(out)["config"] for out in ("cut", "whole"))
    assert {key for key in config if config[key] != whole[key]} == {"out_dir", "init_from"}


def test_a_run_resumes_with_its_own_settings(project):
    project.train("--dropout=0.2", "--learning_rate=0.003", "--max_iters=10")
    status = train.main(["--init_from=resume", "--max_iters=20", "--learning_rate=0.001"])
    config = project.checkpoint()["config"]
    assert status == 0 and config["dropout"] == 0.2 and config["n_embd"] == 32 and config["learning_rate"] == 0.001


def test_a_second_sigint_ends_at_once(project, monkeypatch):
    project.train("--max_iters=10")
    before = state(project)
    project.signal_at(monkeypatch, 14, signal.SIGINT, signal.SIGINT)
    written = project.train("--init_from=resume", "--max_iters=20", status=130)
    assert written.err.count("\n") == 1
    assert same(state(project), before)


def test_a_run_is_prolonged(project, gradients):
    """The seen sequences are not seen again, the schedule is the new one, the log goes on."""
    project.train("--decay_lr=False", "--max_iters=10", "--out_dir=cut")
    gradients.clear()
    project.train("--init_from=resume", "--max_iters=20", "--out_dir=cut")
    assert len(gradients) == 20  # two optimizers
    assert [line["step"] for line in project.log("cut")] == [5, 10, 15, 20]
    elapsed = [line["elapsed"] for line in project.log("cut", timings=True)]
    assert elapsed == sorted(elapsed)
    project.train("--decay_lr=False", "--max_iters=20", "--out_dir=whole")
    assert same(state(project, "cut"), state(project, "whole"))


@pytest.mark.parametrize("iters", [10, 5])
def test_resuming_what_is_done_changes_nothing(project, iters):
    project.train("--max_iters=10")
    before, log = project.path.joinpath("out", "ckpt.pt").read_bytes(), project.log(timings=True)
    written = project.train("--init_from=resume", f"--max_iters={iters}")
    assert "inf" not in written.out.split()
    assert project.path.joinpath("out", "ckpt.pt").read_bytes() == before
    assert project.log(timings=True) == log


def test_a_stopped_run_that_was_never_evaluated_can_be_resumed_as_done(project, monkeypatch):
    """There is no best.pt yet, so nobody should be told to listen to it."""
    with monkeypatch.context() as patch:
        project.signal_at(patch, 3, signal.SIGTERM)
        project.train(status=143)
    written = project.train("--init_from=resume", "--max_iters=2")
    assert "inf" not in written.out.replace("information", "").split()
    assert not (project.path / "out" / "best.pt").exists()


def test_resuming_in_a_renamed_folder_stays_there(project):
    project.train("--out_dir=old", "--max_iters=10")
    os.replace("old", "out")
    project.train("--init_from=resume", "--max_iters=20")
    assert project.checkpoint()["step"] == 20 and not (project.path / "old").exists()


@pytest.mark.parametrize("change, word", [
    ("--n_layer=2", "n_layer"), ("--n_embd=64", "n_embd"), ("--n_head=1", "n_head"), ("--block_size=8", "block_size"),
    ("--optimizer=adamw", "optimizer"), ("--bias=True", "bias"), ("--position=learned", "position"),
    ("--vocab_size=64", "vocab_size"), ("--tied_head=True", "tied_head"), ("--norm=layernorm", "norm"),
    ("--activation=gelu", "activation"), ("--dataset=larger", "dataset=larger"), ("--dataset=equal", "dataset=equal")])
def test_what_a_checkpoint_fixes_cannot_change_on_resume(project, change, word):
    project.dataset("larger", letters(3000))
    project.dataset("equal", letters(3000).translate(str.maketrans("xyz", "abc")))
    project.train("--max_iters=2")
    assert word in project.refuse("--init_from=resume", change)


def test_a_fresh_run_keeps_the_old_one(project):
    for count, kept in enumerate((None, "previous", "previous-2", "previous-3")):
        old = {path.name: path.read_bytes() for path in (project.path / "out").glob("*.*") if path.is_file()
               and not path.name.startswith(".")}
        written = project.train("--max_iters=2", f"--seed={count}")
        assert not kept or kept in written.out
        for name, data in old.items():
            assert (project.path / "out" / kept / name).read_bytes() == data
    assert {"ckpt.pt", "best.pt", "log.jsonl"} <= old.keys()
    assert [project.checkpoint(out)["config"]["seed"] for out in (
        "out/previous", "out/previous-2", "out/previous-3", "out")] == [0, 1, 2, 3]
    assert len(project.log()) == 1


def test_a_mistake_leaves_the_old_run_where_it_is(project):
    project.train("--max_iters=2")
    project.refuse("--n_layr=3")
    project.refuse("--block_size=100000")
    project.refuse("--init_from=resume", "--n_layer=3")


@pytest.mark.skipif(os.name == "nt", reason="Windows' locks do not hold against the same process")
def test_a_folder_in_use_is_refused(project, monkeypatch):
    """A second run into it, started while the first one trains."""
    real, found = train.learning_rate, []

    def learning_rate(step, s):
        if step == 5 and not found:
            found.append(None)
            found.append(train.main([*project.tiny, "--max_iters=2"]))
        return real(step, s)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    assert "in use" in project.train().err
    assert found == [None, 2] and project.checkpoint()["step"] == 20
    assert not (project.path / "out" / "previous").exists()


# Evaluation, log, end.


def plain_evaluation(model, tokens, block_size):
    """Cross-entropy of every token but the first, in windows one after another."""
    total = 0.0
    for start in range(0, len(tokens) - 1, block_size):
        y = tokens[start + 1:start + 1 + block_size]
        logits = model(tokens[None, start:start + len(y)])[0][0]
        total += F.cross_entropy(logits, y, reduction="sum").item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("length", [260, 257, 258, 256, 17])
def test_evaluation_is_of_the_whole_split_whatever_the_batch(project, length):
    project.dataset("tiny", project.text, val=project.text[-length:])
    project.train("--max_iters=15")
    model = train.model_from_checkpoint(project.checkpoint()).eval()
    tokens = project.split("val").read(torch.zeros(1, dtype=torch.int64).numpy(), length)[0]
    with torch.no_grad():
        expected = plain_evaluation(model, tokens, 16)
    assert project.log()[-1]["val_loss"] == pytest.approx(expected, abs=1e-6)
    for batch in (1, 3, 4, 64):
        s = project.settings(f"--batch_size={batch}")
        assert train.evaluate(model, project.split("val"), s, train.World()) == pytest.approx(expected, abs=1e-6)


def test_eval_iters_is_the_first_batches(project):
    project.train()
    model, tokens = train.model_from_checkpoint(project.checkpoint()).eval(), project.split("val").read(
        torch.zeros(1, dtype=torch.int64).numpy(), 6 * 16 + 1)[0]
    s = project.settings("--eval_iters=2", "--batch_size=3")
    with torch.no_grad():
        expected = plain_evaluation(model, tokens, 16)
    assert train.evaluate(model, project.split("val"), s, train.World()) == pytest.approx(expected, abs=1e-6)


def test_evaluating_and_logging_do_not_disturb_training(project):
    found = []
    for interval, log in ((1, 20), (7, 1), (20, 3)):
        project.train(f"--eval_interval={interval}", f"--log_interval={log}", "--dropout=0.2", f"--out_dir={interval}")
        checkpoint = project.checkpoint(str(interval))
        found.append([checkpoint["model"], checkpoint["optimizer"]])
    assert same(found[0], found[1]) and same(found[0], found[2])


def told(text):
    """The validation loss in what a run prints."""
    return float(re.search(r"validation loss (\S+)", text)[1])


def test_eval_only_tells_the_loss_and_writes_nothing(project):
    project.train()
    logged, before = project.log()[-1], project.files()
    written = project.train("--init_from=resume", "--eval_only")
    assert told(written.out) == pytest.approx(logged["val_loss"], abs=1e-4)
    assert told(project.train("--eval_only").out) == pytest.approx(math.log(project.settings().vocab_size), abs=1e-4)
    assert project.files() == before


@pytest.mark.parametrize("iters", [1, 7, 10])
def test_exactly_max_iters_updates_and_an_end(project, gradients, iters):
    """However the intervals fall, the last step is evaluated, logged and saved."""
    project.train("--optimizer=adamw", f"--max_iters={iters}", "--eval_interval=5", "--log_interval=3")
    assert len(gradients) == iters
    last = project.log()[-1]
    assert last["step"] == project.checkpoint()["step"] == iters and last["val_loss"] is not None
    steps = [n for n in range(1, iters + 1) if n % 3 == 0 or n % 5 == 0 or n == iters]
    assert [line["step"] for line in project.log()] == steps
    assert [line["step"] for line in project.log() if line["val_loss"] is not None] == [
        n for n in steps if n % 5 == 0 or n == iters]


def test_every_log_line_has_the_keys_people_plot(project):
    project.train()
    lines = project.log(timings=True)
    for line in lines:
        assert line.keys() >= {"step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "elapsed"}
        assert all(value is None or isinstance(value, (int, float)) for value in line.values())
        assert line["tokens_per_second"] > 0 and 0 < line["grad_norm"] < 100
    assert 0 < lines[0]["elapsed"] < lines[-1]["elapsed"]
    steps = {line["step"]: line["loss"] for line in lines}
    project.train("--log_interval=1", "--out_dir=each")
    each = {line["step"]: line["loss"] for line in project.log("each")}
    for step, loss in steps.items():
        assert loss == pytest.approx(sum(each[n] for n in range(step - 4, step + 1)) / 5, abs=1e-6)


def test_the_first_lines_say_what_is_trained_on_what(project):
    out = project.train("--max_iters=3").out
    parameters = sum(p.numel() for p in project.checkpoint()["model"].values())
    for words in ("tiny", f"{parameters:,}", "embedding", "attention", "mlp", "head", "cpu", "float32", "n_embd=32",
                  "max_iters=3", "sample.py"):
        assert words in out
    assert "momentum" not in out, "a setting left at its default is printed"


def test_bits_per_byte_count_the_bytes_of_the_text(project):
    written = project.train()
    text = project.text[len(project.text) * 9 // 10:]
    line = min((line for line in project.log() if line["val_loss"]), key=lambda line: line["val_loss"])
    assert len(text) < len(text.encode())
    bits = float(re.search(r"\((\S+) bits per byte", written.out)[1])
    assert bits == pytest.approx(line["val_loss"] / math.log(2) * len(text) / len(text.encode()), abs=1e-4)


# Checkpoints.


def test_best_is_the_best_and_latest_the_latest(project):
    """Noise learned by heart makes the validation loss rise."""
    text = letters(17)
    project.dataset("one", text, val=letters(100, seed=1) + text)
    project.train("--dataset=one", "--max_iters=60", "--eval_interval=4")
    losses = {line["step"]: line["val_loss"] for line in project.log() if line["val_loss"] is not None}
    best, latest = project.checkpoint(name="best.pt"), project.checkpoint()
    assert latest["step"] == 60 and best["step"] == min(losses, key=losses.get) < 60
    for checkpoint in (best, latest):
        assert checkpoint["best_val_loss"] == min(losses.values()) and checkpoint["best_step"] == best["step"]
        model = train.model_from_checkpoint(checkpoint)
        loss = train.evaluate(model, project.split("val", "--dataset=one"), project.settings("--dataset=one"),
                              train.World())
        assert loss == pytest.approx(losses[checkpoint["step"]], abs=1e-6)


@pytest.mark.parametrize("argv", ["", "--optimizer=adamw", "--dtype=float16", "--tied_head=True --bias=True"])
def test_a_checkpoint_is_plain(project, argv):
    project.train("--max_iters=3", *argv.split())
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = project.checkpoint(name=name)
        assert set(types(checkpoint)) <= set(PLAIN)
        assert checkpoint.keys() >= {"model", "optimizer", "config", "tokenizer", "step"}
        assert checkpoint["model"].keys() == train.GPT(project.settings(*argv.split())).state_dict().keys()
        assert checkpoint["config"]["n_embd"] == 32 and checkpoint["tokenizer"]["kind"] == "char"
        assert not train.model_from_checkpoint(checkpoint).training


class Malice:
    def __reduce__(self):
        return os.system, ("echo ran > canary",)


class MaliceHere:
    def __reduce__(self):
        return open, ("canary", "w")


def damaged(project):
    """Files that are no checkpoint, by name."""
    whole = (project.path / "out" / "ckpt.pt").read_bytes()
    yield "empty", b""
    yield "text", b"this is text"
    yield "zeros", bytes(1000)
    yield "half", whole[:len(whole) // 2]
    yield "short", whole[:-1]
    yield "no head", whole[100:]
    yield "pickle", pickle.dumps({"model": 1})
    for name, malice in (("os.system", Malice()), ("open", MaliceHere())):
        yield f"pickled {name}", pickle.dumps(malice)
        yield f"pickled {name} inside", pickle.dumps(dict(format=1, model=malice))
        for where in ("model", "optimizer", "config", "extra"):
            path = project.path / "made.pt"
            torch.save(torch.load(project.path / "out" / "ckpt.pt") | {where: malice}, path)
            yield f"saved {name} as {where}", path.read_bytes()
    checkpoint = torch.load(project.path / "out" / "ckpt.pt")
    weights = {name: torch.zeros(3) for name in checkpoint["model"]}
    for name, other in {
        "a tensor": torch.zeros(3), "a list": [1, 2], "weights alone": checkpoint["model"],
        "another format": checkpoint | dict(format=99), "config a list": checkpoint | dict(config=[]),
        "config empty": checkpoint | dict(config={}), "step a string": checkpoint | dict(step="x"),
        "config wrong": checkpoint | dict(config=checkpoint["config"] | dict(n_layer="x")),
        "config of a bigger model": checkpoint | dict(config=checkpoint["config"] | dict(n_embd=64)),
        "config of a vast model": checkpoint | dict(config=checkpoint["config"] | dict(n_embd=10**9)),
        "weights of other shapes": checkpoint | dict(model=weights), "model a list": checkpoint | dict(model=[]),
        "optimizer empty": checkpoint | dict(optimizer=[]), "optimizer wrong": checkpoint | dict(optimizer=[{}, {}]),
        **{f"without {key}": {k: v for k, v in checkpoint.items() if k != key}
           for key in ("model", "config", "optimizer", "scaler", "step", "tokenizer", "sequences")},
    }.items():
        path = project.path / "made.pt"
        torch.save(other, path)
        yield name, path.read_bytes()


def test_a_damaged_or_hostile_checkpoint_is_one_line_and_runs_nothing(project):
    project.train("--max_iters=2", "--eval_interval=2")
    files, failed = dict(damaged(project)), {}
    for name, data in files.items():
        for path in (project.path / "out").glob("*.pt"):
            path.unlink()
        (project.path / "out" / "ckpt.pt").write_bytes(data)
        try:
            line = project.refuse("--init_from=resume", plain=True)
            assert "ckpt.pt" in line or name == "config empty"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        except AssertionError as error:
            failed[name] = str(error)
        assert not (project.path / "canary").exists(), name
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())


def test_a_folder_in_a_checkpoints_place_is_one_line(project):
    (project.path / "out" / "ckpt.pt").mkdir(parents=True)
    assert "ckpt.pt" in project.refuse("--init_from=resume", plain=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(project):
    """A power cut can leave a file of zeros even after it was renamed."""
    run, path = ["--eval_interval=8"], project.path / "out" / "ckpt.pt"
    project.train(*run, "--out_dir=whole")
    project.train(*run)
    for damage in (path.unlink, lambda: path.write_bytes(bytes(path.stat().st_size))):
        damage()
        written = project.train(*run, "--init_from=resume")
        assert "step 16" in written.err and written.err.count("\n") == 1
        assert same(state(project), state(project, "whole"))
        assert project.log() == project.log("whole")


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(project):
    """Resumed from the one before, and damaged once more: there is still one that is whole."""
    run, path = ["--eval_interval=8"], project.path / "out" / "ckpt.pt"
    project.train(*run)
    for _ in range(2):
        path.write_bytes(bytes(path.stat().st_size))
        assert "step 16" in project.train(*run, "--init_from=resume").err


@pytest.mark.parametrize("fault", ["write", "rename", "sync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"),
                                   KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch, fault, error):
    path, real = tmp_path / "ckpt.pt", torch.save
    train.save_checkpoint(path, dict(step=1, model=dict(w=torch.ones(1000))))

    def fail(*args):
        if fault == "write":
            real(dict(step=2), args[1])
            args[1].flush()
        raise error

    monkeypatch.setattr(*{"write": (torch, "save"), "rename": (os, "replace"), "sync": (os, "fsync")}[fault], fail)
    with pytest.raises(type(error)):
        train.save_checkpoint(path, dict(step=2, model=dict(w=torch.zeros(1000))))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 1 and checkpoint["model"]["w"].sum() == 1000
    monkeypatch.undo()
    train.save_checkpoint(path, dict(step=3))
    assert torch.load(path, weights_only=True) == dict(step=3)


def test_a_full_disk_neither_ends_a_run_nor_harms_what_was_saved(project, monkeypatch):
    """A save that fails is told in one line; the next one tries again. When the last one fails, so does the run."""
    real = torch.save
    project.train("--eval_interval=5", "--out_dir=whole")

    def save(checkpoint, file):
        if checkpoint["step"] in full:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    full = {10}
    written = project.train("--eval_interval=5")
    assert written.err.count("\n") == 1 and "10" in written.err and "No space left" in written.err
    for key in ("model", "optimizer", "step"):
        assert same(state(project)[key], state(project, "whole")[key])
    full = {15, 20}
    written = project.train("--eval_interval=5", status=1)
    assert written.err.count("\n") == 2
    assert project.checkpoint()["step"] == 10
    full = {}
    project.train("--init_from=resume")
    assert same(state(project)["model"], state(project, "whole")["model"])
    assert not list((project.path / "out").glob("*.tmp"))


@pytest.mark.parametrize("tail", [b"", b'{"step": 15, "lo', b"\xff\xfe\n", b"\0\0\0\0", b"\n\n", b"[]\n", b"{}\n"])
def test_a_torn_log_does_not_stop_a_resume(project, tail):
    project.train("--max_iters=10")
    with open(project.path / "out" / "log.jsonl", "ab") as file:
        file.write(tail)
    project.train("--init_from=resume", "--max_iters=20")
    assert [line["step"] for line in project.log()] == [5, 10, 15, 20]


# Failure.


def test_a_loss_that_is_not_finite_stops_with_advice(project):
    project.train("--max_iters=10")
    before = {name: project.path.joinpath("out", name).read_bytes() for name in ("ckpt.pt", "best.pt")}
    written = project.train("--init_from=resume", "--learning_rate=1e30", "--max_iters=40", status=1)
    assert written.err.count("\n") == 1
    for word in ("step 1", "learning_rate", "ckpt.pt"):
        assert word in written.err
    for name, data in before.items():
        assert project.path.joinpath("out", name).read_bytes() == data
    for line in (project.path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines():
        assert math.isfinite(json.loads(line)["loss"])
    written = project.train("--learning_rate=1e30", "--out_dir=new", status=1)
    assert "step " in written.err and not (project.path / "new" / "ckpt.pt").exists()


@pytest.mark.parametrize("how", ["at once", "at first use"])
def test_without_a_compiler_training_goes_on(project, monkeypatch, how):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found\nand more about it\n" * 20)

    class Broken(torch.nn.Module):
        forward = broken

    project.train("--out_dir=plain", "--max_iters=5")
    monkeypatch.setattr(torch, "compile", broken if how == "at once" else lambda *args, **kwargs: Broken())
    written = project.train("--compile=True", "--max_iters=5")
    assert written.err.count("\n") == 1 and "no C++ compiler" in written.err
    assert same(state(project), state(project, "plain"))


def test_a_run_that_is_done_says_so(project):
    project.train()
    before = project.files()
    out, err = project.train("--init_from=resume")
    assert err == "" and out.startswith("nothing to do: step 20 of 20") and "--max_iters=40" in out
    assert project.files() == before


def test_what_to_type_next_can_be_typed(project):
    line = project.train("--out_dir=a b").out.splitlines()[-1]
    assert shlex.split(line.split(": ")[1])[-1] == "--out_dir=a b"


@pytest.fixture
def compiled(project, monkeypatch):
    """A run that is compiled, and what it leaves behind in this process forgotten."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(project.path / "inductor"))

    def run(*model):
        """Compare it with one that is not, and go on from its checkpoint without the compiler."""
        argv = [*model, "--max_iters=4", "--log_interval=1", "--eval_interval=4", "--n_head=1", "--batch_size=2"]
        project.train(*argv, "--out_dir=plain")
        assert project.train(*argv, "--compile=True").err == "", "it was not compiled"
        assert project.checkpoint()["model"].keys() == project.checkpoint("plain")["model"].keys()
        for line, plain in zip(project.log(), project.log("plain"), strict=True):
            assert line["loss"] == pytest.approx(plain["loss"], abs=1e-3)
        assert line["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-3)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for training, one for evaluation"
        project.train(*argv, "--init_from=resume", "--max_iters=6")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield run
    torch._dynamo.reset()


def test_a_compiled_run_is_a_run(compiled, monkeypatch):
    """The same curve and the same parameter names, with the last stage of the compiler, the slow one, left out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_a_run_compiled_to_the_end_is_a_run(compiled):
    """A bigram, because a compiler takes seconds for each kind of layer."""
    compiled("--n_layer=0")
