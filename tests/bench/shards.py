"""What a large dataset costs train.py: a million tokens in one file against ten billion in a hundred shards.

    python tests/bench/shards.py                three runs of each, alternating, after one that warms the cache

The shards are holes in files, which take no room on the disk; needs a file system that has them. A hole is read as
fast as memory once the system's cache has it, so this shows what train.py adds, not what a disk does.
"""
import json
import tempfile
from pathlib import Path

from common import ROOT, facts, launch, log_of, parser, report

TINY = ("--ngram=1 --n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --max_iters=100 "
        "--eval_interval=100 --log_interval=1 --eval_iters=1 --save_interval_minutes=0 --device=cpu --dtype=float32 "
        "--compile=False").split()


def make_dataset(folder, shards, tokens):
    """A dataset of holes: so many training shards of so many tokens each."""
    folder.mkdir(parents=True)
    files = {split: [dict(name=f"{split}_{i:06d}.bin", offset=0, tokens=size) for i in range(count)]
             for split, count, size in (("train", shards, tokens), ("val", 1, 100_000))}
    for shard in files["train"] + files["val"]:
        with open(folder / shard["name"], "wb") as file:
            file.truncate(2 * shard["tokens"])
    counts = dict(train=shards * tokens, val=100_000)
    meta = dict(format=1, corpus="holes", tokenizer=dict(kind="byte"), vocab_size=257, dtype="uint16", tokens=counts,
                bytes=counts, files=files)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def measure(folder, dataset):
    """One run of train.py in a fresh process."""
    peak = launch([ROOT / "train.py", *TINY, f"--dataset={dataset}"], folder).peak
    times = [line["elapsed"] for line in log_of(folder / "out")]
    step = (times[-2] - times[9]) / (len(times) - 11)  # without the first ten, and the last, which evaluates and saves
    return {"peak MB": peak, "first step, s": times[0], "ms per step": 1000 * step}


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "shards", text=False)
    options.add_argument("--shards", type=int, default=100, help="of the large dataset")
    options.add_argument("--tokens", type=int, default=10**8, help="in each of its shards")
    args = options.parse_args(argv)
    known = facts(n=args.n, shards=args.shards, tokens=args.tokens)
    sizes, found = dict(small=(1, 10**6), large=(args.shards, args.tokens)), {}
    with tempfile.TemporaryDirectory() as name:
        for dataset, size in sizes.items():
            make_dataset(Path(name, "data", dataset), *size)
        for turn in range(args.n + 1):
            for dataset in sizes:
                figures = measure(Path(name), dataset)
                found[dataset] = found[dataset] + [figures] if turn else []  # the first warms the cache
    report(args.json, known, found)


if __name__ == "__main__":
    main()
