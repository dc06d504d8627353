"""Several processes: the same curve as one, one log, checkpoints that either goes on from, and an end for all."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import pytest
import torch
from conftest import ROOT, TINY

import train

several = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                             reason="this torch has no gloo")


def launch(processes, *argv):
    """Start train.py under torchrun, in the current folder. Returns the process."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         str(ROOT / "train.py"), *TINY, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8"),
        start_new_session=os.name == "posix")


def finish(process):
    """Wait for its end. Returns what it wrote to stdout."""
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "Traceback" not in error
    return out


def processes(count, *argv, patch=None):
    """Run train.py in `count` processes at once, forked from this one, which has torch loaded already.

    Returns their exit statuses and all that they wrote. `patch(rank)` runs in each of them first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    with tempfile.TemporaryFile() as written:
        for rank in range(count):
            if not (child := os.fork()):
                status = 99
                try:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                                      LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    sys.stdout = sys.stderr = open(os.dup(written.fileno()), "w", encoding="utf-8", buffering=1)
                    if patch:
                        patch(rank)
                    status = train.main([*TINY, *argv])
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        try:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        except BaseException:  # such as Ctrl-C
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise
        written.seek(0)
        return statuses, written.read().decode("utf-8", "replace")


def train_together(count, *argv):
    """Like processes(), but all of them must succeed, and nothing may be amiss. Returns what they wrote."""
    statuses, written = processes(count, *argv)
    assert statuses == [0] * count, written
    assert "Traceback" not in written and "Warning" not in written, written
    return written


def assert_same_curve(project, one, many, tolerance=1e-4):
    """The logs agree to float32 rounding, which grows with the steps."""
    for a, b in zip(project.log(one), project.log(many), strict=True):
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
        assert (a["val_loss"] is None) == (b["val_loss"] is None)
        if a["val_loss"]:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=tolerance)


forked = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no fork after importing torch")
FIFTY = ["--max_iters=50", "--eval_interval=25", "--log_interval=1"]
BATCHES = {"even": ["--batch_size=4", "--gradient_accumulation_steps=6"],
           "uneven": ["--batch_size=2", "--gradient_accumulation_steps=7"]}




@several
@forked
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("batch", BATCHES)
def test_any_number_of_processes_draws_the_same_curve(project, batch, parallel):
    run = [*FIFTY, *BATCHES[batch], f"--parallel={parallel}"]
    project.train(*run, "--out_dir=1")
    for count in (2, 3, 4, 8):
        written = train_together(count, *run, f"--out_dir={count}")
        assert written.count("corpus ") == 1 and f"{count} processes" in written
        assert_same_curve(project, "1", str(count))


@several
@pytest.mark.slow
def test_three_processes_draw_the_curve_of_one(project, monkeypatch):
    """Ten sequences in passes of two, so that shares and passes are uneven; from one's checkpoint, and back to one."""
    run = ["--batch_size=2", "--gradient_accumulation_steps=5", "--log_interval=1", "--eval_interval=6"]
    with monkeypatch.context() as patch:
        project.signal_at(patch, 4, signal.SIGTERM)
        project.train(*run, "--out_dir=many", status=143)
    out = finish(launch(3, *run, "--out_dir=many", "--init_from=resume"))
    project.train(*run, "--out_dir=one")
    assert_same_curve(project, "one", "many")
    one, many = project.checkpoint("one"), project.checkpoint("many")
    for name, weight in one["model"].items():
        assert (weight - many["model"][name]).norm() < 1e-2 * weight.norm(), name
    assert out.count("corpus ") == 1 and "3 processes" in out
    assert len([line for line in out.splitlines() if line.split()[:1] == ["20"]]) == 1
    for name in ("one", "many"):
        project.train(*run, f"--out_dir={name}", "--init_from=resume", "--max_iters=30")
    assert_same_curve(project, "one", "many", tolerance=1e-3)


@several
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_sigterm_ends_all_processes_with_a_checkpoint(project):
    """Two processes for a batch of one: one of them only keeps pace. Both stop after the same step."""
    run = ["--batch_size=1", "--max_iters=1000000", "--log_interval=1", "--eval_interval=1000000"]
    process, log = launch(2, *run), project.path / "out" / "log.jsonl"
    try:
        deadline = time.monotonic() + 90
        while not (log.exists() and log.read_bytes().count(b"\n") >= 20):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    step = project.checkpoint()["step"]
    assert f"stopped at step {step}" in out and "--init_from=resume" in out
    assert out.count("stopped at step") == 1
    assert [line["step"] for line in project.log()] == list(range(1, step + 1))
    with pytest.MonkeyPatch.context() as patch:
        project.signal_at(patch, 19, signal.SIGTERM)
        project.train(*run, "--out_dir=one", status=143)
    for a, b in zip(project.log("one"), project.log()[:20], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_the_shares_of_all_processes_are_the_whole():
    for size in range(1, 8):
        for first, count in ((0, 0), (0, 1), (3, 5), (10, 24)):
            shares = [train.World(rank, size).share(first, count) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(first, first + count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_speaks_for_all(project, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main([*project.tiny, "--n_layr=3"]) == 2
    assert capsys.readouterr().err == ""
