"""DDP: the loss curve of one process, checkpoints for any number of processes, errors that end all processes."""
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

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="forks, reads /proc and needs gloo")
LONG = ["--max_iters=1000000", "--lr_decay_iters=1000000", "--eval_interval=1000000", "--log_interval=1"]


# Processes forked from a server that has imported torch: one second instead of ten

def one_of_many(rank, count, port, folder, written, argv, patch):
    """A process of processes(): train.py with torchrun's variables."""
    status = 99
    try:
        os.chdir(folder)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        sys.stdout = sys.stderr = open(written, "a", encoding="utf-8", buffering=1)
        torch.set_num_threads(1)
        train.plot_losses = lambda folders: None  # takes longer than a tiny run
        if patch:
            patch(rank)
        status = train.main([*TINY, *argv])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def processes(count, *argv, patch=None):
    """Run train.py in `count` processes, each after patch(rank). Returns the exit statuses and the output.

    The store is in this process, as in torchrun's agent.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # of the server
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


def train_together(count, *argv, patch=None):
    """processes() that succeed without a warning. Returns the output."""
    statuses, written = processes(count, *argv, patch=patch)
    assert statuses == [0] * count, written
    assert "Traceback" not in written and "Warning" not in written, written
    return written


def assert_same_curve(project, one, many, tolerance=1e-4):
    """The logs agree to float32 rounding, which grows with the steps."""
    for a, b in zip(project.log(one), project.log(many), strict=True):
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        for key in ("loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=100 * tolerance)


def shapes(checkpoint):
    """The names in a checkpoint and the shapes of its tensors."""
    states = {(o, p, key): value.shape for o, states in enumerate(checkpoint["optimizers"])
              for p, state in states.items() for key, value in state.items()}
    return {name: weight.shape for name, weight in checkpoint["model"].items()} | states | dict.fromkeys(checkpoint)


BATCHES = {"even": ["--batch_size=4", "--gradient_accumulation_steps=6"],
           "uneven": ["--batch_size=2", "--gradient_accumulation_steps=7"]}


@pytest.mark.parametrize("batch, counts", [("uneven", [2]), pytest.param("uneven", [3, 8], marks=pytest.mark.slow),
                                           pytest.param("even", [2, 4], marks=pytest.mark.slow)])
def test_any_number_of_processes_has_the_same_curve(project, batch, counts):
    run = ["--max_iters=50", "--eval_interval=25", "--log_interval=1", *BATCHES[batch]]
    project.train(*run, "--out_dir=1")
    for count in counts:
        written = train_together(count, *run, f"--out_dir={count}")
        assert written.count(" parameters, ") == 1 and f"{count} x cpu" in written
        assert_same_curve(project, "1", str(count))


@pytest.mark.parametrize("first, then", [(3, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(project, first, then):
    run = ["--log_interval=1", "--batch_size=2", "--gradient_accumulation_steps=5", "--lr_decay_iters=20"]
    project.train(*run, "--out_dir=reference")
    train_together(first, *run, "--max_iters=10")
    train_together(then, *run, "--init_from=auto")
    assert_same_curve(project, "reference", "out")
    assert shapes(project.checkpoint()) == shapes(project.checkpoint("reference"))


def print_matrices(rank):
    """Print how many matrices each process orthogonalizes."""
    real = train.newton_schulz
    train.newton_schulz = lambda G, dtype: (print(f"matrices {rank} {len(G)}"), real(G, dtype))[1]


def test_the_work_of_muon_is_split_across_ranks(project):
    """Two blocks have ten square matrices, queries, keys and values as stacks of three, and four of 4 C x C."""
    for size, most in ((1, 12), (2, 6), (3, 3 + 1 + 2)):
        written = train_together(size, "--n_layer=2", "--max_iters=1", f"--out_dir={size}", patch=print_matrices)
        counts = [0] * size
        for _, rank, count in (line.split() for line in written.splitlines() if line.startswith("matrices")):
            counts[int(rank)] += int(count)
        assert max(counts) == most, counts
        for name, weight in project.checkpoint(str(size))["model"].items():
            assert torch.allclose(weight, project.checkpoint("1")["model"][name], atol=1e-5), name


def print_no_sync(rank):
    """Print each use of no_sync and each backward pass."""
    ddp, real = torch.nn.parallel.DistributedDataParallel, train.get_batch

    def no_sync(self):
        print("no sync")
        return contextlib.nullcontext()

    ddp.no_sync = no_sync
    train.get_batch = lambda *args: (print("backward"), real(*args))[1]


def test_gradients_are_synchronized_once_a_step(project):
    """In the last pass: of five sequences in passes of two, one rank has two passes of two and one, the other three."""
    run = ["--max_iters=1", "--batch_size=2", "--gradient_accumulation_steps=5"]
    written = train_together(2, *run, patch=print_no_sync)
    assert written.count("backward\n") == 6 and written.count("no sync\n") == 4


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "config").rglob("*.py")))
def test_four_processes_train_every_config_file(project, config):
    """With a batch that four do not divide evenly."""
    path = next((ROOT / "config").rglob(f"{config}.py"))
    train_together(4, str(path), *TINY, "--vocab_multiple=1", "--max_iters=2", "--eval_interval=2",
                   "--init_from=scratch", "--gradient_accumulation_steps=2", "--batch_size=3")
    assert project.log()[-1]["step"] == 2


# Errors

def test_a_mistake_that_all_processes_find_is_one_line(project):
    statuses, written = processes(3, "--block_size=100000")
    assert statuses == [2] * 3
    assert written.count("\n") == 1 and "block_size=100000" in written, written


def test_no_thread_of_the_process_group_outlives_it(project):
    """At exit such a thread can abort the process."""
    program = ("import os, sys, train; assert train.main(sys.argv[1:]) == 0; "
               "print(*(open(f'/proc/self/task/{i}/comm').read() for i in os.listdir('/proc/self/task')))")
    environment = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    out = subprocess.run([sys.executable, "-c", program, *TINY], env=os.environ | environment, timeout=100, check=True,
                         capture_output=True, encoding="utf-8").stdout
    assert "python" in out and "gloo" not in out


def fail(this, rank, error):
    """The third step of process `rank` raises."""
    real, calls = train.forward_backward, []

    def forward_backward(*args):
        calls.append(1)
        if len(calls) == 3 and this == rank:
            raise error
        return real(*args)

    train.forward_backward = forward_backward


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_of_one_process_is_printed_and_ends_all(project, rank):
    """A user's mistake as a line, another error as a traceback."""
    for error, line in ((train.UserError("no more paper"), "train.py: no more paper"),
                        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug")):
        statuses, written = processes(3, patch=partial(fail, rank=rank, error=error))
        assert all(statuses) and None not in statuses
        assert written.splitlines().count(line) == 1, written


def read_another_step(rank):
    """Rank 1 reads another checkpoint."""
    real = train.load_checkpoint

    def load_checkpoint(path):
        checkpoint = real(path)
        checkpoint["progress"]["step"] -= 3 * rank
        return checkpoint

    train.load_checkpoint = load_checkpoint


def test_processes_that_read_different_checkpoints_are_stopped(project):
    """For example where out_dir is not on shared storage."""
    project.train("--max_iters=10")
    statuses, written = processes(2, "--init_from=resume", "--max_iters=20", patch=read_another_step)
    assert statuses == [2, 2] and "share" in written and "out_dir=out" in written and "Traceback" not in written


# torchrun

def torchrun(*argv, **options):
    """Start torchrun with these arguments, in the current folder. Returns the process."""
    environment = os.environ | dict(
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # else no agent can join later in torch 2.13
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") | options
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *argv], env=environment, **options)


