"""Nothing is lost and no file executes code: damaged files, full disks, numbers not finite, interruptions, locks."""
import contextlib
import io
import itertools
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

import sample
import train

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
ENVIRONMENT = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")


def state(project, out="out", name="ckpt.pt"):
    """A checkpoint without what two runs of the same curve may differ in: the time and the settings."""
    checkpoint = project.checkpoint(out, name)
    del checkpoint["config"], checkpoint["progress"]["elapsed"]
    return checkpoint


def step_of(project, name="ckpt.pt", out="out"):
    return project.checkpoint(out, name)["progress"]["step"]


def put(project, data, name="ckpt.pt"):
    path = project.path / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # the same file may have other names
    path.write_bytes(data)
    return path


@pytest.fixture
def trained(project):
    """A project with a run of 20 steps, checkpoints at 10 and 20, and the bytes of the latter."""
    project.train()
    return project, (project.path / "out" / "ckpt.pt").read_bytes()


def resaved(data, **changes):
    """The bytes of a checkpoint with other values in it."""
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(data), weights_only=True) | changes, file)
    return file.getvalue()


def call_at(monkeypatch, step, action):
    """Call action() in the step that follows `step` others."""
    real = train.get_lr
    monkeypatch.setattr(train, "get_lr", lambda now, s: (now == step and action(), real(now, s))[1])


# Damaged checkpoints


def test_a_flipped_bit_is_detected_or_changes_nothing(trained):
    project, data = trained
    path, expected, rng, unchanged = project.path / "out" / "flipped.pt", project.checkpoint(), random.Random(5), 0
    directory = data.index(b"PK\1\2")  # the description of the entries, to the end of the file
    places = [*range(0, 400, 4), *range(directory, len(data), 3), *(rng.randrange(len(data)) for _ in range(200))]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(train.load_checkpoint(path), expected), f"the change of byte {place} was not detected"
            unchanged += 1
        except train.UserError as error:
            assert "flipped.pt" in str(error) and "\n" not in str(error)
    assert unchanged < len(places) / 2


