"""Nothing lost, and no file runs code: damaged and hostile files, full disks, numbers gone bad, two runs at once."""
import builtins
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, same

import prepare
import sample
import train

UNEQUAL = {"elapsed", "config"}  # what two checkpoints of one curve may differ in: time, and how they were asked for
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def state(project, out="out", name="ckpt.pt"):
    return {key: value for key, value in project.checkpoint(out, name).items() if key not in UNEQUAL}


def put(project, data, name="ckpt.pt", out="out"):
    (project.path / out).mkdir(exist_ok=True)
    path = project.path / out / name
    path.write_bytes(data)
    return path


@pytest.fixture
def trained(project):
    """A project with a run of 20 steps, checkpoints at 10 and 20, and the bytes of the latter."""
    project.train("--eval_interval=10")
    return project, (project.path / "out" / "ckpt.pt").read_bytes()


def run_process(folder, *argv, **options):
    """Run train.py on tiny settings in a process of its own. Returns the CompletedProcess."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *TINY, *argv], cwd=folder, encoding="utf-8",
                          timeout=100, env=environment, **options)


def change_at(project, monkeypatch, step, action):
    """Call action() during the update that follows `step` others."""
    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda now, s: (now == step and action(), real(now, s))[1])


# Damaged checkpoints.


def test_a_bit_flip_is_detected_or_changes_nothing(trained):
    """Of every flip, anywhere in the file: torch.save's zip holds padding that nothing reads, and checksums else."""
    project, whole = trained
    path, good, draw, kept = project.path / "out" / "flipped.pt", project.checkpoint(), random.Random(5), 0
    directory = whole.index(b"PK\1\2")  # to the end: what describes the parts
    places = [*range(0, 400), *range(directory, len(whole)), *(draw.randrange(len(whole)) for _ in range(800))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(train.load_checkpoint(path), good), f"byte {place} was changed without notice"
            kept += 1
        except train.UserError as error:
            assert "flipped.pt" in str(error) and "\n" not in str(error)
    assert kept < len(places) / 2


def test_a_truncated_checkpoint_is_detected(trained):
    project, whole = trained
    for length in {0, 1, 3, 4, 21, 22, 100, *range(0, len(whole), len(whole) // 40), len(whole) - 1}:
        with pytest.raises(train.UserError, match="cut.pt is damaged"):
            train.load_checkpoint(put(project, whole[:length], "cut.pt"))


def resaved(whole, **changes):
    """The bytes of a checkpoint with other values in it."""
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(whole), weights_only=True) | changes, file)
    return file.getvalue()


def spoiled(whole):
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    config = checkpoint["config"]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    wide = {name: torch.zeros(2 * len(w), *w.shape[1:]) for name, w in checkpoint["model"].items()}
    yield "truncated", whole[:len(whole) * 2 // 3]
    yield "a bit", bytes(flipped)
    yield "empty", b""
    yield "zeros", bytes(len(whole))
    yield "another version", resaved(whole, format=2)
    yield "another size", resaved(whole, model=wide)
    yield "another size in its settings", resaved(whole, config=config | dict(n_embd=64))
    yield "another vocabulary", resaved(whole, config=config | dict(vocab_size=99))
    yield "a step that is none", resaved(whole, step="10\n20")
    yield "settings out of range", resaved(whole, config=config | dict(dropout=2.0))


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(trained):
    """In one line; the curve is the same to the last bit; and at every moment one whole checkpoint is there."""
    project, whole = trained
    before, expected, log = (project.path / "out" / "ckpt-previous.pt").read_bytes(), state(project), project.log()
    for name, data in spoiled(whole):
        put(project, data)
        put(project, before, "ckpt-previous.pt")
        written = project.train("--eval_interval=10", "--init_from=resume")
        assert written.err.count("\n") == 1 and "ckpt.pt" in written.err and "step 10" in written.err, name
        assert same(state(project), expected) and project.log() == log, name
        assert (project.path / "out" / "ckpt-previous.pt").read_bytes() == before, f"{name}: the damaged one was kept"
    put(project, b"", "ckpt-previous.pt")
    put(project, b"")
    assert "ckpt-previous.pt" in project.refuse("--init_from=resume")


def test_the_last_two_and_the_best_are_kept(project, monkeypatch):
    """best.pt apart: a validation loss that rises leaves it where it was."""
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    project.train("--eval_interval=5")
    assert [project.checkpoint(name=f"{name}.pt")["step"] for name in ("best", "ckpt-previous", "ckpt")] == [10, 15, 20]
    assert {path.name for path in (project.path / "out").iterdir()} == {".lock", *train.RUN_FILES}


def test_another_vocabulary_is_refused_by_name(trained):
    """Whether the data changed or the checkpoint, going on would train on the wrong characters."""
    project, _ = trained
    project.dataset("tiny", project.text.replace("e", "E"))
    line = project.refuse("--init_from=resume")
    assert "tiny" in line and "tokenizer" in line


# Disks that are full, folders that cannot be written to.


def test_a_file_size_limit_is_survived_and_told(project, monkeypatch):
    """The system's own limit: nothing can be saved; then it is lifted and everything can."""
    resource = pytest.importorskip("resource")
    project.train("--out_dir=whole", "--eval_interval=5")
    _, most = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (project.path / "whole" / "ckpt.pt").stat().st_size // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        written = project.train("--eval_interval=5", status=1)
        notes = written.err.splitlines()
        assert [line.split(" could not")[0] for line in notes] == [
            *(f"note: step {step}" for step in (5, 10, 15)), "train.py: step 20"]
        assert "File too large" in notes[0] and not list((project.path / "out").glob("*.pt*"))
        change_at(project, monkeypatch, 12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))
        assert project.train("--eval_interval=5", "--out_dir=lifted").err.count("note: ") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for key in ("model", "optimizer", "sequences"):
        assert same(state(project, "lifted")[key], state(project, "whole")[key])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs a Linux root to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(project, small_disk, monkeypatch):
    """It fills while the run is under way, and is emptied again."""
    real, filler = train.learning_rate, small_disk / "filler"

    def learning_rate(step, s):
        if step == 6 and s.init_from == "scratch":  # whoever else writes to this disk
            with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(1024))
        if step == empty_at:
            filler.unlink()
        return real(step, s)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    small = ["--n_embd=16", "--eval_interval=5", "--optimizer=adamw", "--log_interval=1"]
    for empty_at, status in ((12, 0), (99, 1)):
        out = f"{small_disk}/out{empty_at}"
        written = project.train(*small, f"--out_dir={out}", status=status)
        assert "No space left" in written.err and "Traceback" not in written.err
        assert torch.load(f"{out}/ckpt.pt", weights_only=True)["step"] == (20 if status == 0 else 5)
        for line in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines():
            json.loads(line)
        filler.unlink(missing_ok=True)
        project.train(*small, f"--out_dir={out}", "--init_from=resume", "--max_iters=20")
        shutil.copytree(out, project.path / f"copy{empty_at}")
        shutil.rmtree(out)
    for copy in ("copy12", "copy99"):
        project.train(*small, "--out_dir=whole")
        for key in ("model", "optimizer", "sequences"):
            assert same(state(project, copy)[key], state(project, "whole")[key])


