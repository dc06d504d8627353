"""The best validation loss of a config over several seeds, and how long a target takes: steps, and seconds of a run.

    python tests/bench/char_loss.py                                      config/train_char.py, five seeds
    python tests/bench/char_loss.py --text=input.txt --seeds=3 --n_layer=8 --max_iters=1500
    python tests/bench/char_loss.py --data=data/char --config=config/train_char_cpu.py --target=1.7

Every loss is over the whole validation split, as train.py logs it; the target is passed at the first evaluation below
it. Its seconds are those of the log, from launch, imports, compilation and evaluations included; "less start" leaves
out what came before the first step, which is imports, data and compilation. Words that are not flags of this script
are train.py's settings; they come after the config file, and the seed after them all. The seeds run one by one.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, config_file, fact_line, facts, launch, log_of, prepared, size_of, spread, summary, table, write


def start_of(records, tokens_per_step):
    """Seconds from launch to the first step, from the first log line: its end less its steps. None where unknowable."""
    first = next((r for r in records if r["step"]), None)
    if first is None or first["val_loss"] is not None or not first["tokens_per_second"]:
        return None  # with an evaluation in it, or compilation of one, the line's end says too little
    return max(0.0, first["elapsed"] - first["step"] * tokens_per_step / first["tokens_per_second"])


def row_of(records, target, tokens_per_step):
    """What one run's log says: the best loss and its step, and when the target was passed."""
    found = [r for r in records if r["step"] and r["val_loss"] is not None]
    best = min(found, key=lambda r: r["val_loss"])
    passed = next((r for r in found if r["val_loss"] < target), None)
    start = start_of(records, tokens_per_step)
    return dict(best=best["val_loss"], step=best["step"], last=found[-1]["val_loss"], elapsed=records[-1]["elapsed"],
                start=start, step_to_target=passed and passed["step"], seconds_to_target=passed and passed["elapsed"],
                less_start=passed and start is not None and passed["elapsed"] - start or None,
                curve=[dict(step=r["step"], seconds=r["elapsed"], tokens=r["step"] * tokens_per_step,
                            val_loss=r["val_loss"]) for r in found])


def shown(rows, target):
    """The rows of the table: each seed's, then all together."""
    keys = ("step_to_target", 0), ("seconds_to_target", 1), ("less_start", 1), ("elapsed", 1)
    lines = [["seed", "best val loss", "at step", f"steps to {target:g}", "seconds to it", "less start", "run, s"]]
    for row in rows:
        lines.append([str(row["seed"]), f"{row['best']:.4f}", row["step"], *(spread([row[key]], d) for key, d in keys)])
    losses, passed = [row["best"] for row in rows], sum(row["step_to_target"] is not None for row in rows)
    mean = f"{statistics.mean(losses):.4f}"
    if len(rows) > 1:
        mean += f" ± {statistics.stdev(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
    cells = [spread([row[key] for row in rows], digits) for key, digits in keys]
    if passed < len(rows):
        cells[0] += f", {passed} of {len(rows)}"
    return [*lines, ["mean, then medians", mean, spread([row["step"] for row in rows], 0), *cells]]


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", default="config/train_char.py", help="of train.py (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --first on (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1337, help="the first seed (default: %(default)s)")
    parser.add_argument("--target", type=float, default=1.4697, help="validation loss in nats (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help="a UTF-8 file (default: what prepare.py fetches)")
    source.add_argument("--data", type=Path, help="a folder that prepare.py wrote, instead")
    parser.add_argument("--json", default="bench-char-loss.json", help="file to write (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    sys.path.insert(0, str(ROOT))
    known = facts(config=args.config, seeds=args.seeds)
    import torch

    import train

    words = [config_file(args.config), *(config_file(word) if word.endswith(".py") else word for word in extra)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.data:
            prepared(folder, args.text)
        data, rows = args.data.resolve() if args.data else folder / "data" / "char", []
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
        s, tokens, parameters = size_of(words, meta["vocab_size"])
        device = train.join_world(s).device
        known |= dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                      threads=torch.get_num_threads(), corpus=meta["corpus"], parameters=parameters,
                      settings=" ".join(extra) or "the config's")
        for seed in range(args.first, args.first + args.seeds):
            out = folder / f"out-{seed}"
            launch([ROOT / "train.py", *words, f"--dataset={data}", f"--seed={seed}", f"--out_dir={out}"], folder)
            rows.append(dict(seed=seed) | row_of(log_of(out), args.target, tokens))
            print(f"seed {seed}: {rows[-1]['best']:.4f} at step {rows[-1]['step']}", file=sys.stderr, flush=True)
    print(fact_line(known))
    print(table(shown(rows, args.target)))
    losses = [row["best"] for row in rows]
    write(args.json, dict(facts=known, target=args.target, rows=rows, best=summary(losses) | dict(
        mean=statistics.mean(losses), deviation=statistics.stdev(losses) if len(losses) > 1 else None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
