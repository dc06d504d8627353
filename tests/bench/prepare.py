"""How fast prepare.py is, how much memory it takes, and how close it comes to tiktoken on every core.

    python tests/bench/prepare.py                               200 MB of Python's reference, three runs each
    python tests/bench/prepare.py --mb=2000 --n=1               the memory that 2 GB take
    python tests/bench/prepare.py --text=input.txt --mb=1 --nanogpt=../nanoGPT

gpt2 is left out where tiktoken has not cached its ranks and cannot fetch them. prepare.py, tiktoken's encoder by itself
and nanoGPT's script take turns; the figures are medians of n, in brackets least to most.
"""
import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, fact_line, facts, spread, summary, table, timed, write

# What one core does with nothing around it: the encoder alone, on a text that is in memory already, in 256 KB pieces.
SINGLE_THREAD = """
import sys, time, tiktoken
encoding = tiktoken.get_encoding(sys.argv[2])
with open(sys.argv[1], encoding="utf-8", newline="") as file:
    pieces = list(iter(lambda: file.read(1 << 18), ""))[:200]
encoding.encode_to_numpy(pieces[0][:1000])
began = time.perf_counter()
for piece in pieces:
    encoding.encode_to_numpy(piece, disallowed_special=())
print(sum(len(piece.encode()) for piece in pieces) / (time.perf_counter() - began))
"""


def repeated(text: bytes, size: int, path: Path):
    """Write text again and again until path has size bytes or a little more."""
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(text)


def rate_alone(path, tokenizer):
    """Bytes a second of tiktoken's encoder by itself, on one thread."""
    return float(subprocess.check_output([sys.executable, "-c", SINGLE_THREAD, path, tokenizer]))


def measured(sides, size, n):
    """Have the sides, {label: a function that returns (seconds, peak MB)}, take n turns. Returns a row for each.

    One that fails is left out, with a line on stderr.
    """
    found = {label: [] for label in sides}
    for _ in range(n):
        for label in list(found):
            try:
                found[label].append(sides[label]())
            except subprocess.CalledProcessError as error:
                print(f"{label}: left out, it ended with status {error.returncode}", file=sys.stderr)
                del found[label]
    return [{"what": label, "seconds": [seconds for seconds, _ in turns], "MB/s": [size / 1e6 / t for t, _ in turns],
             "peak MB": [peak for _, peak in turns]} for label, turns in found.items()]


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 file to repeat (default: Python's pydocs)")
    parser.add_argument("--mb", type=float, default=200, help="size of the text in megabytes (default: 200)")
    parser.add_argument("--n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--tokenizers", default="char,byte,gpt2", help="default: char,byte,gpt2")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to time its prepare.py on the same text")
    parser.add_argument("--json", default="bench-prepare.json", help="file to write (default: bench-prepare.json)")
    args = parser.parse_args(argv)

    if args.text:
        text = args.text.read_bytes()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "text.txt"
        repeated(text, int(args.mb * 1e6), path)
        size = path.stat().st_size
        known = facts(n=args.n, mb=round(size / 1e6, 1))
        for tokenizer in args.tokenizers.split(","):
            command = [ROOT / "prepare.py", "text.txt", f"--tokenizer={tokenizer}"]
            sides[f"prepare.py {tokenizer}"] = lambda command=command: timed(command, folder)
            if tokenizer not in ("char", "byte"):
                sides[f"tiktoken {tokenizer}, one thread"] = lambda t=tokenizer: (size / rate_alone(path, t), None)
        if args.nanogpt:
            theirs = folder / "theirs"
            theirs.mkdir()
            shutil.copy(args.nanogpt / "data" / "shakespeare_char" / "prepare.py", theirs)
            shutil.copy(path, theirs / "input.txt")
            sides["nanoGPT's shakespeare_char"] = lambda: timed([theirs / "prepare.py"], theirs)
        rows = measured(sides, size, args.n)

    lines, single = [["", "MB/s", "peak MB", "of all cores"]], {row["what"]: row["MB/s"] for row in rows}
    for row in rows:
        alone = single.get(row["what"].replace("prepare.py", "tiktoken") + ", one thread")
        if alone:
            row["of all cores"] = statistics.median(row["MB/s"]) / (known["cores"] * statistics.median(alone))
        lines.append([row["what"], spread(row["MB/s"]), spread(row["peak MB"], 0),
                      f"{row['of all cores']:.0%}" if alone else "-"])
        row |= {"MB/s": summary(row["MB/s"]), "peak MB": summary(row["peak MB"])}
    print(fact_line(known))
    print(table(lines))
    write(args.json, dict(facts=known, bytes=size, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
