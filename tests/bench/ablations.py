"""Ablations: the loss and time of a config with one setting changed at a time.

    python tests/bench/ablations.py                                     config/train_char_cpu.py, half its steps
    python tests/bench/ablations.py --changes="dropout=0.1,n_head=8" --flags="--max_iters=1000"

A change of several settings joins them with +. Loss: over the whole validation split, after the last step. Seconds: of
steps and evaluations, without startup. Runs are sequential, each n times with different seeds.
"""
import tempfile
from pathlib import Path

from common import ROOT, facts, parser, prepared, report, run_train

CHANGES = ("ngram=1,ngram=1+learning_rate=0.005,ngram=5,ngram=6,ngram=8,learning_rate=0.001,learning_rate=0.005,"
           "optimizer=adamw,schedule=cosine,qk_norm=False,zero_init=False,activation=gelu,norm=layernorm,"
           "position=learned,tie_weights=True,weight_decay=0.0")


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "ablations", n=1)
    options.add_argument("--config", default="config/train_char_cpu.py", help="of train.py, in the repository")
    options.add_argument("--flags", default="--max_iters=500", help="more arguments of all runs")
    options.add_argument("--changes", default=CHANGES, help="separated by commas")
    args = options.parse_args(argv)
    known, found = facts(n=args.n, config=args.config, flags=args.flags), {}
    with tempfile.TemporaryDirectory() as name:
        prepared(Path(name), args.text)
        for change in ["", *args.changes.split(",")]:
            runs = found[change.replace("+", ", ") or "unchanged"] = []
            for run in range(args.n):
                words = [*args.flags.split(), "--eval_interval=1000000", f"--seed={1337 + run}"]
                words += [f"--{part}" for part in filter(None, change.split("+"))]
                last = run_train([ROOT / args.config, *words], name, Path(name, "out"))[-1]
                runs.append({"val loss": last["val_loss"], "seconds": last["elapsed"]})
    report(args.json, known, found)


if __name__ == "__main__":
    main()
