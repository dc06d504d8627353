"""Several processes: the same curve as one, one log, checkpoints that either goes on from, and an end for all."""
import contextlib
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

    Returns their exit statuses and all that they wrote. `patch(rank)` runs in each of them first. Like an agent of
    torchrun, this process holds the store at which they meet.
    """
    store, started = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    with tempfile.TemporaryFile() as written:
        for rank in range(count):
            if not (child := os.fork()):
                status = 99
                try:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                                      LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                                      TORCHELASTIC_USE_AGENT_STORE="True")
                    sys.stdout = sys.stderr = open(os.dup(written.fileno()), "w", encoding="utf-8", buffering=1)
                    if patch:
                        patch(rank)
                    status = train.main([*TINY, *argv])
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            started.append(child)
        try:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
        except BaseException:  # such as Ctrl-C
            for child in started:
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
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=100 * tolerance)
        assert (a["val_loss"] is None) == (b["val_loss"] is None)
        if a["val_loss"]:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=tolerance)


forked = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no fork after importing torch")
FIFTY = ["--max_iters=50", "--eval_interval=25", "--log_interval=1"]
BATCHES = {"even": ["--batch_size=4", "--gradient_accumulation_steps=6"],
           "uneven": ["--batch_size=2", "--gradient_accumulation_steps=7"]}




@several
@forked
@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_any_number_of_processes_draws_the_same_curve(project, batch):
    run = [*FIFTY, *BATCHES[batch]]
    project.train(*run, "--out_dir=1")
    for count in (2, 3, 4, 8):
        written = train_together(count, *run, f"--out_dir={count}")
        assert written.count("corpus ") == 1 and f"{count} processes" in written
        assert_same_curve(project, "1", str(count))


@several
@forked
@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_sharded_processes_draw_the_same_curve(project, batch):
    """FSDP, also with activations computed again and a head that shares its weight."""
    run = [*FIFTY, *BATCHES[batch]] + ["--recompute", "--tied_head", "--vocab_multiple=7"] * (batch == "uneven")
    project.train(*run, "--out_dir=one")
    train_together(3, *run, "--out_dir=many", "--parallel=fsdp")
    assert_same_curve(project, "one", "many")
    one, many = project.checkpoint("one"), project.checkpoint("many")
    assert shapes(one) == shapes(many)
    for name, weight in one["model"].items():
        assert (weight - many["model"][name]).norm() < 1e-2 * weight.norm(), name
    model = train.model_from_checkpoint(train.load_checkpoint("many/best.pt"))  # as sample.py reads it
    assert train.evaluate(model, project.split("val"), project.settings(), train.World()) == pytest.approx(
        many["best_val_loss"], abs=1e-5)


def shapes(checkpoint):
    """What is in a checkpoint, by name: the form of it, without the numbers."""
    found = {name: weight.shape for name, weight in checkpoint["model"].items()}
    states = {(p, k): v.shape for p, state in checkpoint["optimizer"].items() for k, v in state.items()}
    return found | states | {key: None for key in checkpoint}


@several
@forked
@pytest.mark.slow
@pytest.mark.parametrize("first, then", [
    ((4, "ddp"), (1, "ddp")), ((1, "ddp"), (4, "ddp")), ((3, "fsdp"), (1, "ddp")), ((1, "ddp"), (3, "fsdp")),
    ((2, "fsdp"), (3, "ddp")), ((2, "ddp"), (3, "fsdp"))])
def test_another_number_of_processes_goes_on_with_the_curve(project, first, then):
    run = ["--log_interval=1", "--batch_size=2", "--gradient_accumulation_steps=5", "--lr_decay_iters=20"]
    project.train(*run, "--out_dir=whole")
    train_together(first[0], *run, "--max_iters=10", f"--parallel={first[1]}")
    train_together(then[0], *run, "--max_iters=20", "--init_from=resume", f"--parallel={then[1]}")
    assert [line["step"] for line in project.log()] == list(range(1, 21))
    assert_same_curve(project, "whole", "out")
    assert shapes(project.checkpoint()) == shapes(project.checkpoint("whole"))


@several
@forked
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_orthogonalizes_its_share_alone(project, parallel):
    """Two blocks have ten square matrices in two stacks, eight times two wide ones: no process does more than half."""
    def count(rank):
        real, done = train.orthogonalize, []

        def orthogonalize(matrices, dtype):
            done.append(len(matrices))
            if rank == 0:
                print("matrices", sum(done))
            return real(matrices, dtype)
        train.orthogonalize = orthogonalize

    run = ["--n_layer=2", "--max_iters=1", f"--parallel={parallel}"]
    for size, expected in ((1, 2 * (3 + 1 + 2)), (2, 3 + 1 + 2), (3, 3 + 1 + 2 * (2 if parallel == "ddp" else 1))):
        statuses, written = processes(size, *run, patch=count)
        assert statuses == [0] * size, written
        found = [int(line.split()[1]) for line in written.splitlines() if line.startswith("matrices")]
        assert abs(found[-1] - expected) <= (2 if size == 3 else 0), (size, written)


@several
@forked
@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "config").rglob("*.py")))
def test_four_processes_take_every_config_file(project, config):
    """With its own batch, cut down to a size that four do not divide evenly, and to one sequence."""
    path = next((ROOT / "config").rglob(f"{config}.py"))
    tiny = [*TINY, "--vocab_multiple=1", "--max_iters=2", "--eval_interval=2", "--init_from=scratch"]
    train_together(4, str(path), *tiny, "--gradient_accumulation_steps=1", "--batch_size=1")
    train_together(4, str(path), *tiny, "--gradient_accumulation_steps=3", "--batch_size=3", "--parallel=fsdp")
    assert [line["step"] for line in project.log()][-1] == 2


def fails_in(rank, error, others=None):
    """A patch for processes(): the third update of `rank` raises, those of the others may call `others` instead."""
    def patch(this):
        real, calls = train.accumulate_gradients, []

        def accumulate_gradients(*args):
            calls.append(1)
            if len(calls) == 3 and this == rank:
                raise error
            if len(calls) == 3 and others:
                others()
            return real(*args)
        train.accumulate_gradients = accumulate_gradients
    return patch


@several
@forked
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_first_failure_is_said_once_and_stops_all(project, rank, parallel):
    began = time.monotonic()
    statuses, written = processes(3, f"--parallel={parallel}", patch=fails_in(rank, train.RunFailed("no more paper")))
    assert all(statuses) and time.monotonic() - began < 60
    assert [line for line in written.splitlines() if "train.py" in line] == [f"train.py: process {rank}: no more paper"]
    assert "Traceback" not in written


@several
@forked
@pytest.mark.slow
def test_a_process_that_waits_for_a_failed_one_ends_too(project):
    """Here they sleep, as they would in a collective operation that does not notice."""
    began = time.monotonic()
    statuses, written = processes(3, patch=fails_in(1, train.RunFailed("no more ink"), lambda: time.sleep(1000)))
    assert statuses == [1] * 3 and time.monotonic() - began < 60
    assert written.count("no more ink") == written.count("train.py: ") == 1, written


@several
@forked
def test_a_mistake_that_all_processes_find_is_one_line(project):
    statuses, written = processes(3, "--block_size=100000")
    assert statuses == [2] * 3
    assert written.count("\n") == 1 and "block_size=100000" in written, written


@several
@forked
def test_a_bug_in_one_process_shows_its_traceback_alone(project):
    statuses, written = processes(3, patch=fails_in(1, ZeroDivisionError("a bug")))
    assert all(statuses) and written.count("Traceback") == 1 and "train.py: process 1: ZeroDivisionError" in written


@several
@forked
def test_processes_that_read_different_checkpoints_are_stopped(project):
    """As where out_dir is not on storage that the machines share."""
    def patch(rank):
        real = train.load_checkpoint
        train.load_checkpoint = lambda path: real(path) | (dict(step=7) if rank == 1 else {})
    project.train("--max_iters=10")
    statuses, written = processes(2, "--init_from=resume", "--max_iters=20", patch=patch)
    assert all(statuses) and written.count("train.py: ") == 1 and "machines share" in written, written


def agent(port, nodes, *argv, tail=()):
    """Start one torchrun agent, with one process, of several that meet at a port. Returns it."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1",
         "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *argv, str(ROOT / "train.py"), *tail],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8"))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children(parent):
    """The process numbers of a process's children."""
    found = []
    for path in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(path)}/stat", encoding="utf-8", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(path))
    return found


