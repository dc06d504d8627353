"""What each part brings: the loss and the time of a config's run with one setting changed at a time.

    python tests/bench/ablations.py                                     config/train_char_cpu.py, half its steps
    python tests/bench/ablations.py --changes="dropout=0.1,n_head=8"    others than the usual ones
    python tests/bench/ablations.py --config=config/train_char_cpu.py --flags="--max_iters=1000"

A change of several settings has + between them. Loss: over the whole validation split, at the run's end. Seconds: of
the run's updates and evaluations, the start left out. Runs follow one another, each n times with another seed.
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, config_file, fact_line, facts, launch, log_of, prepared, spread, table, write

CHANGES = ("ngram=1,ngram=1+learning_rate=0.01,ngram=3,ngram_rows=8192,optimizer=adamw,learning_rate=0.01,"
           "learning_rate=0.0025,schedule=cosine,qk_norm=False,zero_init=False,activation=gelu,norm=layernorm,"
           "position=learned,tied_head=True,weight_decay=0.0")


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/train_char_cpu.py", help="of train.py (default: %(default)s)")
    parser.add_argument("--flags", default="--max_iters=500", help="more words for all runs (default: %(default)s)")
    parser.add_argument("--changes", default=CHANGES, help="with commas between them (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: what prepare.py fetches)")
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
                words = [*args.flags.split(), "--eval_interval=1000000", f"--seed={1337 + run}", f"--out_dir={out}"]
                words += [f"--{part}" for part in filter(None, change.split("+"))]
                launch([ROOT / "train.py", config_file(args.config), *words], Path(name))
                lines = log_of(out)
                losses.append(lines[-1]["val_loss"])
                first, last = lines[0], lines[-1]  # up to the first line, the start is in it
                seconds.append((last["elapsed"] - first["elapsed"]) * last["step"] / (last["step"] - first["step"]))
            found.append(dict(change=change, val_loss=losses, seconds=seconds))
            rows.append([change.replace("+", ", ") or "as it is", spread(losses, 4), spread(seconds)])
            print(f"{rows[-1][0]}: {statistics.median(losses):.4f}", file=sys.stderr, flush=True)
    print(fact_line(known))
    print(table(rows))
    write(args.json, dict(facts=known, runs=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
