"""Nothing is lost and no file executes code: damaged files, full disks, numbers not finite, interruptions, locks."""
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import re
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
from conftest import ROOT, TINY, call_at, same

import sample
import train

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
ENVIRONMENT = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")


def put(project, data, name="ckpt.pt"):
    path = project.path / "out" / name
    path.unlink(missing_ok=True)  # may be a hard link
    path.write_bytes(data)


@pytest.fixture
def trained(project):
    """A project with checkpoints of steps 10 and 20, and the bytes of the latter."""
    project.train()
    return project, (project.path / "out" / "ckpt.pt").read_bytes()


# Damaged checkpoints

def test_a_damaged_checkpoint_falls_back_to_the_previous_one(trained):
    """With one note; the resumed run is bit-identical."""
    project, data = trained
    previous, expected, log = (project.path / "out" / "ckpt-previous.pt").read_bytes(), project.state(), project.log()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 8
    for damaged in (data[:len(data) * 2 // 3], bytes(flipped), b"", bytes(len(data))):
        put(project, damaged)
        put(project, previous, "ckpt-previous.pt")
        error = project.train("--init_from=resume").err
        assert error.count("\n") == 1 and "ckpt.pt" in error and "ckpt-previous.pt" in error
        assert same(project.state(), expected) and project.log() == log
    put(project, b"")
    put(project, b"", "ckpt-previous.pt")
    assert "ckpt-previous.pt" in project.refuse("--init_from=resume")


# Saving

def without_links(monkeypatch):
    def link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("links", [True, False])
def test_the_latest_two_and_the_best_are_kept(project, monkeypatch, links):
    """best.pt is a hard link, or a copy where the file system has no links."""
    if not links:
        without_links(monkeypatch)
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses) if len(args) == 4 else 1.0)
    project.train("--eval_interval=5", "--max_iters=10")
    out = project.path / "out"
    assert os.path.samefile(out / "best.pt", out / "ckpt.pt") == links
    assert (out / "best.pt").read_bytes() == (out / "ckpt.pt").read_bytes()
    project.train("--eval_interval=5", "--init_from=resume", "--max_iters=20")
    assert [project.step(name=f"{name}.pt") for name in ("best", "ckpt-previous", "ckpt")] == [10, 15, 20]
    assert set(os.listdir(out)) == {
        ".lock", "best.pt", "ckpt.pt", "ckpt-previous.pt", "config.py", "log.jsonl"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("links", [True, False])
def test_a_run_killed_at_any_moment_of_a_save_leaves_a_checkpoint(trained, monkeypatch, links):
    """ckpt.pt is intact at every moment."""
    project, data = trained
    checkpoint, previous = project.checkpoint(), (project.path / "out" / "ckpt-previous.pt").read_bytes()
    out = project.path / "out"

    def until_killed(real, limit):
        def call(*args, **kwargs):
            if next(calls) >= limit:
                raise Killed
            return real(*args, **kwargs)
        return call

    for limit in range(100):
        put(project, data)
        put(project, previous, "ckpt-previous.pt")
        with monkeypatch.context() as patch:
            calls = itertools.count()
            for module, name in ((os, "replace"), (os, "link"), (os, "fsync"), (shutil, "copyfile"), (Path, "unlink")):
                patch.setattr(module, name, until_killed(getattr(module, name), limit))
            if not links:
                without_links(patch)
            with contextlib.suppress(Killed):
                train.save_checkpoint(out, checkpoint, is_best=True)
                break
        assert train.load_checkpoint(out / "ckpt.pt")
        train.save_checkpoint(out, checkpoint, is_best=True)  # leftover files are no obstacle
    assert 5 < limit < 99


# Disks that are full

@pytest.mark.parametrize("name", ["ckpt-new.pt", "ckpt.pt"])
def test_a_failed_save_is_reported_and_the_next_one_tried(project, monkeypatch, name):
    """An evaluation that was not saved is not the best; a run whose last save fails has exit status 1."""
    failures, real, losses = 1, os.replace, itertools.cycle([2.0, 3.0, 2.5, 2.6])

    def replace(source, target):
        nonlocal failures
        if target.name == name and failures:
            failures -= 1
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    error = project.train("--eval_interval=5").err
    assert error.count("\n") == 1 and "No space left" in error and "out" in error
    assert [project.step(name=f"{name}.pt") for name in ("best", "ckpt-previous", "ckpt")] == [15, 15, 20]
    failures = 99
    error = project.train("--eval_interval=5", "--init_from=resume", "--max_iters=30", status=1).err
    assert error.count("No space left") == error.count("\n") == 2 and project.step() == 20


def test_a_file_size_limit_stops_neither_the_log_nor_the_run(project):
    """A limit of the system below the size of a checkpoint."""
    resource = pytest.importorskip("resource")
    project.train("--out_dir=reference", "--eval_interval=5")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (project.path / "reference" / "ckpt.pt").stat().st_size // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        error = project.train("--eval_interval=5", status=1).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.count("cannot save") == error.count("\n") == 4 and "Traceback" not in error
    assert not list((project.path / "out").glob("*.pt*")) and project.log() == project.log("reference")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_does_not_stop_a_run(project):
    """For example on a full disk."""
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, str(ROOT / "train.py"), *TINY], timeout=100, env=os.environ | ENVIRONMENT,
                       stdout=full, stderr=full)
    assert project.step() == 20 and [line["step"] for line in project.log()] == [5, 10, 15, 20]


