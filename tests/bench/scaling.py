"""Training speed of several processes on CPUs: the same global batch, split across 1, 2 and 4 processes.

    python tests/bench/scaling.py                      1, 2 and 4 processes with a thread each, three runs
    python tests/bench/scaling.py --processes=1,2 --n=1 config/train_char.py --batch_size=8

Arguments that are not flags of this script are those of train.py. Speed is the median of the log's lines.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, config_file, facts, log_of, prepared, report, spread

SHAPE = ["--ngram=1", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=24",
         "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=40", "--log_interval=4", "--eval_iters=1"]


def tokens_per_second(processes, argv, folder):
    """One run of train.py under torchrun. Returns its speed without the first and the last log line."""
    out = tempfile.mkdtemp(dir=folder)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py"]
    done = subprocess.run([sys.executable, *map(str, command), *argv, f"--out_dir={out}"], cwd=folder,
                          capture_output=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    if done.returncode:
        sys.exit(done.stderr)
    return statistics.median(r["tokens_per_second"] for r in log_of(out)[1:-1])


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: prepare.py's)")
    parser.add_argument("--json", default="bench-scaling.json", help="file to write (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    words = [*SHAPE, *(config_file(word) if word.endswith(".py") else word for word in extra)]
    known, found = facts(n=args.n, flags=" ".join(extra)), {int(word): [] for word in args.processes.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), args.text)
        for _ in range(args.n):
            for processes, speeds in found.items():
                speeds.append(tokens_per_second(processes, words, folder))
    rows, alone = [["processes, a thread each", "tokens/s", "efficiency"]], None
    for processes, speeds in found.items():
        alone = alone or statistics.median(speeds) / processes
        rows.append([processes, spread(speeds, 0), f"{statistics.median(speeds) / processes / alone:.0%}"])
    report(args.json, known, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
