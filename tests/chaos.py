"""Kill a run with SIGKILL again and again, resume it each time, and compare its end with that of an undisturbed run.

    python tests/chaos.py --kills=50

Every other kill is during a save. Weights, optimizer, data position, best loss and log must be bit-identical, or the
exit status is 1. One kill in ten also truncates the latest checkpoint, so that the previous one is needed.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: one thread, so that the process can be forked

import argparse
import contextlib
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import TIMINGS, TINY, Project, same  # noqa: E402

import train  # noqa: E402

RUN = [*TINY, "--dropout=0.2", "--eval_interval=5", "--log_interval=1", "--eval_iters=2"]
LATEST, PREVIOUS = Path("out/ckpt.pt"), Path("out/ckpt-previous.pt")


def run(argv, output):
    """train.py in a process of its own."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    train.plot_losses = lambda folders: None  # takes longer than the steps
    sys.exit(train.main(argv))


def started(*argv):
    """A run in a process made by fork, which does not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=run, args=([*RUN, *argv], "output.txt"))
    process.start()
    return process


def marks():
    """The temporary files of a save, with their inodes and modification times."""
    found = []
    for name in ("ckpt-new.pt.tmp", "ckpt-new.pt", "link.tmp"):
        with contextlib.suppress(OSError):
            file = os.stat(f"out/{name}")
            found.append((name, file.st_ino, file.st_mtime_ns))
    return set(found)


def wait_for_save(is_alive):
    """Return when a save begins or the process has ended."""
    before, deadline = marks(), time.monotonic() + 120
    while not marks() - before and is_alive():
        assert time.monotonic() < deadline, "no save within two minutes"
        time.sleep(0.0002)


def loaded(path):
    """A checkpoint without settings and elapsed time, or None if it is missing or damaged."""
    with contextlib.suppress(train.UserError):
        checkpoint = train.load_checkpoint(path)
        del checkpoint["config"], checkpoint["progress"]["elapsed"]
        return checkpoint
    return None


def differences():
    """The names of the parts in which out/ and reference/ differ."""
    logs = [[{k: v for k, v in record.items() if k not in TIMINGS} for record in train.read_log(folder)]
            for folder in ("out", "reference")]
    found = ["log.jsonl"] * (logs[0] != logs[1])
    for name in ("ckpt.pt", "best.pt"):
        a, b = loaded(Path("out", name)), loaded(Path("reference", name))
        found += [f"{name}: {key}" for key in b if not a or not same(a[key], b[key])]
    return found


def survive(kills, rng):
    """Kill a run that often and resume it until it is done. Returns the figures as a dict."""
    steps = f"--max_iters={25 * kills + 10}"  # more than all the killed runs can do
    started(steps, "--out_dir=reference").join()
    figures = dict(kills=0, in_a_save=0, checkpoints_cut=0, resumed_from_previous=0)
    while True:
        intact, before = bool(loaded(LATEST)), marks()
        figures["resumed_from_previous"] += not intact and bool(loaded(PREVIOUS))
        process = started(steps, "--init_from=auto")
        if figures["kills"] == kills:
            process.join()
            return figures | dict(exit_status=process.exitcode)
        in_a_save = rng.random() < 0.5
        for _ in range(rng.randrange(3) + in_a_save):
            wait_for_save(process.is_alive)
        time.sleep(rng.random() * (0.003 if in_a_save else 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        assert loaded(LATEST) or not intact, "ckpt.pt is lost"
        figures["kills"] += 1
        figures["in_a_save"] += bool(marks() - before)
        if rng.random() < 0.1 and loaded(LATEST) and loaded(PREVIOUS) and not LATEST.samefile(PREVIOUS):
            os.truncate(LATEST, LATEST.stat().st_size // 2)
            figures["checkpoints_cut"] += 1


def main(argv=None):
    """The command line. Returns the exit status: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args(argv)
    before, began = os.getcwd(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Project(Path(folder), None)
        os.chdir(folder)
        try:
            figures = survive(args.kills, random.Random(args.seed))
            found = differences() if figures["exit_status"] == 0 else ["the exit status"]
            output = Path("output.txt").read_text(encoding="utf-8")
        finally:
            os.chdir(before)
    for key, value in (figures | dict(seconds=round(time.monotonic() - began), equal="no" if found else "yes")).items():
        print(f"{key.replace('_', ' '):<24}{value:>8}")
    if found:
        print(f"differs: {', '.join(found)}\n{output}", file=sys.stderr)
    return int(bool(found) or figures["kills"] < args.kills)


if __name__ == "__main__":
    sys.exit(main())