# Files that would execute code

CODE = "open('canary', 'w')"


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def rezipped(data, pickled):
    """The bytes of a checkpoint with another data.pkl and its checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    return file.getvalue()


def pickles(checkpoint, data):
    """Files that execute CODE when they are unpickled, by name."""
    evil = Call(eval, CODE)
    yield "pickle", pickle.dumps(evil, 2)
    yield "opcodes", b"cbuiltins\neval\n(V" + CODE.encode() + b"\ntR."
    yield "pickle in the zip", rezipped(data, pickle.dumps(evil, 2))
    yield "torch.save", saved(checkpoint | dict(config=evil))
    yield "torch.save before 1.6", saved(checkpoint | dict(config=evil), _use_new_zipfile_serialization=False)


def test_no_pickle_is_executed(trained, monkeypatch):
    """Neither by train.py nor by sample.py, and not in GPT-2's pytorch_model.bin: an error of one line."""
    project, data = trained
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the default of torch.load, not its argument
    checkpoint, gpt2 = project.checkpoint(), project.path / "gpt2"
    put(project, b"", "ckpt-previous.pt")
    gpt2.mkdir()
    config = dict(vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    (gpt2 / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, evil in pickles(checkpoint, data):
        put(project, evil)
        assert "ckpt" in project.refuse("--init_from=resume")
        assert sample.main(["--ckpt=out/ckpt.pt", "--device=cpu", "--max_new_tokens=2"]) == 2
        assert project.capsys.readouterr().err.count("\n") == 1
        (gpt2 / "pytorch_model.bin").write_bytes(evil)
        assert "gpt2" in project.refuse("--init_from=./gpt2", "--out_dir=new")
        assert not (project.path / "canary").exists(), name
    eval(CODE).close()
    assert (project.path / "canary").exists(), "the code would have been noticed"


def test_optimizer_state_has_the_shape_of_its_parameter(trained):
    """A fused step writes beyond the end of smaller state, and to every row of one that is expanded."""
    project, data = trained
    for shape in ((1,), None):
        optimizers = torch.load(io.BytesIO(data), weights_only=True)["optimizers"]
        for entry in optimizers[0].values():
            entry["exp_avg"] = torch.zeros(1).expand(shape or entry["exp_avg"].shape)
        put(project, saved(torch.load(io.BytesIO(data), weights_only=True) | dict(optimizers=optimizers)))
        if shape:
            assert "optimizer" in project.train("--init_from=resume", "--max_iters=30", status=2).err
    project.train("--init_from=resume", "--max_iters=30")
    for entry in project.checkpoint()["optimizers"][0].values():
        assert entry["exp_avg"].is_contiguous()


# Data, numbers and memory

def test_tokens_are_unsigned_integers(project):
    """numpy would follow the bytes of dtype "O" as pointers."""
    folder = project.dataset("objects", project.text, dtype="O")
    for name in ("train", "val"):
        tokens = np.fromfile(folder / f"{name}.bin", np.uint8)
        np.zeros(8 * len(tokens), np.uint8).tofile(folder / f"{name}.bin")
    assert "meta.json" in project.refuse("--dataset=objects")


@posix
def test_replacing_a_dataset_does_not_affect_a_running_job(project, monkeypatch):
    project.train("--out_dir=reference")

    def replace():
        os.replace("data/tiny", "data/old")
        project.dataset("tiny", "other text " * 300)

    call_at(monkeypatch, 3, replace)
    project.train()
    assert same(project.state(), project.state("reference"))
    assert "tokenizer" in project.refuse("--init_from=resume", "--max_iters=30")


@pytest.mark.parametrize("what, step, reported", [("loss", 13, 15), ("gradient", 11, 15), ("gradient", 20, 20),
                                                  ("weight", 13, 15), ("weight", 20, 20)])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(project, monkeypatch, what, step, reported):
    """Weights that are not finite show in the next loss or in the evaluation."""
    forward_backward, optimizer_step, steps = train.forward_backward, train.optimizer_step, itertools.count(1)

    def spoiled_step(model, *args):
        parameter = next(iter(model.parameters()))
        now = next(steps)
        if now == step and what == "gradient":
            parameter.grad[0, 0] = math.inf
        norm = optimizer_step(model, *args)
        if now == step and what == "weight":
            parameter.data.fill_(math.nan)
        return norm

    monkeypatch.setattr(train, "optimizer_step", spoiled_step)
    monkeypatch.setattr(train, "forward_backward", lambda *args: forward_backward(*args) * (
        math.nan if what == "loss" and args[5] == (step - 1) * 4 else 1))
    error = project.train("--max_iters=40", status=1).err
    assert error.count("\n") == 1 and f"step {reported}" in error and "not finite" in error
    assert "learning_rate" in error and "--dtype=float32" in error
    assert project.step() == 10 and all(w.isfinite().all() for w in project.checkpoint()["model"].values())


def test_a_run_that_failed_before_it_saved_is_not_moved(project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", lambda *args: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                train.main(TINY)
    project.train()
    assert not (project.path / "out" / "previous-1").exists()


def test_out_of_memory_is_one_line_of_advice_and_other_errors_keep_their_traceback(project, monkeypatch):
    def fail(*args):
        raise errors.pop()

    errors = [RuntimeError("cannot allocate a bug"), torch.OutOfMemoryError("Tried to allocate 20.00 MiB")]
    monkeypatch.setattr(train, "forward_backward", fail)
    error = project.train(status=1).err
    assert error.count("\n") == 1 and "out of memory" in error and "batch_size" in error
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(TINY)


# Locks, saves by time, signals, restarts

@posix
def test_an_output_directory_is_locked_while_its_run_lives(project):
    """The first run is killed without cleaning up."""
    first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=10000000"],
                             stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)
    try:
        deadline, path = time.monotonic() + 60, project.path / "out" / "ckpt.pt"
        while not path.exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        for argv in ([], ["--init_from=resume"]):
            project.capsys.readouterr()
            assert train.main([*TINY, *argv]) == 2
            error = project.capsys.readouterr().err
            assert error.count("\n") == 1 and "in use" in error and "--out_dir" in error
    finally:
        first.kill()
        first.wait()
    assert not list((project.path / "out").glob("previous*"))
    step = project.step()
    project.train("--init_from=resume", f"--max_iters={step + 5}")
    assert project.step() == step + 5


def test_saves_by_time_do_not_change_the_curve_and_each_can_be_resumed(project, monkeypatch):
    """At steps between two log lines, two evaluations, two epochs."""
    run, saves, real = ["--dropout=0.2", "--eval_interval=10", "--log_interval=4"], [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda out, checkpoint, is_best: (
        saves.append(checkpoint["progress"]["step"]), real(out, checkpoint, is_best)))
    project.train(*run, "--out_dir=none", "--save_interval_minutes=0")
    assert saves == [10, 20]
    saves.clear()
    run.append("--save_interval_minutes=1e-9")
    project.train(*run, "--out_dir=reference")
    assert saves == list(range(1, 21)) and same(project.state("reference"), project.state("none"))

    def kill():
        raise Killed

    for step in (3, 18):
        with monkeypatch.context() as patch:
            call_at(patch, step, kill)
            with pytest.raises(Killed):
                train.main([*TINY, *run, f"--out_dir={step}"])
        assert project.step(str(step)) == step
        project.train(*run, f"--out_dir={step}", "--init_from=resume")
        assert same(project.state(str(step)), project.state("reference"))
        assert project.log(str(step)) == project.log("reference")


@pytest.mark.parametrize("how", ["--init_from=auto", "TORCHELASTIC_RESTART_COUNT"])
def test_auto_and_a_restart_by_torchrun_resume_if_there_is_a_checkpoint(project, monkeypatch, how):
    """Otherwise they start from scratch."""
    argv = [how] if how.startswith("--") else []
    if not argv:
        monkeypatch.setenv(how, "1")
    project.train("--out_dir=reference", "--max_iters=30", *argv)
    (project.path / "out").mkdir()
    (project.path / "out" / "log.jsonl").write_text("")  # stopped before its first checkpoint
    project.train("--max_iters=30", *argv)
    assert same(project.state(), project.state("reference"))
    with monkeypatch.context() as patch:
        call_at(patch, 17, lambda: signal.raise_signal(signal.SIGTERM))
        project.train("--max_iters=30", "--out_dir=stopped", *argv, status=143)
    project.train("--max_iters=30", "--out_dir=stopped", *argv)
    assert same(project.state("stopped"), project.state("reference"))
    assert not list((project.path / "stopped").glob("previous*"))
    put(project, b"")
    assert "ckpt-previous.pt" in project.train("--max_iters=30", *argv).err
    assert same(project.state(), project.state("reference"))


def test_a_new_launch_of_torchrun_starts_from_scratch(trained, monkeypatch):
    project, _ = trained
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    project.train("--max_iters=10")
    assert project.step() == 10 and (project.path / "out" / "previous-1" / "ckpt.pt").exists()


# Kills at any moment and long runs

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, or it would take minutes")
def test_nothing_is_lost_when_a_run_is_killed_at_any_moment():
    """A short run of tests/chaos.py."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "chaos.py"), "--kills=2"], capture_output=True,
                          encoding="utf-8", timeout=200, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-2:] == ["equal", "yes"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_open_files_stay_flat(project, monkeypatch):
    found, real = [], train.save_checkpoint

    def measure(*args):
        real(*args)
        memory = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        found.append((len(os.listdir("/proc/self/fd")), int(memory[1])))

    monkeypatch.setattr(train, "save_checkpoint", measure)
    project.train("--max_iters=300", "--eval_interval=50", "--log_interval=50")
    (files, memory), *_, (files_later, memory_later) = found
    assert files_later == files and memory_later < memory + 20_000, "in kB"
