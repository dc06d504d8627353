"""The training loop: runs that learn, repeat, stop, resume, evaluate, save and fail."""
import functools
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import call_at, same
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train


def letters(count, seed=0):
    """A text without structure."""
    numbers = torch.randint(26, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(chr(97 + i) for i in numbers)


@pytest.fixture
def gradients():
    """The gradients before each step of an optimizer, as a list of lists."""
    found = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: found.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]))
    yield found
    hook.remove()


# Learning

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_text_is_learned(project, optimizer):
    project.train("--max_iters=200", "--eval_interval=200", f"--optimizer={optimizer}", "--ngram=1")
    first, last = project.log()[0], project.log()[-1]
    assert first["loss"] > 2 and last["val_loss"] < 0.8


def test_each_window_is_taken_once_also_after_resuming_with_another_batch_size(project, monkeypatch):
    seen, forward = [], train.GPT.forward

    def spy(model, idx, *args, **kwargs):
        seen.extend(idx[:, -16:].tolist() if model.training else [])
        return forward(model, idx, *args, **kwargs)

    monkeypatch.setattr(train.GPT, "forward", spy)
    project.dataset("noise", letters(3000))
    project.train("--dataset=noise", "--max_iters=10", "--gradient_accumulation_steps=2")
    project.train("--dataset=noise", "--max_iters=20", "--batch_size=5", "--gradient_accumulation_steps=1",
                  "--init_from=resume")
    starts = train.window_starts(1337, 0, 130, 2700, 16)
    assert len(set(map(tuple, seen))) == len(seen) == 130
    assert seen == project.split("train", "--dataset=noise").read(starts, 16).tolist()


