"""Ablations: the loss and time of a config with one setting changed at a time.

    python tests/bench/ablations.py                                     config/train_char_cpu.py, half its steps
    python tests/bench/ablations.py --changes="dropout=0.1,n_head=8"    other changes than the defaults
    python tests/bench/ablations.py --config=config/train_char_cpu.py --flags="--max_iters=1000"

A change of several settings joins them with +. Loss: over the whole validation split, after the last step. Seconds: of
steps and evaluations, without startup. Runs are sequential, each n times with different seeds.
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import config_file, facts, prepared, report, run_train, spread

CHANGES = ("ngram=1,ngram=1+learning_rate=0.01,ngram=3,optimizer=adamw,learning_rate=0.01,"
           "learning_rate=0.0025,schedule=cosine,qk_norm=False,zero_init=False,activation=gelu,norm=layernorm,"
           "position=learned,tie_weights=True,weight_decay=0.0")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/train_char_cpu.py", help="of train.py (default: %(default)s)")
    parser.add_argument("--flags", default="--max_iters=500", help="more arguments of all runs (default: %(default)s)")
    parser.add_argument("--changes", default=CHANGES, help="separated by commas (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: prepare.py's)")
    parser.add_argument("--n", type=int, default=1, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", default="bench-ablations.json", help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    known, rows, found = facts(n=args.n, config=args.config, flags=args.flags), [["", "val loss", "seconds"]], []
    with tempfile.TemporaryDirectory() as name:
        prepared(Path(name), args.text)
        for change in ["", *args.changes.split(",")]:
            losses, seconds = [], []
            for run in range(args.n):
                out = Path(name) / f"out-{len(found)}-{run}"
                words = [*args.flags.split(), "--eval_interval=1000000", f"--seed={1337 + run}"]
                words += [f"--{part}" for part in filter(None, change.split("+"))]
                last = run_train([config_file(args.config), *words], Path(name), out)[-1]
                losses.append(last["val_loss"])
                seconds.append(last["elapsed"])
            found.append(dict(change=change, val_loss=losses, seconds=seconds))
            rows.append([change.replace("+", ", ") or "unchanged", spread(losses, 4), spread(seconds)])
            print(f"{rows[-1][0]}: {statistics.median(losses):.4f}", file=sys.stderr, flush=True)
    report(args.json, known, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
