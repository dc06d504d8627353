"""The best validation loss of a config over several seeds, and the steps and seconds to a target.

    python tests/bench/char_loss.py                                      config/train_char.py, five seeds
    python tests/bench/char_loss.py --text=input.txt --seeds=3 --n_layer=8 --max_iters=1500
    python tests/bench/char_loss.py --data=data/char --config=config/train_char_cpu.py --target=1.7

Losses are over the whole validation split; the target is passed at the first evaluation below it. Seconds are measured
from launch, imports, compilation and evaluations included; "less start" is without imports and opening the data.
Arguments that are not flags of this script are those of train.py, after the config file. The seeds run one by one.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import (
    ROOT,
    config_file,
    curve_of,
    fact_line,
    facts,
    prepared,
    run_train,
    size_of,
    spread,
    summary,
    table,
    write,
)


def row_of(records, target, tokens_per_step):
    """The best loss of a run and its step, and when the target was passed."""
    found = [r for r in records if r["step"] and r["val_loss"] is not None]
    best = min(found, key=lambda r: r["val_loss"])
    passed = next((r for r in found if r["val_loss"] < target), None)
    return dict(best=best["val_loss"], step=best["step"], last=found[-1]["val_loss"], seconds=records[-1]["seconds"],
                step_to_target=passed and passed["step"], seconds_to_target=passed and passed["seconds"],
                less_start=passed and passed["elapsed"], curve=curve_of(records, tokens_per_step))


def shown(rows, target):
    """The rows of the table: each seed's, then all together."""
    keys = ("step_to_target", 0), ("seconds_to_target", 1), ("less_start", 1), ("seconds", 1)
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
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1337, help="the first seed (default: %(default)s)")
    parser.add_argument("--target", type=float, default=1.4697, help="validation loss in nats (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help="a UTF-8 file (default: prepare.py's)")
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
        device = train.get_device(s.device)
        known |= dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                      threads=torch.get_num_threads(), corpus=meta["corpus"], parameters=parameters,
                      settings=" ".join(extra) or "the config's")
        for seed in range(args.first, args.first + args.seeds):
            records = run_train([*words, f"--dataset={data}", f"--seed={seed}"], folder, folder / f"out-{seed}")
            rows.append(dict(seed=seed) | row_of(records, args.target, tokens))
            print(f"seed {seed}: {rows[-1]['best']:.4f} at step {rows[-1]['step']}", file=sys.stderr, flush=True)
    print(fact_line(known))
    print(table(shown(rows, args.target)))
    losses = [row["best"] for row in rows]
    write(args.json, dict(facts=known, target=args.target, rows=rows, best=summary(losses) | dict(
        mean=statistics.mean(losses), deviation=statistics.stdev(losses) if len(losses) > 1 else None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