def test_dropout_differs_in_each_step(project):
    text = letters(17)
    project.dataset("one", text, val=text)
    for dropout, losses in ((0, 1), (0.5, 20)):
        project.train("--dataset=one", "--learning_rate=0", "--zero_init=False", "--log_interval=1", "--batch_size=1",
                      f"--dropout={dropout}")
        assert len({line["loss"] for line in project.log()}) == losses


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradient_accumulation_equals_one_large_batch(project, gradients, optimizer):
    found = []
    for batch, passes in ((8, 1), (4, 2), (1, 8)):
        gradients.clear()
        project.train(f"--batch_size={batch}", f"--gradient_accumulation_steps={passes}", f"--optimizer={optimizer}",
                      "--max_iters=8", "--log_interval=1", "--zero_init=False")
        found.append((gradients[0], project.log(), project.checkpoint()["model"]))
    (grads, log, weights), *others = found
    for other_grads, other_log, other_weights in others:
        torch.testing.assert_close(other_grads, grads, rtol=1e-4, atol=1e-7)
        for a, b in zip(log, other_log, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name, weight in weights.items():
            assert (weight - other_weights[name]).float().norm() <= 1e-3 * weight.float().norm(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_learns_as_float32_does(project, dtype):
    for out in ("float32", dtype):
        project.train(f"--dtype={out}", f"--out_dir={out}", "--max_iters=60", "--eval_interval=60")
    assert project.log(dtype)[-1]["val_loss"] == pytest.approx(project.log("float32")[-1]["val_loss"], abs=0.05)
    assert {p.dtype for p in project.checkpoint(dtype)["model"].values() if p.is_floating_point()} == {torch.float32}


# Repeating and resuming

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_config_py_repeats_a_run_exactly(project, optimizer):
    project.train("--dropout=0.1", f"--optimizer={optimizer}")
    first, log = project.state(), project.log()
    assert train.main(["out/config.py"]) == 0
    assert same(project.state(), first) and project.log() == log
    assert train.main(["out/config.py", "--seed=1"]) == 0
    assert project.log() != log


@pytest.mark.parametrize("argv", [
    "--optimizer=muon", "--optimizer=adamw", "--dtype=bfloat16", "--dtype=float16", "--gradient_accumulation_steps=3"])
def test_a_resumed_run_equals_an_uninterrupted_one(project, monkeypatch, argv):
    """Bit-identical, with dropout, stopped twice between evaluations."""
    run = [argv, "--dropout=0.2", "--eval_interval=8", "--log_interval=1"]
    project.train(*run, "--out_dir=reference")
    for step, number, more in ((6, signal.SIGTERM, []), (12, signal.SIGINT, ["--init_from=resume"])):
        with monkeypatch.context() as patch:
            call_at(patch, step, lambda number=number: signal.raise_signal(number))
            written = project.train(*run, "--out_dir=cut", *more, status=128 + number)
        assert "--init_from=resume" in written.out and written.err == ""
        assert project.step("cut") == step + 1
    project.train(*run, "--out_dir=cut", "--init_from=resume")
    for name in ("ckpt.pt", "best.pt"):
        assert same(project.state("cut", name), project.state("reference", name))
    assert project.log("cut") == project.log("reference")
    config, reference = (project.checkpoint(out)["config"] for out in ("cut", "reference"))
    assert config == reference | dict(out_dir="cut")


def test_a_run_resumes_with_its_own_settings(project):
    """Flags override them; the output directory may be renamed; a new setting has its default."""
    project.train("--out_dir=old", "--dropout=0.2", "--learning_rate=0.003", "--max_iters=10")
    os.replace("old", "out")
    checkpoint = project.checkpoint()
    del checkpoint["config"]["gradient_checkpointing"], checkpoint["config"]["wandb_project"]
    torch.save(checkpoint, "out/ckpt.pt")
    assert train.main(["--init_from=resume", "--max_iters=20", "--learning_rate=0.001"]) == 0
    config = project.checkpoint()["config"]
    assert config["dropout"] == 0.2 and config["n_embd"] == 32 and config["learning_rate"] == 0.001
    assert project.step() == 20 and not os.path.exists("old")


def test_the_dtype_may_change_on_resume(project):
    for iters, dtype in ((10, "float32"), (20, "float16"), (30, "float32")):
        project.train("--init_from=auto", f"--dtype={dtype}", f"--max_iters={iters}")
        assert project.step() == iters and bool(project.checkpoint()["scaler"]) == (dtype == "float16")


def test_a_run_is_extended(project, gradients):
    project.train("--decay_lr=False", "--max_iters=10")
    gradients.clear()
    project.train("--init_from=resume", "--max_iters=20")
    assert len(gradients) == 20  # two optimizers
    extended, log = project.state(), project.log()
    elapsed = [line["elapsed"] for line in project.log(timings=True)]
    assert [line["step"] for line in log] == [5, 10, 15, 20] and elapsed == sorted(elapsed)
    project.train("--decay_lr=False", "--max_iters=20")
    assert same(project.state(), extended) and project.log() == log


@pytest.mark.parametrize("iters", [10, 5])
def test_resuming_a_finished_run_changes_nothing(project, iters):
    project.train("--max_iters=10")
    before, log = project.state(), project.log(timings=True)
    written = project.train("--init_from=resume", f"--max_iters={iters}")
    assert written.err == "" and same(project.state(), before) and project.log(timings=True) == log


@pytest.mark.parametrize("change", [
    "n_layer=2", "block_size=8", "optimizer=adamw", "position=learned", "vocab_size=64", "dataset=larger",
    "dataset=equal"])
def test_what_a_checkpoint_fixes_cannot_change_on_resume(project, change):
    project.dataset("larger", letters(3000))
    project.dataset("equal", letters(3000).translate(str.maketrans("xyz", "abc")))
    project.train("--max_iters=2")
    assert change in project.refuse("--init_from=resume", f"--{change}")


def test_a_new_run_keeps_the_old_one(project):
    for count in range(3):
        old = {name: (project.path / "out" / name).read_bytes() for name in (
            "ckpt.pt", "best.pt", "log.jsonl", "config.py") if count}
        written = project.train("--max_iters=2", f"--seed={count}")
        for name, data in old.items():
            assert (project.path / "out" / f"previous-{count}" / name).read_bytes() == data
        assert not count or f"previous-{count}" in written.out
    seeds = [project.checkpoint(out)["config"]["seed"] for out in ("out/previous-1", "out/previous-2", "out")]
    assert seeds == [0, 1, 2] and len(project.log()) == 1


def test_a_config_file_in_out_dir_is_not_lost(project):
    (project.path / "out").mkdir()
    (project.path / "out" / "config.py").write_text("seed = 5")
    project.train("out/config.py", "--max_iters=2")
    assert (project.path / "out" / "previous-1" / "config.py").read_text() == "seed = 5"


# Evaluation and log

def mean_loss(model, tokens, block_size):
    """Cross-entropy of every token but the first, in consecutive windows; n-grams see the token before a window."""
    total = 0.0
    for start, y in zip(range(0, len(tokens), block_size), tokens[1:].split(block_size), strict=False):
        x = tokens[np.arange(start - 1, start + len(y)).clip(min=0)]
        total += model(x[None], y[None])[1].item() * len(y)
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("length", [260, 257, 256, 17])
@torch.no_grad()
def test_evaluation_covers_the_whole_split_for_any_batch_size(project, length):
    project.dataset("tiny", project.text, val=project.text[-length:])
    with torch.enable_grad():
        project.train("--max_iters=15")
    model, split = train.model_from_checkpoint(project.checkpoint()), project.split("val")
    tokens = torch.tensor([project.checkpoint()["tokenizer"]["chars"].index(c) for c in project.text[-length:]])
    expected = mean_loss(model, tokens, 16)
    assert project.log()[-1]["val_loss"] == pytest.approx(expected, abs=1e-6)
    for batch in (1, 3, 4, 64):
        s = project.settings(f"--batch_size={batch}")
        assert train.evaluate(model, split, s, train.World()) == pytest.approx(expected, abs=1e-6)
    s = project.settings("--batch_size=3", "--eval_iters=2")
    expected = mean_loss(model, tokens[:6 * 16 + 1], 16)
    assert train.evaluate(model, split, s, train.World()) == pytest.approx(expected, abs=1e-6)


def test_the_training_loss_is_of_a_tenth_as_many_windows_without_dropout(project):
    """Evenly spaced, the same at each evaluation: 2,331 training and 259 validation tokens in windows of 8."""
    project.train("--block_size=8", "--dropout=0.5", "--max_iters=10")
    model, train_split = train.model_from_checkpoint(project.checkpoint()), project.split("train")
    tokens = train_split.read(np.array([0, 97, 194]) * 8 - 1, 10)  # 33 // 10 windows of 292, and a token before each
    with torch.no_grad():
        expected = model(tokens[:, :-1], tokens[:, 2:], leave_one_out=True)[1].item()
    assert project.log()[-1]["train_loss"] == pytest.approx(expected, abs=1e-6)


def test_evaluation_and_logging_do_not_change_training(project):
    found = []
    for interval, log in ((1, 20), (7, 1), (20, 3)):
        project.train(f"--eval_interval={interval}", f"--log_interval={log}", "--dropout=0.2")
        found.append([project.checkpoint()[key] for key in ("model", "optimizers")])
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_eval_only_prints_the_loss_and_writes_nothing(project):
    project.train()
    before = project.files()
    for argv, expected in ((["--init_from=resume"], project.log()[-1]["val_loss"]),
                           (["--ngram=1"], math.log(project.settings().vocab_size))):
        out = project.train("--eval_only", *argv).out
        assert float(re.search(r"validation loss (\S+)", out)[1]) == pytest.approx(expected, abs=1e-4)
    assert project.files() == before


@pytest.mark.parametrize("iters", [1, 7, 10])
def test_a_run_takes_max_iters_steps_and_evaluates_and_saves_the_last(project, gradients, iters):
    project.train("--optimizer=adamw", f"--max_iters={iters}", "--eval_interval=5", "--log_interval=3")
    assert len(gradients) == project.step() == iters
    steps = range(1, iters + 1)
    assert [line["step"] for line in project.log()] == [n for n in steps if n % 3 == 0 or n % 5 == 0 or n == iters]
    assert [line["step"] for line in project.log() if line["val_loss"] is not None] == [
        n for n in steps if n % 5 == 0 or n == iters]


def test_log_lines(project):
    """Their keys; the loss is the mean since the last line."""
    project.train()
    lines = project.log(timings=True)
    for line in lines:
        assert line.keys() == {"step", "loss", "train_loss", "val_loss", "bits_per_byte", "lr",
                               "grad_norm", "tokens", "tokens_per_second", "elapsed"}
        assert all((line[key] is None) == bool(line["step"] % 10) for key in ("train_loss", "val_loss"))
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["tokens_per_second"] > 0 and 0 < line["grad_norm"] < 100
    assert 0 < lines[0]["elapsed"] < lines[-1]["elapsed"]
    project.train("--log_interval=1")
    each = [line["loss"] for line in project.log()]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(each[line["step"] - 5:line["step"]]) / 5, abs=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_text(project):
    project.train()
    line = min((x for x in project.log() if x["val_loss"]), key=lambda x: x["val_loss"])
    text = project.text[len(project.text) * 9 // 10:]
    expected = line["val_loss"] / math.log(2) * len(text) / len(text.encode())
    assert len(text) < len(text.encode()) and line["bits_per_byte"] == pytest.approx(expected)


# Checkpoints

def test_best_is_the_best_and_ckpt_the_latest(project):
    """The validation loss rises when noise is memorized."""
    text = letters(17)
    project.dataset("one", text, val=letters(100, seed=1) + text)
    project.train("--dataset=one", "--max_iters=60", "--eval_interval=4")
    losses = {line["step"]: line["val_loss"] for line in project.log() if line["val_loss"] is not None}
    best, latest = project.checkpoint(name="best.pt"), project.checkpoint()
    best_step = min(losses, key=losses.get)
    for checkpoint, step in ((best, best_step), (latest, 60)):
        progress, model = checkpoint["progress"], train.model_from_checkpoint(checkpoint)
        assert progress["step"] == step and progress["best_step"] == best_step < 60
        assert progress["best_val_loss"] == losses[best_step]
        loss = train.evaluate(model, project.split("val", "--dataset=one"), project.settings(), train.World())
        assert loss == pytest.approx(losses[step], abs=1e-6)


@pytest.mark.parametrize("argv", ["", "--optimizer=adamw", "--dtype=float16", "--tie_weights=True --bias=True"])
def test_a_checkpoint_loads_with_weights_only(project, argv):
    project.train("--max_iters=3", *argv.split())
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = project.checkpoint(name=name)
        assert checkpoint.keys() == {"format", "model", "optimizers", "scaler", "progress", "config", "tokenizer",
                                     "corpus_sha256"}
        assert checkpoint["model"].keys() == train.GPT(project.settings(*argv.split())).state_dict().keys()
        assert checkpoint["config"]["n_embd"] == 32 and checkpoint["tokenizer"]["kind"] == "char"
        assert not train.model_from_checkpoint(checkpoint).training


@pytest.mark.parametrize("tail", [b'{"step": 15, "lo', b"\0\0\0\0", b"\n\n"])
def test_an_incomplete_log_line_does_not_stop_a_resume(project, tail):
    project.train("--max_iters=10")
    with open("out/log.jsonl", "ab") as file:
        file.write(tail)
    project.train("--init_from=resume", "--max_iters=20")
    assert [line["step"] for line in project.log()] == [5, 10, 15, 20]


def test_an_overflow_in_float16_is_logged_as_null(project, monkeypatch):
    """The first steps overflow, until the scale is low enough. Infinity is not JSON."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**30))
    project.train("--dtype=float16", "--log_interval=1")
    norms = [line["grad_norm"] for line in project.log()]
    assert norms[0] is None and math.isfinite(norms[-1])


# Compilation

@pytest.fixture
def compile_with(monkeypatch):
    """A function that sets the backend of torch.compile until the test ends."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda backend: monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()


def test_a_run_trains_uncompiled_without_a_compiler(project, compile_with):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    compile_with(no_compiler)
    project.train("--out_dir=uncompiled", "--max_iters=5")
    error = project.train("--compile=True", "--max_iters=5").err
    assert error.count("\n") == 1 and "no C++ compiler" in error
    assert same(project.state(), project.state("uncompiled"))


def test_a_compiled_run_equals_an_uncompiled_one(project, compile_with):
    """Its checkpoint resumes uncompiled."""
    compile_with("aot_eager")
    argv = ["--max_iters=4", "--log_interval=1", "--eval_interval=4", "--n_head=1", "--batch_size=2"]
    for out, compiled in (("uncompiled", False), ("out", True)):
        project.train(*argv, f"--out_dir={out}", f"--compile={compiled}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for training, one for evaluation"
    assert project.checkpoint()["model"].keys() == project.checkpoint("uncompiled")["model"].keys()
    for line, uncompiled in zip(project.log(), project.log("uncompiled"), strict=True):
        for key in ("loss", "val_loss"):
            assert line[key] == pytest.approx(uncompiled[key], abs=1e-3)
    project.train(*argv, "--init_from=resume", "--max_iters=6")
