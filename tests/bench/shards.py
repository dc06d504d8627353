"""What a large dataset costs train.py: a million tokens in one file against ten billion in a hundred shards.

    python tests/bench/shards.py                        three runs of each, alternating, after one that warms the cache
    python tests/bench/shards.py --shards=10 --n=1 --json=bench-shards.json

The shards are holes in files, which take no room on the disk; needs a file system that has them. A hole is read as
fast as memory once the system's cache has it, so this shows what train.py adds, not what a disk does.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import ROOT, facts, log_of, report, spread, timed

TINY = ("--ngram=1 --n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --max_iters=100 "
        "--eval_interval=100 --log_interval=1 --eval_iters=1 --save_interval_minutes=0 --device=cpu --dtype=float32 "
        "--compile=False").split()


def make_dataset(folder: Path, shards: int, tokens: int):
    """A dataset of holes: so many training shards of so many tokens each, or one train.bin as prepare.py makes it."""
    folder.mkdir(parents=True)
    names = ["train.bin"] if shards == 1 else [f"train_{i:06d}.bin" for i in range(shards)]
    files = {"train": [{"name": name, "offset": 0, "tokens": tokens} for name in names],
             "val": [{"name": "val.bin", "offset": 0, "tokens": 100_000}]}
    for shard in files["train"] + files["val"]:
        with open(folder / shard["name"], "wb") as file:
            file.truncate(2 * shard["tokens"])
    counts = {"train": shards * tokens, "val": 100_000}
    meta = {"format": 1, "corpus": "holes", "tokenizer": {"kind": "byte"}, "vocab_size": 257, "dtype": "uint16",
            "tokens": counts, "bytes": counts, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def measure(folder: Path, dataset: str) -> dict:
    """One run of train.py in a fresh process."""
    _, peak = timed([ROOT / "train.py", *TINY, f"--dataset={dataset}"], folder)
    log = log_of(folder / "out")
    times = [line["elapsed"] for line in log]
    step = (times[-2] - times[9]) / (len(times) - 11)  # without the first ten, and the last, which evaluates and saves
    return {"peak MB": peak, "first step, s": times[0], "ms per step": 1000 * step}


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100, help="of the large dataset (default: 100)")
    parser.add_argument("--tokens", type=int, default=10**8, help="in each of its shards (default: 100000000)")
    parser.add_argument("--n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--json", type=Path, default=Path("bench-shards.json"), help="default: bench-shards.json")
    args = parser.parse_args(argv)

    known = facts(n=args.n)
    sizes = {"small": (1, 10**6), "large": (args.shards, args.tokens)}
    runs = {name: [] for name in sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dataset, (shards, tokens) in sizes.items():
            make_dataset(folder / "data" / dataset, shards, tokens)
            measure(folder, dataset)
        for _ in range(args.n):
            for dataset in sizes:
                runs[dataset].append(measure(folder, dataset))

    rows = [["training tokens", "shards", *runs["small"][0]]]
    for dataset, (shards, tokens) in sizes.items():
        rows.append([f"{shards * tokens:,}", shards,
                     *(spread([run[key] for run in runs[dataset]]) for key in runs[dataset][0])])
    report(args.json, known, rows, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
