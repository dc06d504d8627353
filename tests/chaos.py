"""Kill a run with SIGKILL again and again, go on each time, and compare the end with a run that nobody disturbed.

    python tests/chaos.py --kills=50                one process, killed at random moments, every other time in a save
    python tests/chaos.py --kills=5 --torchrun      two processes; a killed worker is brought back by --max-restarts
    python tests/chaos.py --help

Weights, optimizer, data position, best loss and log must be equal to the last bit; exit status 1 where they are not.
One kill in ten also cuts the latest checkpoint in two, as a power failure can, so that the one before it has to serve.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: one thread, so that a process can be forked

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import TIMINGS, TINY, Project, same  # noqa: E402

import train  # noqa: E402

UNEQUAL = {"elapsed", "config"}  # of a checkpoint: time, and how the run was asked for
RUN = [*TINY, "--dropout=0.2", "--eval_interval=5", "--log_interval=1", "--eval_iters=2"]
FILES = ("ckpt.pt", "ckpt-previous.pt")


class Forked:
    """train.py in a process made by fork, which needs no second import of torch."""

    def __init__(self, argv, output):
        sys.stdout.flush()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            status = 70
            with contextlib.suppress(BaseException):
                handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(handle, stream)
                sys.stdout, sys.stderr = (open(n, "w", closefd=False, encoding="utf-8") for n in (1, 2))
                status = train.main(argv)
                sys.stdout.flush()
            os._exit(status)

    def poll(self):
        """The exit status, or None of a process that lives."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def started(argv, output):
    """A run of train.py: forked where that is possible."""
    if hasattr(os, "fork"):
        return Forked(argv, output)
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=file, stderr=file)


def torchrun(argv, output, restarts):
    """Two processes of train.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", "--monitor-interval=0.1", str(ROOT / "train.py"), *argv]
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def mark(path):
    """What changes when a file is written anew, or None where there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def marks(out):
    return [mark(out / f"{name}.tmp") for name in ("ckpt.pt", "best.pt")]


def wait_for_saves(process, out, count):
    """Return when that many saves have begun since now, or the process has ended: the very moment the last begins."""
    before, deadline = marks(out), time.monotonic() + 120
    while count and process.poll() is None:
        assert time.monotonic() < deadline, "no save within two minutes"
        now = marks(out)
        begun = any(new and new != old for new, old in zip(now, before, strict=True))
        before, count = now, count - begun
        if count:
            time.sleep(0.0002)


def lines(out):
    """The log, less what no two runs share."""
    text = (out / "log.jsonl").read_text(encoding="utf-8") if (out / "log.jsonl").exists() else ""
    whole = [line for line in text.splitlines() if line.endswith("}")]
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in whole]


def resumes_at(out):
    """The step and the file from which the next run goes on."""
    for name in FILES:
        with contextlib.suppress(train.UserError):
            return train.load_checkpoint(out / name)["step"], name
    return 0, None


def differences(one, other):
    """The names of all in which the ends of two runs differ, of the log, the last checkpoint and the best."""
    found = [] if lines(one) == lines(other) else ["log.jsonl"]
    for name in ("ckpt.pt", "best.pt"):
        a, b = train.load_checkpoint(one / name), train.load_checkpoint(other / name)
        found += [f"{name}: {key}" for key in a.keys() | b.keys()
                  if key not in UNEQUAL and not same(a.get(key), b.get(key))]
    return found


def survive(folder, kills, seed):
    """A run killed that often and resumed until it is done. Returns the figures as a dict."""
    draw, out, output = random.Random(seed), folder / "out", folder / "output.txt"
    steps = 25 * kills + 10  # more than all lives together can do before the last kill
    whole = started([*RUN, f"--max_iters={steps}", "--out_dir=whole"], folder / "whole.txt")
    while whole.poll() is None:
        time.sleep(0.05)
    figures = dict(steps=steps, kills=0, in_a_save=0, checkpoints_cut=0, resumed_from_previous=0, lost_steps=0)
    while True:
        begin, source = resumes_at(out)
        figures["resumed_from_previous"] += source == FILES[1]
        resume = ["--init_from=resume"] if source else []
        before = marks(out)
        process = started([*RUN, f"--max_iters={steps}", *resume], output)
        try:
            if figures["kills"] == kills:
                while process.poll() is None:
                    time.sleep(0.05)
            else:
                in_a_save = draw.random() < 0.5
                wait_for_saves(process, out, draw.randrange(3) + in_a_save)
                time.sleep(draw.random() * (0.003 if in_a_save else 0.15))
        finally:
            killed = process.poll() is None
            process.kill()
        if not killed:
            break
        figures["kills"] += 1
        figures["in_a_save"] += any(a and a != b for a, b in zip(marks(out), before, strict=True)) or (
            not (out / FILES[0]).exists() and (out / FILES[1]).exists())
        if draw.random() < 0.1 and all((out / name).exists() for name in FILES) and resumes_at(out)[1] == FILES[0]:
            os.truncate(out / FILES[0], (out / FILES[0]).stat().st_size // 2)
            figures["checkpoints_cut"] += 1
        logged = lines(out)
        figures["lost_steps"] += max(0, (logged[-1]["step"] if logged else 0) - resumes_at(out)[0])
    figures["exit_status"] = process.poll()
    return figures


def survive_torchrun(folder, kills, seed):
    """Two processes, of which one is killed that often, brought back by torchrun. Returns the figures as a dict."""
    draw, out, steps = random.Random(seed), folder / "out", 25 * kills + 10
    argv = [*RUN, f"--max_iters={steps}"]
    assert torchrun([*argv, "--out_dir=whole"], folder / "whole.txt", 0).wait(timeout=300) == 0
    figures = dict(steps=steps, kills=0)
    process = torchrun(argv, folder / "output.txt", kills)
    try:
        while figures["kills"] < kills and process.poll() is None:
            wait_for_saves(process, out, 1 + draw.randrange(3))
            time.sleep(draw.random() * 0.02)
            found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
            workers = [int(pid) for pid in found.stdout.split() if b"train.py" in Path(
                "/proc", pid, "cmdline").read_bytes()] if process.poll() is None else []
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
                figures["kills"] += 1
        figures["exit_status"] = process.wait(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):  # torchrun and its workers, a session of their own
            os.killpg(process.pid, signal.SIGKILL)
    return figures


def main(argv=None):
    """The command line. Returns the exit status: 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--torchrun", action="store_true", help="two processes under torchrun, a worker is killed")
    args = parser.parse_args(argv)
    before, began = os.getcwd(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Project(folder, None)
        os.chdir(folder)
        try:
            figures = (survive_torchrun if args.torchrun else survive)(folder, args.kills, args.seed)
            found = differences(folder / "out", folder / "whole") if figures["exit_status"] == 0 else ["no end"]
            output = (folder / "output.txt").read_text(encoding="utf-8")
        finally:
            os.chdir(before)
    figures |= dict(seconds=round(time.monotonic() - began), equal="no" if found else "yes")
    for key, value in figures.items():
        print(f"{key.replace('_', ' '):<24}{value:>8}")
    if found:
        print(f"differs: {', '.join(found)}\n{output}", file=sys.stderr)
    return int(bool(found) or figures["kills"] < args.kills)


if __name__ == "__main__":
    sys.exit(main())
