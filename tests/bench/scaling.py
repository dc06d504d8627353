"""Training speed of several processes on CPUs: the same global batch, split across 1, 2 and 4 processes.

    python tests/bench/scaling.py                      1, 2 and 4 processes with a thread each, three runs
    python tests/bench/scaling.py --processes=1,2 --n=1 config/train_char.py --batch_size=8

Other arguments are those of train.py. Speed is the median of the log's lines.
"""
import statistics
import tempfile
from pathlib import Path

from common import ROOT, facts, parser, prepared, report, run_train

SHAPE = ["--ngram=1", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=24",
         "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=40", "--log_interval=4", "--eval_iters=1"]


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "scaling")
    options.add_argument("--processes", default="1,2,4", help="separated by commas")
    args, extra = options.parse_known_args(argv)
    words = [*SHAPE, *(ROOT / word if word.endswith(".py") else word for word in extra)]
    known, speeds = facts(n=args.n, flags=" ".join(extra)), {int(word): [] for word in args.processes.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), args.text)
        for _ in range(args.n):
            for processes, found in speeds.items():
                log = run_train(words, folder, tempfile.mkdtemp(dir=folder), processes=processes)
                found.append(statistics.median(record["tokens_per_second"] for record in log[1:-1]))
    first = next(iter(speeds))
    alone = statistics.median(speeds[first]) / first  # tokens per second of a process
    report(args.json, known, {f"{processes} processes": [
        {"tokens/s": speed, "efficiency, %": 100 * speed / processes / alone} for speed in found]
        for processes, found in speeds.items()})


if __name__ == "__main__":
    main()