def launch(count, *argv):
    """Start `count` processes of a tiny run."""
    return torchrun("--standalone", f"--nproc_per_node={count}", str(ROOT / "train.py"), *TINY, *argv)


@contextlib.contextmanager
def ended(*agents):
    """Kills these processes of torchrun and their workers at the end."""
    try:
        yield
    finally:
        for agent in agents:
            workers = children(agent.pid)  # in sessions of their own
            agent.kill()
            agent.wait()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_until(condition, process):
    """Wait until condition() holds, while a process lives."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the condition was not met"
        time.sleep(0.05)


def logged(lines, out="out"):
    """A condition: there are so many lines in the log."""
    path = Path(out, "log.jsonl")
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= lines


def children(parent):
    """The processes started by a process: their environments by process number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1]) == parent:
                found[int(path.name)] = (path / "environ").read_bytes().split(b"\0")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_leaves_a_checkpoint(project, rank):
    """The other rank waits for it in all_reduce, where Python runs no signal handler."""
    run = [*LONG, "--save_interval_minutes=1e-9", "--batch_size=4", "--gradient_accumulation_steps=2"]
    process = launch(2, *run)
    with ended(process):
        wait_until(logged(5), process)
        [pid] = [pid for pid, environment in children(process.pid).items() if b"RANK=%d" % rank in environment]
        os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=300)
    assert process.returncode != 0
    step = train.load_checkpoint(project.path / "out" / "ckpt.pt")["progress"]["step"]
    assert step >= 4
    project.train(*run, "--init_from=resume", f"--max_iters={step + 2}")
    assert [line["step"] for line in project.log()] == list(range(1, step + 3))


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_a_checkpoint_that_torchrun_resumes(project):
    """Three processes for a batch of two sequences. All stop after the same step."""
    run = ["--batch_size=1", "--gradient_accumulation_steps=2", *LONG]
    process = launch(3, *run)
    with ended(process):
        wait_until(logged(20), process)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=120)
    step = project.checkpoint()["progress"]["step"]
    assert out.count(f"stopped at step {step}") == 1 and "--init_from=resume" in out
    process = launch(3, *run, "--init_from=resume", f"--max_iters={step + 5}")
    with ended(process):
        out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in error, error
    assert out.count("3 x cpu") == out.count("best validation loss") == 1
    project.train(*run, f"--max_iters={step + 5}", "--out_dir=one")
    assert [line["step"] for line in project.log()] == list(range(1, step + 6))
    for a, b in zip(project.log("one"), project.log(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_machines_join_and_leave_an_elastic_run(project):
    """A second agent joins and is killed: no step before the last checkpoint is lost."""
    argv = [*TINY, "--n_layer=2", "--n_embd=64", "--block_size=64", "--max_iters=250", "--eval_interval=20",
            "--log_interval=1", "--batch_size=2", "--gradient_accumulation_steps=3"]
    words = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
             "--rdzv_id=elastic", "--max_restarts=3", "--rdzv_conf=last_call_timeout=1,keep_alive_interval=1",
             str(ROOT / "train.py"), *argv, "--init_from=auto"]
    outputs = [open(project.path / name, "w+", encoding="utf-8") for name in ("first.txt", "second.txt")]
    first = torchrun(*words, stdout=outputs[0], stderr=subprocess.STDOUT)
    with ended(first):
        wait_until(logged(30), first)
        second = torchrun(*words, stdout=outputs[1], stderr=subprocess.STDOUT)
        with ended(second):  # killed with its worker
            wait_until(lambda: "2 x cpu" in Path("first.txt").read_text("utf-8"), first)
            lines = len(project.log())
            wait_until(logged(lines + 25), first)
        first.wait(timeout=120)
    written = Path("first.txt").read_text("utf-8")
    for file in outputs:
        file.close()
    assert first.returncode == 0, written
    sizes = [line.split(" parameters, ")[1][0] for line in written.splitlines() if " parameters, " in line]
    assert sizes == ["1", "2", "1"], written
    assert [line["step"] for line in project.log()] == list(range(1, 251))
    assert not list((project.path / "out").glob("previous*"))
    project.train(*argv, "--max_iters=60", "--lr_decay_iters=250", "--out_dir=one")
    for a, b in zip(project.log("one"), project.log(), strict=False):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2), a["step"]