@several
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes to kill in /proc")
def test_what_remains_of_two_machines_goes_on_by_itself(project):
    """Two agents; all of one is killed. The other restarts alone, from the last checkpoint, without a flag."""
    run = ["--max_iters=150", "--eval_interval=25", "--log_interval=1", "--batch_size=2",
           "--gradient_accumulation_steps=3"]
    conf = "--rdzv_conf=last_call_timeout=1,keep_alive_interval=1"
    port, log = free_port(), project.path / "out" / "log.jsonl"
    slow = ["--n_embd=128", "--n_layer=4", "--block_size=64"]
    agents = []
    try:
        for _ in range(2):
            agents.append(agent(port, "1:2", "--rdzv_id=two", "--max_restarts=3", conf, tail=[*TINY, *run, *slow]))
            time.sleep(1)  # the first one holds the meeting point
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") >= 30):
            assert agents[0].poll() is None and time.monotonic() < deadline, agents[0].communicate()
            time.sleep(0.05)
        for process in (agents[1].pid, *children(agents[1].pid)):
            os.kill(process, signal.SIGKILL)
        written = agents[0].communicate(timeout=120)[0]
    finally:
        for one in agents:
            one.kill()
            one.wait()
            one.stdout.close()
    assert agents[0].returncode == 0, written
    assert "2 processes" in written and "1 process\n" in written.partition("2 processes")[2]
    assert [line["step"] for line in project.log()] == list(range(1, 151))
    assert not (project.path / "out" / "previous").exists()
    project.train(*run, *slow, "--out_dir=one")
    assert_same_curve(project, "one", "out", tolerance=1e-2)


@several
@pytest.mark.slow
def test_the_readme_s_command_for_two_machines(project):
    """As it stands there, but for the address, the size of the machines and a tiny model."""
    [line] = [line.strip() for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "HOST:" in line]
    port, words = free_port(), line.split()
    assert words[0] == "torchrun" and "--nproc_per_node=8" in words
    words = [word.replace("HOST:29400", f"127.0.0.1:{port}").replace("node=8", "node=1") for word in words[1:]]
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    both = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words, *TINY], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, encoding="utf-8",
                             env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1"))
            for _ in range(2)]
    try:
        written = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], written
    assert "".join(written).count("2 processes") == 1
    assert [line["step"] for line in project.log()] == [5, 10, 15, 20]


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
