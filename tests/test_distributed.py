"""Several processes: the same curve as one, one log, checkpoints that either goes on from, and an end for all."""
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

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


def one_of_many(rank, count, port, folder, written, argv, patch):
    """What each of processes() does: torchrun's variables, then train.py."""
    status = 99
    try:
        os.chdir(folder)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        sys.stdout = sys.stderr = open(written, "a", encoding="utf-8", buffering=1)
        torch.set_num_threads(1)
        if patch:
            patch(rank)
        status = train.main([*TINY, *argv])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def processes(count, *argv, patch=None):
    """Run train.py in `count` processes at once, forked from a server that has imported it already.

    Returns their exit statuses and all that they wrote. `patch(rank)` runs in each of them first. Like an agent of
    torchrun, this process holds the store at which they meet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "torch._dynamo", "torch.distributed.checkpoint.state_dict"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # else it finds nothing to load
        forkserver.ensure_running()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    written = Path("written.txt").resolve()
    written.unlink(missing_ok=True)
    started = [context.Process(target=one_of_many, args=(
        rank, count, store.port, os.getcwd(), written, argv, patch)) for rank in range(count)]
    try:
        for process in started:
            process.start()
        deadline = time.monotonic() + 120
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in started], written.read_text("utf-8", "replace")
    finally:
        for process in started:
            process.kill()


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


forked = pytest.mark.skipif(sys.platform != "linux", reason="forks with torch imported, which others do not bear")
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


def count_what_is_held(rank):
    """Have a process print the numbers that it holds of weights, gradients and the optimizer's state."""
    real = train.update

    def update(model, optimizers, *args):
        p = list(model.parameters())
        print("weights", *(sum(x.to_local().numel() for x in y) for y in (p, [x.grad for x in p])))
        norm = real(model, optimizers, *args)
        print("states", sum(v.to_local().numel() for o in optimizers for state in o.state.values()
                            for v in state.values() if v.ndim))
        return norm
    train.update = update


@several
@forked
def test_a_sharded_process_holds_its_part_alone(project):
    """Of weights, gradients and the optimizer's numbers: a fourth each, but for what four do not divide."""
    statuses, written = processes(4, "--max_iters=1", "--n_layer=2", "--parallel=fsdp", patch=count_what_is_held)
    assert statuses == [0] * 4, written
    blocks, rest = 2 * 12 * 32 * 32, 2 * 23 * 32 + 2 * 64 * 8 + 2 * 8 * 32  # 23 characters; two tables and their mix
    found = [line.split() for line in written.splitlines()]
    for words in (words for words in found if words[:1] == ["weights"]):
        assert all(abs(int(n) - (blocks + rest) / 4) <= 2 * 32 for n in words[1:]), words
    for words in (words for words in found if words[:1] == ["states"]):
        assert abs(int(words[1]) - (blocks + 2 * rest) / 4) <= 4 * 32, words
    assert sum(words[:1] == ["states"] for words in found) == 4


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


def count_matrices(rank):
    """Have process 0 print how many matrices it has orthogonalized so far."""
    real, done = train.orthogonalize, []

    def orthogonalize(matrices, dtype):
        done.append(len(matrices))
        if rank == 0:
            print("matrices", sum(done))
        return real(matrices, dtype)
    train.orthogonalize = orthogonalize


@several
@forked
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_orthogonalizes_its_share_alone(project, parallel):
    """Two blocks have ten square matrices in two stacks, eight times two wide ones: no process does more than half."""
    run = ["--n_layer=2", "--max_iters=1", f"--parallel={parallel}"]
    for size, expected in ((1, 2 * (3 + 1 + 2)), (2, 3 + 1 + 2), (3, 3 + 1 + 2 * (2 if parallel == "ddp" else 1))):
        statuses, written = processes(size, *run, f"--out_dir={size}", patch=count_matrices)
        assert statuses == [0] * size, written
        found = [int(line.split()[1]) for line in written.splitlines() if line.startswith("matrices")]
        assert abs(found[-1] - expected) <= (2 if size == 3 else 0), (size, written)
        for name, weight in project.checkpoint(str(size))["model"].items():  # and the result is that of one
            assert torch.allclose(weight, project.checkpoint("1")["model"][name], atol=1e-5), name


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


def fail(this, rank, error, others=None):
    """The third update of process `rank` raises; those of the others take `others` seconds, if that is given."""
    real, calls = train.accumulate_gradients, []

    def accumulate_gradients(*args):
        calls.append(1)
        if len(calls) == 3 and this == rank:
            raise error
        if len(calls) == 3 and others:
            time.sleep(others)
        return real(*args)
    train.accumulate_gradients = accumulate_gradients


