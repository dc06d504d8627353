"""Resident memory and open files of a long run, after a tenth of the steps and at the end: they should not grow.

    python tests/bench/long_run.py                       50,000 tiny steps
    python tests/bench/long_run.py --steps=5000 --json=figures.json

Linux only: the figures are from /proc/self. VmRSS is RssAnon, the memory of the process itself, and mapped files.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS.parent))

from common import fact_line, facts  # noqa: E402
from conftest import Project  # noqa: E402

import train  # noqa: E402

RUN = ("--dataset=tiny --device=cpu --dtype=float32 --compile=False --ngram=1 --n_layer=1 --n_head=1 --n_embd=16 "
       "--block_size=8 --batch_size=1 --eval_iters=1 --log_interval=100 --save_interval_minutes=0.05").split()


def resources():
    """Resident memory in MB, all and the anonymous part, and the number of open files."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
    files = len(os.listdir("/proc/self/fd")) - 1  # less the one that lists them
    return dict(rss_mb=int(found["VmRSS"].split()[0]) / 1024, anon_mb=int(found["RssAnon"].split()[0]) / 1024,
                open_files=files)


def measured(steps):
    """Train in the current folder. Returns the resources by step: at a tenth, half and the end of the run."""
    found, real = {}, train.get_lr
    train.plot_losses = lambda *args: None  # matplotlib allocates 50 MB at its first pictures, then no more

    def get_lr(step, s):
        if step in (steps // 10, steps // 2, steps - 1):
            found[step] = resources()
        return real(step, s)

    train.get_lr = get_lr
    try:
        status = train.main([*RUN, f"--max_iters={steps}", f"--eval_interval={max(1, steps // 50)}"])
    finally:
        train.get_lr = real
    assert status == 0, f"the run ended with status {status}"
    return found


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="length of the run (default: %(default)s)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        parser.error("it reads /proc, which only Linux has")
    known = facts(steps=args.steps)
    before, began = os.getcwd(), time.monotonic()
    path = args.json and Path(args.json).absolute()
    with tempfile.TemporaryDirectory() as folder:
        Project(Path(folder), None)
        os.chdir(folder)
        sys.stdout, shown = open(os.devnull, "w", encoding="utf-8"), sys.stdout
        try:
            found = measured(args.steps)
        finally:
            sys.stdout.close()
            sys.stdout = shown
            os.chdir(before)
    print(f"{'step':>8}{'RSS MB':>10}{'anon MB':>10}{'files':>8}")
    for step, row in found.items():
        print(f"{step:8d}{row['rss_mb']:10.1f}{row['anon_mb']:10.1f}{row['open_files']:8d}")
    print(f"{time.monotonic() - began:.0f} s, {fact_line(known)}")
    if path:
        path.write_text(json.dumps(known | dict(resources=found), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