@pytest.mark.parametrize("what", ["open", "replace"])
def test_a_folder_that_became_read_only_is_told_and_tried_again(project, monkeypatch, what):
    module, name = (train, "open") if what == "open" else (os, "replace")
    real, refused = getattr(builtins if what == "open" else os, what), []

    def refuse(*args, **kwargs):
        if str(args[0]).endswith(".pt.tmp") and len(refused) < count:
            refused.append(args)
            raise PermissionError(30, "Read-only file system", str(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, refuse, raising=False)
    count = 1
    written = project.train("--eval_interval=5")
    assert written.err.count("\n") == 1 and "step 5" in written.err and "Read-only" in written.err
    assert [project.checkpoint(name=f"{name}.pt")["step"] for name in ("ckpt-previous", "ckpt")] == [15, 20]
    refused.clear()
    count = 99
    written = project.train("--eval_interval=5", "--out_dir=never", status=1)
    assert written.err.count("\n") == 4 and "step 20" in written.err.splitlines()[-1]
    assert not list((project.path / "never").glob("*.pt*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_does_not_end_the_training(project):
    """As when a run's output goes to a file on the disk that is full, or to a pager that was closed."""
    with open("/dev/full", "w") as full:
        done = run_process(project.path, stdout=full, stderr=full)
    assert done.returncode == 0 and project.checkpoint()["step"] == 20
    assert [line["step"] for line in project.log()] == [5, 10, 15, 20]


def test_a_log_that_cannot_be_begun_is_one_line(project, monkeypatch):
    """The disk is so full that not even the log's first byte fits."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.Path, "write_text", full)
    written = project.train(status=1)
    assert written.err.count("\n") == 1 and "No space left" in written.err


# Hostile files: each would leave a canary.

CODE = "open('canary', 'w')"


class Call:
    """Pickled, it is a call when it is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Build:
    def __reduce__(self):
        return dict, (), {}, None, iter([("x", Call(eval, CODE))])


class SetState:
    def __reduce_ex__(self, protocol):
        return Call, (eval,), {"call": (eval, (CODE,))}


def malice():
    yield "os.system", Call(os.system, "touch canary")
    yield "eval", Call(eval, CODE)
    yield "exec", Call(exec, CODE)
    yield "import", Call(__import__, "canary")
    yield "getattr", Call(getattr, Call(__import__, "os"), "system")
    yield "nested", Call(map, Call(getattr, Call(__import__, "builtins"), "eval"), [CODE])
    yield "in a list of dicts", [dict(x=[Call(eval, CODE)])]
    yield "as a key", {Call(str, Call(eval, CODE)): 1}
    yield "items", Build()
    yield "torch.load", Call(torch.load, "evil.pt")
    yield "numpy", Call(np.load, "evil.npy")
    yield "open", Call(open, "canary", "w")
    yield "breakpoint", Call(breakpoint)
    yield "Popen", Call(subprocess.Popen, ["touch", "canary"])


def replaced(whole, member, data, compress=zipfile.ZIP_STORED):
    """A checkpoint's zip with one member's bytes exchanged, checksums and all."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", compress) as new:
        for entry in old.namelist():
            new.writestr(entry, data if entry.endswith(member) else old.read(entry))
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    return file.getvalue()


def hostile(whole):
    """Files in a checkpoint's place, by name."""
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    for name, evil in malice():
        for protocol in (0, 2, 4):
            data = pickle.dumps(evil, protocol)
            yield f"{name}, pickled {protocol}", data
            yield f"{name}, in torch's zip {protocol}", replaced(whole, "data.pkl", data)
        for kind, options in (("zip", {}), ("legacy", dict(_use_new_zipfile_serialization=False))):
            file = io.BytesIO()
            torch.save(checkpoint | dict(config=evil), file, **options)
            yield f"{name}, saved as {kind}", file.getvalue()
    yield "script in the zip", replaced(whole, "data.pkl", b"c__main__\nmain\n)R.")
    yield "raw eval", b"cbuiltins\neval\n(V" + CODE.encode() + b"\ntR."
    yield "persistent id", b"(Vstorage\ncbuiltins\neval\nV0\nVcpu\nI1\ntQ."
    yield "compressed", replaced(whole, "none", b"", zipfile.ZIP_DEFLATED)
    yield "bomb", replaced(whole, "data.pkl", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    huge = bytearray(whole)
    entry = whole.rindex(b"PK\x01\x02")
    huge[entry + 20:entry + 28] = b"\xff\xff\xff\x7f" * 2  # sizes of the last entry
    yield "an entry of a vast size", bytes(huge)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../canary", "x")
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    yield "path in the zip", file.getvalue()
    vast = {name: torch.zeros(1).expand(2**33, 1024) for name in checkpoint["model"]}
    yield "weights that claim more than there is", resaved(whole, model=vast)
    config = checkpoint["config"]
    for key, value in dict(n_layer=10**9, n_embd=10**9, n_head=0, vocab_size=-1, vocab_multiple=10**18).items():
        yield f"{key}={value}", resaved(whole, config=config | {key: value})
    yield "weights without values", resaved(whole, model={k: w.to("meta") for k, w in checkpoint["model"].items()})
    yield "settings that are code", resaved(whole, config=config | dict(n_layer=CODE))
    yield "deep", pickle.dumps([])[:-1] + b"(" * 100_000 + b"l" * 100_000 + b"."


def test_no_checkpoint_runs_code(trained, monkeypatch):
    """Neither on resume nor in sample.py: one line says why, and there is no canary."""
    project, whole = trained
    (project.path / "canary.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(project.path)
    (project.path / "evil.pt").write_bytes(pickle.dumps(Call(eval, CODE)))
    shutil.rmtree(project.path / "out")
    for name, data in hostile(whole):
        put(project, data)
        began = time.monotonic()
        line = project.refuse("--init_from=resume")
        assert "ckpt.pt" in line, name
        assert sample.main(["--device=cpu", "--max_new_tokens=2"]) == 2, name
        line = project.capsys.readouterr().err
        assert line.count("\n") == 1 and "ckpt.pt" in line, name
        assert not (project.path / "canary").exists(), name
        assert time.monotonic() - began < 10, f"{name} took long"


@posix
def test_links_in_a_folder_from_elsewhere_are_not_written_through(trained, monkeypatch):
    """A folder with a checkpoint may hold links named as our temporary files, to a file that somebody loves."""
    project, _ = trained
    loved = project.path / "loved"
    loved.write_text("mine")
    for name in (".lock", "ckpt.pt.tmp", "best.pt.tmp", "log.jsonl.tmp", ".job", ".job.tmp"):
        (project.path / "out" / name).unlink(missing_ok=True)
        (project.path / "out" / name).symlink_to(loved)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    project.train("--init_from=resume", "--max_iters=30")
    assert loved.read_text() == "mine" and project.checkpoint()["step"] == 30


def test_a_checkpoint_does_not_choose_where_to_write(trained):
    """A folder that somebody sends goes on where it lies, whatever its settings say."""
    project, whole = trained
    config = project.checkpoint()["config"]
    put(project, resaved(whole, config=config | dict(out_dir=str(project.path / "canary"))))
    project.train("--init_from=resume", "--max_iters=30")
    assert not (project.path / "canary").exists() and project.checkpoint()["step"] == 30


@pytest.mark.parametrize("change", [
    dict(optimizer=[]), dict(optimizer=[{}, {}]), dict(optimizer=[dict(state={}, param_groups=[])]),
    dict(best_val_loss="low"), dict(sequences=None), dict(optimizer="x"), dict(elapsed=[]), dict(sequences=10**30),
    dict(sequences=-1000), dict(step=-1), dict(elapsed=math.nan), dict(elapsed=math.inf),
    dict(optimizer=[dict(state={0: dict(step=torch.tensor(1.0))}), dict(state={})])],
    ids=lambda change: str(change)[:40])
def test_parts_that_do_not_fit_are_one_line(trained, change):
    project, whole = trained
    put(project, resaved(whole, **change))
    assert "ckpt.pt" in project.refuse("--init_from=resume")


def test_an_optimizer_s_state_of_other_shapes_is_one_line(trained):
    project, whole = trained
    optimizer = project.checkpoint()["optimizer"]
    for entry in optimizer.values():
        entry["exp_avg"] = torch.zeros(1).expand(2**20, 2**10)
    put(project, resaved(whole, optimizer=optimizer))
    assert "ckpt.pt" in project.refuse("--init_from=resume")


@pytest.mark.parametrize("spec", [
    dict(kind="tiktoken", encoding="http://127.0.0.1:9/x"), dict(kind="tiktoken", encoding="../../x"),
    dict(kind="tiktoken", encoding="gpt2\0"), dict(kind="tiktoken", encoding="file:///etc/passwd"),
    dict(kind="tiktoken", encoding=""), dict(kind="sentencepiece", path="x"), dict(kind="char", chars="ab", path="x"),
    dict(kind="eval", chars=CODE), "gpt2", None, 7, [], {}, dict(kind="char", chars="\ud800b")], ids=str)
def test_a_tokenizer_in_a_checkpoint_fetches_and_opens_nothing(trained, spec, monkeypatch):
    import socket

    import tiktoken
    import tiktoken.load
    project, whole = trained
    put(project, resaved(whole, tokenizer=spec), "best.pt")
    opened, real = [], io.open
    monkeypatch.setattr(builtins, "open", lambda path, *args, **kwargs: opened.append(str(path)) or real(
        path, *args, **kwargs))
    for module, name in ((socket, "create_connection"), (socket, "getaddrinfo"), (socket.socket, "connect"),
                         (tiktoken, "get_encoding"), (tiktoken.load, "read_file"), (subprocess, "Popen")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail(f"{args} was asked for"))
    assert sample.main(["--device=cpu", "--max_new_tokens=2"]) == 2
    line = project.capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    assert not [path for path in opened if "best.pt" not in path]


@pytest.mark.parametrize("text", [
    '{"format": ' + "[" * 50_000, '{"a":' * 50_000, "[" * 50_000 + "]" * 50_000, '{"format": 1' + "0" * 5000 + "}",
    '{"format": NaN}', '{"format": 1e999}', '{"format": 1, "dtype": "O"}', "\ufeff{}", '"__import__(\'os\')"',
    '{"__class__": "x", "../../x": 1}'], ids=lambda text: text[:20])
def test_no_meta_json_does_harm(project, text):
    (project.path / "data" / "tiny" / "meta.json").write_text(text, encoding="utf-8")
    line = project.refuse()
    assert "meta.json" in line and not (project.path / "canary").exists()


@pytest.mark.parametrize("change", [
    dict(dtype="O"), dict(dtype="V8"), dict(dtype="S1"), dict(dtype="U4"), dict(dtype="f8"), dict(dtype=[["a", "O"]]),
    dict(dtype={"names": ["a"], "formats": ["O"]}), dict(dtype="uint8,O"), dict(vocab_size=10**12),
    dict(vocab_size=math.nan), dict(vocab_size=True), dict(tokens={"train": 10**400, "val": 1}),
    dict(tokens={"../../x": 1}), dict(bytes={"train": 1e308, "val": 1})], ids=str)
def test_no_value_in_a_meta_json_does_harm(project, change):
    path = project.path / "data" / "tiny" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert "meta.json" in project.refuse()


# Damaged data.


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_an_id_beyond_the_vocabulary_stops_the_run_with_its_place(project, split, dtype):
    folder = project.dataset("wide", project.text, dtype=dtype)
    for name in ("train", "val"):
        tokens = np.fromfile(folder / f"{name}.bin", dtype=np.uint8).astype(dtype)
        if name == split:
            tokens[40] = 200
        tokens.tofile(folder / f"{name}.bin")
    project.train("--dataset=wide", "--max_iters=0.5e3", "--eval_interval=50", status=1)
    assert not [line for line in project.log() if not math.isfinite(line["loss"])]
    project.capsys.readouterr()
    train.main([*TINY, "--dataset=wide", "--max_iters=500", "--eval_interval=50"])
    line = project.capsys.readouterr().err
    offset = 40 * np.dtype(dtype).itemsize
    for word in (f"{split}.bin", "token 40 ", f"byte {offset})", "is 200", "has 23", "prepare.py"):
        assert word in line
    assert line.count("\n") == 1


@posix
def test_a_data_folder_replaced_under_a_run_does_not_reach_it(project, monkeypatch):
    project.train("--out_dir=whole")

    def replace():
        os.replace("data/tiny", "data/old")
        project.dataset("tiny", "other text " * 300)

    change_at(project, monkeypatch, 3, replace)
    project.train()
    assert same(state(project), state(project, "whole"))
    assert "tokenizer" in project.refuse("--init_from=resume", "--max_iters=30")


@pytest.mark.parametrize("change", [-40, 40])
def test_a_bin_that_is_cut_or_grown_under_a_run_stops_it(project, monkeypatch, change):
    path = project.path / "data" / "tiny" / "train.bin"
    change_at(project, monkeypatch, 12, lambda: os.truncate(path, path.stat().st_size + change))
    line = project.train(status=1).err
    assert line.count("\n") == 1 and "train.bin" in line and project.checkpoint()["step"] == 10


# Numbers gone bad.


def spoil(project, monkeypatch, step, how):
    """Make one step's loss or gradient, or the weights after it, not finite."""
    real = train.update

    def update(model, optimizers, scaler, lr, grad_clip):
        now = round(lr * 1e6)
        parameter = next(iter(model.parameters()))
        if now == step and how == "gradient":
            parameter.grad[0, 0] = math.inf
        norm = real(model, optimizers, scaler, lr, grad_clip)
        if now == step and how == "weight":
            parameter.data[3, 3] = math.nan
        return norm

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "learning_rate", lambda step, s: (step + 1) * 1e-6)
    if how == "loss":
        gradients = train.accumulate_gradients
        monkeypatch.setattr(train, "accumulate_gradients", lambda *args: gradients(*args) * (
            math.nan if args[5] == (step - 1) * 4 else 1))


@pytest.mark.parametrize("how, step, said, kept", [
    ("loss", 13, 13, 10), ("loss", 15, 15, 10), ("gradient", 13, 13, 10), ("gradient", 20, 20, 10),
    ("gradient", 11, 11, 10), ("weight", 13, 14, 10), ("weight", 20, 20, 10), ("weight", 10, 10, None)])
def test_a_number_that_is_not_finite_names_the_step_and_keeps_what_was(project, monkeypatch, how, step, said, kept):
    """Of weights gone bad the next step tells, or else the save, which does not take place."""
    spoil(project, monkeypatch, step, how)
    line = project.train("--max_iters=40", "--eval_interval=10", status=1).err
    assert line.count("\n") == 1 and f"step {said}: " in line and "not finite" in line
    assert "learning_rate" in line and "--dtype=float32" in line
    if kept:
        checkpoint = project.checkpoint()
        assert checkpoint["step"] == kept and all(w.isfinite().all() for w in checkpoint["model"].values())
    else:
        assert "no checkpoint" in line and not (project.path / "out" / "ckpt.pt").exists()


# Memory.


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError()],
    ids=["cuda", "cpu", "cublas", "numpy"])
@pytest.mark.parametrize("where", ["accumulate_gradients", "update", "evaluate", "Run"])
def test_out_of_memory_names_the_settings_and_the_sum(project, monkeypatch, error, where):
    def full(*args):
        raise error

    monkeypatch.setattr(train, where, full)
    line = project.train(status=1).err
    assert line.count("\n") == 1 and "GiB" in line
    for word in ("batch_size=4", "block_size=16", "n_layer=1", "n_embd=32"):
        assert word in line


def test_what_does_not_fit_is_found_by_the_system_itself(project):
    """A batch that no machine holds."""
    line = project.train("--batch_size=900000", "--n_embd=131072", "--block_size=256", status=1).err
    assert line.count("\n") == 1 and "batch_size=900000" in line and "n_embd=131072" in line and "GiB" in line


def test_the_memory_that_is_told_is_the_memory_that_is_taken(project):
    """Parameters, gradients and optimizer state, counted after a step; a few scalars are not told."""
    for optimizer in ("muon", "adamw"):
        s = project.settings(f"--optimizer={optimizer}", "--n_embd=256")
        run = train.Run(s, train.read_meta(s)[1], train.World())
        world, split = train.World(), project.split("train")
        train.accumulate_gradients(run.model, run.scaler, split, s, world, 0)
        held = sum(p.nbytes + p.grad.nbytes for p in run.model.parameters())
        train.update(run.model, run.optimizers, run.scaler, 0.0, 1.0)
        held += sum(v.nbytes for o in run.optimizers for entry in o.state.values() for v in entry.values())
        told = float(train.out_of_memory(s).split(" GiB")[0].rsplit(" ", 1)[1])
        assert told == pytest.approx(held / 2**30, abs=0.006)


# Two runs at once; saves by time; signals.


@posix
def test_a_folder_is_held_while_a_run_lives_and_free_after_its_death(project):
    """In processes of their own, the first one killed without a chance to clean up."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train; sys.exit(train.main(sys.argv[1:]))"
    first = subprocess.Popen([sys.executable, "-c", program, *TINY, "--max_iters=10000000", "--log_interval=1"],
                             stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        deadline, path = time.monotonic() + 60, project.path / "out" / "ckpt.pt"
        while not path.exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        for argv in ([], ["--init_from=resume"]):
            project.capsys.readouterr()
            assert train.main([*TINY, *argv]) == 2
            line = project.capsys.readouterr().err
            assert line.count("\n") == 1 and "in use" in line and "--out_dir" in line.replace("another", "--out_dir")
    finally:
        first.kill()
        first.wait()
    assert not (project.path / "out" / "previous").exists()
    step = project.checkpoint()["step"]
    project.train("--init_from=resume", f"--max_iters={step + 5}")
    assert project.checkpoint()["step"] == step + 5


@posix
def test_a_file_system_without_locks_is_no_obstacle(project, monkeypatch):
    import errno
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    project.train("--max_iters=2")


def test_saves_by_time_do_not_change_the_curve(project, monkeypatch):
    saved, real = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, checkpoint, **keep: (
        path.name == "ckpt.pt" and saved.append(checkpoint["step"]), real(path, checkpoint, **keep)))
    run = ["--dropout=0.2", "--eval_interval=10", "--log_interval=4"]
    project.train(*run, "--out_dir=whole", "--checkpoint_minutes=0")
    assert saved == [10, 20]
    saved.clear()
    project.train(*run, "--checkpoint_minutes=1e-9")
    assert saved == list(range(1, 21))
    assert same(state(project), state(project, "whole")) and project.log() == project.log("whole")
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    saved.clear()
    clock = iter(range(10**6))  # a second at each look
    project.train(*run, "--checkpoint_minutes=0.1", "--out_dir=seconds")
    assert 3 < len(saved) < 19
    assert same(state(project, "seconds"), state(project, "whole"))


def test_any_save_by_time_goes_on_as_the_whole_run(project, monkeypatch):
    """From a step between two lines of the log, two evaluations, two epochs."""
    run = ["--dropout=0.2", "--eval_interval=10", "--log_interval=4", "--checkpoint_minutes=1e-9"]
    project.train(*run, "--out_dir=whole")

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    for step in (3, 11, 18):
        with monkeypatch.context() as patch:
            change_at(project, patch, step, kill)
            with pytest.raises(Killed):
                train.main([*TINY, *run, f"--out_dir={step}"])
        assert project.checkpoint(str(step))["step"] == step
        project.train(*run, f"--out_dir={step}", "--init_from=resume")
        assert same(state(project, str(step)), state(project, "whole"))
        assert project.log(str(step)) == project.log("whole")


@pytest.mark.parametrize("where", ["evaluate", "save_checkpoint"])
def test_sigterm_in_an_evaluation_or_a_save_loses_nothing(project, monkeypatch, where):
    project.train("--eval_interval=8", "--out_dir=whole")
    real, calls = getattr(train, where), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, where, interrupted)
        written = project.train("--eval_interval=8", status=143)
    assert written.err == "" and project.checkpoint()["step"] == {"evaluate": 17, "save_checkpoint": 9}[where]
    project.train("--eval_interval=8", "--init_from=resume")
    assert same(state(project), state(project, "whole")) and project.log() == project.log("whole")
    assert same(state(project, name="best.pt"), state(project, "whole", "best.pt"))


def test_ctrl_c_twice_between_the_two_renames_leaves_a_checkpoint(project, monkeypatch):
    real, calls = os.replace, []
    project.train("--eval_interval=10", "--out_dir=whole")

    def replace(source, target):
        calls.append(str(target))
        if str(target).endswith("ckpt.pt") and len([c for c in calls if c.endswith("ckpt.pt")]) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        project.train("--eval_interval=10", status=130)
    assert not (project.path / "out" / "ckpt.pt").exists()
    written = project.train("--eval_interval=10", "--init_from=resume")
    assert "step 10" in written.err and written.err.count("\n") == 1
    assert same(state(project), state(project, "whole"))


@pytest.mark.parametrize("job", ["some job", "none"])
def test_torchrun_s_restart_resumes_from_whichever_checkpoint_is_there(project, monkeypatch, job):
    """A worker may be killed between the two renames of a save, when there is only the one before."""
    project.train("--eval_interval=10", "--out_dir=whole")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    project.train("--eval_interval=10")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (project.path / "out" / "ckpt.pt").unlink()
    assert "step 10" in project.train("--eval_interval=10").err
    assert same(state(project), state(project, "whole")) and not (project.path / "out" / "previous").exists()
    project.train("--out_dir=new")
    assert project.checkpoint("new")["step"] == 20


@pytest.mark.parametrize("job", ["another job", "none"])
def test_torchrun_s_restart_leaves_the_run_of_another_launch_alone(trained, monkeypatch, job):
    """Also one whose process died before it had set the earlier run aside."""
    project, _ = trained
    before = state(project)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    for restarts in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        project.train("--max_iters=10" if restarts == "1" else "--max_iters=15")
    assert same(state(project, "out/previous"), before)
    assert project.checkpoint()["step"] == 15 and not (project.path / "out" / "previous-2").exists()


def test_a_new_launch_of_torchrun_without_an_id_begins_anew(project, monkeypatch):
    """Process numbers come again, in a container every time."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for _ in range(2):
        project.train()
    assert (project.path / "out" / "previous" / "ckpt.pt").exists()


@pytest.mark.parametrize("change", ["tokenizer", "n_layer"])
def test_a_checkpoint_of_another_kind_is_named_and_the_one_before_it_used(project, change):
    """Whole in itself, but of another vocabulary than the data, or another size than asked for."""
    project.train("--eval_interval=10", "--out_dir=whole")
    project.train("--eval_interval=10")
    if change == "tokenizer":
        project.dataset("other", "abcdefg " * 200)
        project.train("--dataset=other", "--out_dir=other")
        checkpoint = project.checkpoint("other")
        checkpoint["config"]["dataset"] = "tiny"
        torch.save(checkpoint, project.path / "out" / "ckpt.pt")
        asked = []
    else:
        project.train("--n_layer=2", "--out_dir=other")
        os.replace("other/ckpt.pt", "out/ckpt.pt")
        asked = ["--n_layer=1"]
    import train
    project.capsys.readouterr()
    assert train.main(["--init_from=resume", *asked]) == 0
    error = project.capsys.readouterr().err
    assert error.count("\n") == 1 and change in error and "going on from ckpt-previous.pt, step 10" in error
    assert same(state(project), state(project, "whole"))


def test_a_tokenizer_of_a_run_is_the_data_s(trained):
    project, _ = trained
    assert prepare.tokenizer_from_spec(project.checkpoint()["tokenizer"]).decode([0, 1]) == "".join(
        sorted(set(project.text))[:2])


# Kill at any moment, and long runs: the short versions of tests/chaos.py and tests/bench/long_run.py.


def figures(text):
    """The table of tests/chaos.py as a dict of words."""
    return {line[:24].strip(): line[24:].strip() for line in text.splitlines()}


def command(name, *argv):
    """Run one of the suite's own commands. Returns its stdout."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / name), *argv], capture_output=True, encoding="utf-8",
                          timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, or it would take minutes")
def test_nothing_is_lost_when_a_run_is_killed_at_any_moment():
    found = figures(command("chaos.py", "--kills=2"))
    assert found["kills"] == "2" and found["equal"] == "yes"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or not torch.distributed.is_gloo_available(),
                    reason="finds the processes in /proc")
def test_torchrun_brings_a_killed_worker_back():
    found = figures(command("chaos.py", "--kills=1", "--torchrun"))
    assert found["kills"] == "1" and found["equal"] == "yes"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_open_files_stay_flat(tmp_path):
    command("bench/long_run.py", "--steps=600", f"--json={tmp_path / 'figures.json'}")
    first, _, last = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["resources"].values()
    assert last["open_files"] == first["open_files"] and last["anon_mb"] < first["anon_mb"] + 20


def test_a_corpus_name_cannot_command_the_terminal(project, capsys):
    project.dataset("tiny", project.text, corpus="a\x1b[2Jb", note="c\x1b]0;d\x07")
    assert train.main([*TINY, "--max_iters=1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "a[2Jb" in out
