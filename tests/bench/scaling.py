"""Training speed of several processes on CPUs: the same global batch, split across 1, 2 and 4 processes.

    python tests/bench/scaling.py                      1, 2 and 4 processes with a thread each, three runs
    python tests/bench/scaling.py --processes=1,2 --n=1 config/train_char.py --batch_size=8

Other arguments are those of train.py. Speed is the median of the log's lines.
"""
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, config_file, facts, launch, log_of, parser, prepared, report

SHAPE = ["--ngram=1", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=24",
         "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=40", "--log_interval=4", "--eval_iters=1"]


def tokens_per_second(processes, argv, folder):
    """One run of train.py under torchrun. Returns its speed without the first and the last log line."""
    out = tempfile.mkdtemp(dir=folder)
    launch(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py", *argv,
            f"--out_dir={out}"], folder, env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    return statistics.median(r["tokens_per_second"] for r in log_of(out)[1:-1])


def main(argv=None):
    """The command line. Returns the exit status."""
    options = parser(__doc__, "scaling")
    options.add_argument("--processes", default="1,2,4", help="separated by commas")
    args, extra = options.parse_known_args(argv)
    words = [*SHAPE, *(config_file(word) if word.endswith(".py") else word for word in extra)]
    known, speeds = facts(n=args.n, flags=" ".join(extra)), {int(word): [] for word in args.processes.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), args.text)
        for _ in range(args.n):
            for processes, found in speeds.items():
                found.append(tokens_per_second(processes, words, folder))
    first = next(iter(speeds))
    alone = statistics.median(speeds[first]) / first  # tokens per second of a process
    report(args.json, known, {f"{processes} processes": [
        {"tokens/s": speed, "efficiency, %": 100 * speed / processes / alone} for speed in found]
        for processes, found in speeds.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