def test_a_truncated_checkpoint_is_detected(trained):
    project, data = trained
    for length in {0, 1, 3, 4, 21, 22, 100, *range(0, len(data), len(data) // 40), len(data) - 1}:
        with pytest.raises(train.UserError, match="cut.pt is damaged"):
            train.load_checkpoint(put(project, data[:length], "cut.pt"))


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(trained):
    """With one note; the curve is the same to the last bit."""
    project, data = trained
    previous, expected, log = (project.path / "out" / "ckpt-previous.pt").read_bytes(), state(project), project.log()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 8
    for damaged in (data[:len(data) * 2 // 3], bytes(flipped), b"", bytes(len(data))):
        put(project, damaged)
        put(project, previous, "ckpt-previous.pt")
        error = project.train("--init_from=resume").err
        assert error.count("\n") == 1 and "ckpt.pt" in error and "ckpt-previous.pt" in error
        assert same(state(project), expected) and project.log() == log
    put(project, b"")
    put(project, b"", "ckpt-previous.pt")
    assert "ckpt-previous.pt" in project.refuse("--init_from=resume")


def test_a_checkpoint_of_another_format_is_refused(trained):
    project, data = trained
    for name in ("ckpt.pt", "ckpt-previous.pt", "best.pt"):
        put(project, resaved(data, format=1), name)
    for name in ("ckpt.pt", "best.pt"):
        with pytest.raises(train.UserError, match=f"{name} has checkpoint format 1"):
            train.load_checkpoint(project.path / "out" / name)
    assert "format 1" in project.refuse("--init_from=resume")


# Saving


def without_links(monkeypatch):
    def link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("links", [True, False])
def test_the_latest_two_and_the_best_are_kept(project, monkeypatch, links):
    """best.pt is a hard link to what was written, or a copy where the file system has no links."""
    if not links:
        without_links(monkeypatch)
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses) if len(args) == 4 else 1.0)
    project.train("--eval_interval=5", "--max_iters=10")
    out = project.path / "out"
    assert os.path.samefile(out / "best.pt", out / "ckpt.pt") == links
    assert (out / "best.pt").read_bytes() == (out / "ckpt.pt").read_bytes()
    project.train("--eval_interval=5", "--init_from=resume", "--max_iters=20")
    assert [step_of(project, f"{name}.pt") for name in ("best", "ckpt-previous", "ckpt")] == [10, 15, 20]
    assert {path.name for path in out.iterdir()} == {
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
        train.configure(["--init_from=resume", "--dataset=tiny"])  # raises UserError if neither can be loaded
        train.save_checkpoint(out, checkpoint, is_best=True)  # what was left behind is no obstacle
    assert 5 < limit < 99


# Disks that are full


@pytest.mark.parametrize("name", ["ckpt-new.pt", "ckpt.pt"])
def test_a_failed_save_is_reported_and_the_next_one_tried(project, monkeypatch, name):
    """What was not saved is not the best; a run whose last save fails ends with exit status 1."""
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
    assert [step_of(project, f"{name}.pt") for name in ("best", "ckpt-previous", "ckpt")] == [15, 15, 20]
    failures = 99
    error = project.train("--eval_interval=5", "--init_from=resume", "--max_iters=30", status=1).err
    assert error.count("No space left") == error.count("\n") == 2 and step_of(project) == 20


def test_a_file_size_limit_stops_neither_the_log_nor_the_run(project, monkeypatch):
    """The system's own limit: nothing can be saved; then it is lifted."""
    resource = pytest.importorskip("resource")
    project.train("--out_dir=whole", "--eval_interval=5")
    _, most = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (project.path / "whole" / "ckpt.pt").stat().st_size // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        error = project.train("--eval_interval=5", status=1).err
        assert error.count("cannot save") == error.count("\n") == 4 and "Traceback" not in error
        assert not list((project.path / "out").glob("*.pt*")) and project.log() == project.log("whole")
        call_at(monkeypatch, 12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))
        assert project.train("--eval_interval=5", "--out_dir=lifted").err.count("note: ") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(state(project, "lifted"), state(project, "whole"))


def run_process(folder, *argv, **options):
    """Run train.py on tiny settings in a process of its own. Returns the CompletedProcess."""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *TINY, *argv], cwd=folder, encoding="utf-8",
                          timeout=100, env=os.environ | ENVIRONMENT, **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_does_not_stop_a_run(project):
    """For example to a file on a full disk, or to a pager that was closed."""
    with open("/dev/full", "w") as full:
        run_process(project.path, stdout=full, stderr=full)
    assert step_of(project) == 20 and [line["step"] for line in project.log()] == [5, 10, 15, 20]


# Files that would execute code: each would create a file named canary

CODE = "open('canary', 'w')"


class Call:
    """Unpickling it calls the function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class SetState:
    def __reduce_ex__(self, protocol):
        return Call, (eval,), {"call": (eval, (CODE,))}


def malice():
    yield Call(os.system, "touch canary")
    yield Call(eval, CODE)
    yield Call(__import__, "canary")
    yield Call(map, Call(getattr, Call(__import__, "builtins"), "eval"), [CODE])
    yield [dict(x=[Call(eval, CODE)])]
    yield {Call(str, Call(eval, CODE)): 1}
    yield SetState()
    yield Call(torch.load, "evil.pt")
    yield Call(np.load, "evil.npy")
    yield Call(open, "canary", "w")
    yield Call(subprocess.Popen, ["touch", "canary"])


def with_pickle(data, pickled):
    """A checkpoint's zip with another data.pkl, checksums and all."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    return file.getvalue()


def hostile(data):
    """Files in a checkpoint's place."""
    checkpoint = torch.load(io.BytesIO(data), weights_only=True)
    for evil in malice():
        for protocol in (0, 2, 4):
            yield pickle.dumps(evil, protocol)
            yield with_pickle(data, pickle.dumps(evil, protocol))
        for options in ({}, dict(_use_new_zipfile_serialization=False)):
            file = io.BytesIO()
            torch.save(checkpoint | dict(config=evil), file, **options)
            yield file.getvalue()
    yield with_pickle(data, b"c__main__\nmain\n)R.")
    yield b"cbuiltins\neval\n(V" + CODE.encode() + b"\ntR."
    yield b"(Vstorage\ncbuiltins\neval\nV0\nVcpu\nI1\ntQ."


def test_no_checkpoint_executes_code(trained, monkeypatch):
    """Neither when a run resumes nor in sample.py: an error of one line."""
    project, data = trained
    (project.path / "canary.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(project.path)
    (project.path / "evil.pt").write_bytes(pickle.dumps(Call(eval, CODE)))
    shutil.rmtree(project.path / "out")
    for evil in hostile(data):
        put(project, evil)
        assert "ckpt.pt" in project.refuse("--init_from=resume")
        assert sample.main(["--device=cpu", "--max_new_tokens=2"]) == 2
        line = project.capsys.readouterr().err
        assert line.count("\n") == 1 and "ckpt.pt" in line
        assert not (project.path / "canary").exists(), evil[:200]


def test_a_checkpoint_does_not_choose_where_to_write(trained):
    project, data = trained
    put(project, resaved(data, config=project.checkpoint()["config"] | dict(out_dir=str(project.path / "canary"))))
    project.train("--init_from=resume", "--max_iters=30")
    assert not (project.path / "canary").exists() and step_of(project) == 30


def test_optimizer_state_has_the_shape_of_its_parameter(trained):
    """A fused step writes past the end of smaller state, and into every row at once of a row that is repeated."""
    project, data = trained
    for shape in ((1,), (2**20, 2**10), None):
        optimizers = torch.load(io.BytesIO(data), weights_only=True)["optimizers"]
        for entry in optimizers[0].values():
            entry["exp_avg"] = torch.zeros(1).expand(shape or entry["exp_avg"].shape)
        put(project, resaved(data, optimizers=optimizers))
        if shape:
            assert "optimizer" in project.train("--init_from=resume", "--max_iters=30", status=2).err
    project.train("--init_from=resume", "--max_iters=30")
    for entry in project.checkpoint()["optimizers"][0].values():
        assert entry["exp_avg"].is_contiguous()


# Data, numbers and memory


def test_tokens_are_unsigned_integers(project):
    """Others could be pointers: numpy would follow them."""
    folder = project.dataset("objects", project.text, dtype="O")
    for name in ("train", "val"):
        tokens = np.fromfile(folder / f"{name}.bin", np.uint8)
        np.zeros(8 * len(tokens), np.uint8).tofile(folder / f"{name}.bin")
    assert "meta.json" in project.refuse("--dataset=objects")


@posix
@pytest.mark.parametrize("change", [-40, 40])
def test_a_token_file_that_changes_its_size_gives_no_other_tokens(project, change):
    dataset, path = project.split("train"), project.path / "data" / "tiny" / "train.bin"
    starts = np.array([0, 500])
    expected = dataset.read(starts, 8)
    os.truncate(path, path.stat().st_size + change)
    with contextlib.suppress(ValueError, train.UserError):
        assert torch.equal(dataset.read(starts, 8), expected)


@posix
def test_replacing_a_dataset_does_not_affect_a_running_job(project, monkeypatch):
    project.train("--out_dir=whole")

    def replace():
        os.replace("data/tiny", "data/old")
        project.dataset("tiny", "other text " * 300)

    call_at(monkeypatch, 3, replace)
    project.train()
    assert same(state(project), state(project, "whole"))
    assert "tokenizer" in project.refuse("--init_from=resume", "--max_iters=30")


@pytest.mark.parametrize("what, step, reported", [("loss", 13, 15), ("gradient", 11, 15), ("gradient", 20, 20),
                                                  ("weight", 13, 15), ("weight", 20, 20)])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(project, monkeypatch, what, step, reported):
    """The weights after a step show in the next loss, or in the evaluation."""
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
    assert step_of(project) == 10 and all(w.isfinite().all() for w in project.checkpoint()["model"].values())


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
    """In processes of their own, the first one killed without a chance to clean up."""
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
    step = step_of(project)
    project.train("--init_from=resume", f"--max_iters={step + 5}")
    assert step_of(project) == step + 5


@posix
def test_a_file_system_without_locks_can_be_used(project, monkeypatch):
    import fcntl

    def unsupported(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    project.train("--max_iters=2")


def test_saves_by_time_do_not_change_the_curve_and_each_can_be_resumed(project, monkeypatch):
    """From steps between two log lines, two evaluations, two epochs."""
    run, saved, real = ["--dropout=0.2", "--eval_interval=10", "--log_interval=4"], [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda out, checkpoint, is_best: (
        saved.append(checkpoint["progress"]["step"]), real(out, checkpoint, is_best)))
    project.train(*run, "--out_dir=none", "--save_interval_minutes=0")
    assert saved == [10, 20]
    saved.clear()
    run.append("--save_interval_minutes=1e-9")
    project.train(*run, "--out_dir=whole")
    assert saved == list(range(1, 21)) and same(state(project, "whole"), state(project, "none"))

    def kill():
        raise Killed

    for step in (3, 11, 18):
        with monkeypatch.context() as patch:
            call_at(patch, step, kill)
            with pytest.raises(Killed):
                train.main([*TINY, *run, f"--out_dir={step}"])
        assert step_of(project, out=str(step)) == step
        project.train(*run, f"--out_dir={step}", "--init_from=resume")
        assert same(state(project, str(step)), state(project, "whole"))
        assert project.log(str(step)) == project.log("whole")


@pytest.mark.parametrize("where", ["evaluate", "save_checkpoint"])
def test_sigterm_in_an_evaluation_or_a_save_loses_nothing(project, monkeypatch, where):
    project.train("--eval_interval=8", "--out_dir=whole")
    real, calls = getattr(train, where), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == (3 if where == "evaluate" else 2):  # of the second validation loss, of the second checkpoint
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, where, interrupted)
        written = project.train("--eval_interval=8", status=143)
    assert written.err == "" and step_of(project) == 17  # the step after
    project.train("--eval_interval=8", "--init_from=resume")
    assert same(state(project), state(project, "whole"))
    assert same(state(project, name="best.pt"), state(project, "whole", "best.pt"))


@pytest.mark.parametrize("how", ["--init_from=auto", "TORCHELASTIC_RESTART_COUNT"])
def test_auto_and_a_restart_by_torchrun_resume_if_there_is_a_checkpoint(project, monkeypatch, how):
    """Otherwise they start from scratch."""
    argv = [how] if how.startswith("--") else []
    if not argv:
        monkeypatch.setenv(how, "1")
    project.train("--out_dir=whole", "--max_iters=30", *argv)
    (project.path / "out").mkdir()
    (project.path / "out" / "log.jsonl").write_text("")  # stopped before its first checkpoint
    project.train("--max_iters=30", *argv)
    assert same(state(project), state(project, "whole"))
    with monkeypatch.context() as patch:
        call_at(patch, 17, lambda: signal.raise_signal(signal.SIGTERM))
        project.train("--max_iters=30", "--out_dir=stopped", *argv, status=143)
    project.train("--max_iters=30", "--out_dir=stopped", *argv)
    assert same(state(project, "stopped"), state(project, "whole"))
    assert not list((project.path / "stopped").glob("previous*"))
    put(project, b"")
    assert "ckpt-previous.pt" in project.train("--max_iters=30", *argv).err
    assert same(state(project), state(project, "whole"))


def test_a_new_launch_of_torchrun_starts_from_scratch(trained, monkeypatch):
    project, _ = trained
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    project.train("--max_iters=10")
    assert step_of(project) == 10 and (project.path / "out" / "previous-1" / "ckpt.pt").exists()


# Kills at any moment and long runs: short versions of tests/chaos.py and tests/bench/long_run.py


def command(name, *argv):
    """Run one of the suite's own commands. Returns its stdout."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / name), *argv], capture_output=True, encoding="utf-8",
                          timeout=300, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, or it would take minutes")
def test_nothing_is_lost_when_a_run_is_killed_at_any_moment():
    assert command("chaos.py", "--kills=2").split()[-2:] == ["equal", "yes"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or not torch.distributed.is_gloo_available(),
                    reason="finds the processes in /proc")
def test_torchrun_restarts_a_killed_worker():
    assert command("chaos.py", "--kills=1", "--torchrun").split()[-2:] == ["equal", "yes"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_open_files_stay_flat(tmp_path):
    command("bench/long_run.py", "--steps=600", f"--json={tmp_path / 'figures.json'}")
    first, _, last = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["resources"].values()
    assert last["open_files"] == first["open_files"] and last["anon_mb"] < first["anon_mb"] + 20