def fails_in(rank, error, others=None):
    """A patch for processes()."""
    return partial(fail, rank=rank, error=error, others=others)


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
    statuses, written = processes(3, patch=fails_in(1, train.RunFailed("no more ink"), 1000))
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


def read_another_step(rank):
    """Have process 1 find another checkpoint than the others."""
    real = train.load_checkpoint
    train.load_checkpoint = lambda path: real(path) | (dict(step=7) if rank == 1 else {})


@several
@forked
def test_processes_that_read_different_checkpoints_are_stopped(project):
    """As where out_dir is not on storage that the machines share."""
    project.train("--max_iters=10")
    statuses, written = processes(2, "--init_from=resume", "--max_iters=20", patch=read_another_step)
    assert all(statuses) and written.count("train.py: ") == 1 and "machines share" in written, written


def agent(written, *argv):
    """Start torchrun with these words and a tiny run; all it writes goes to the file `written`."""
    with open(written, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *argv], stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8",
                                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))  # else torch 2.13 lets no agent join later


def wait_until(condition, process, seconds=120):
    """Until condition() holds, while a process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


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
def test_machines_come_and_go_and_the_run_goes_on(project):
    """One agent begins, a second one joins, all of it is killed: no flag, no step lost before the last checkpoint."""
    argv = [*TINY, "--n_layer=2", "--n_embd=64", "--block_size=64", "--max_iters=250", "--eval_interval=20",
            "--log_interval=1", "--batch_size=2", "--gradient_accumulation_steps=3"]
    conf = "--rdzv_conf=last_call_timeout=1,keep_alive_interval=1"
    words = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
             "--rdzv_id=elastic", "--max_restarts=3", conf, str(ROOT / "train.py"), *argv]
    first, log = project.path / "first.txt", project.path / "out" / "log.jsonl"
    agents = [agent(first, *words)]
    try:
        wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 30, agents[0])
        agents.append(agent(project.path / "second.txt", *words))
        wait_until(lambda: "2 processes" in first.read_text("utf-8"), agents[0])
        lines = log.read_bytes().count(b"\n")
        wait_until(lambda: log.read_bytes().count(b"\n") >= lines + 25, agents[0])
        for process in (agents[1].pid, *children(agents[1].pid)):
            os.kill(process, signal.SIGKILL)
        agents[0].wait(timeout=120)
    finally:
        for one in agents:
            one.kill()
            one.wait()
    written = first.read_text("utf-8")
    assert agents[0].returncode == 0, written
    sizes = [line.split()[3] for line in written.splitlines() if line.startswith("hardware")]
    assert sizes == ["1", "2", "1"], written
    steps = [line["step"] for line in project.log()]
    assert steps == list(range(1, 251)) and not (project.path / "out" / "previous").exists()
    project.train(*argv, "--max_iters=60", "--lr_decay_iters=250", "--out_dir=one")
    for a, b in zip(project.log("one"), project.log(), strict=False):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2), a["step"]


@several
@pytest.mark.slow
def test_the_readme_s_command_for_two_machines(project):
    """As it stands there, but for the address, the size of the machines and a tiny model."""
    [line] = [line.strip() for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "HOST:" in line]
    port, words = free_port(), line.split()
    assert words[0] == "torchrun" and "--nproc_per_node=8" in words
    words = [word.replace("HOST:29400", f"127.0.0.1:{port}").replace("node=8", "node=1") for word in words[1:]]
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    files = [project.path / "first.txt", project.path / "second.txt"]
    both = [agent(file, *words, *TINY) for file in files]
    try:
        statuses = [process.wait(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    written = [file.read_text("utf-8") for file in files]
    assert statuses == [0, 0], written
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


def say_when_synchronizing(rank):
    """Have a process print with each backward pass whether its gradients are synchronized."""
    real = train.synchronizing

    def synchronizing(model, now):
        print("now" if now else "later")
        return real(model, now)
    train.synchronizing = synchronizing


@several
@forked
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_synchronized_once_a_step(project, parallel):
    """In the last of three passes, whatever a process's share is."""
    run = ["--max_iters=1", "--batch_size=2", "--gradient_accumulation_steps=5", f"--parallel={parallel}"]
    statuses, written = processes(2, *run, patch=say_when_synchronizing)
    assert statuses == [0, 0], written
    assert written.count("later\n") == 4 and written.count("now\n") == 2


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
