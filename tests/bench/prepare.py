"""How fast prepare.py is and how much memory it takes.

    python tests/bench/prepare.py                               200 MB of Python's reference, three runs each
    python tests/bench/prepare.py --mb=2000 --n=1               the memory that 2 GB take
    python tests/bench/prepare.py --text=input.txt --mb=1 --nanogpt=../nanoGPT

Medians of n runs, in brackets the range; with --nanogpt, its data/shakespeare_char/prepare.py on the same text.
"""
import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from common import ROOT, facts, report, spread, timed


def repeated(text: bytes, size: int, path: Path):
    """Write text again and again until path has size bytes or a little more."""
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(text)


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
        if args.nanogpt:
            theirs = folder / "theirs"
            theirs.mkdir()
            shutil.copy(args.nanogpt / "data" / "shakespeare_char" / "prepare.py", theirs)
            shutil.copy(path, theirs / "input.txt")
            sides["nanoGPT's shakespeare_char"] = lambda: timed([theirs / "prepare.py"], theirs)
        found = {label: [side() for _ in range(args.n)] for label, side in sides.items()}
    rows = [["", "MB/s", "peak MB"]]
    for label, turns in found.items():
        rows.append([label, spread([size / 1e6 / seconds for seconds, _ in turns]), spread([mb for _, mb in turns], 0)])
    report(args.json, known, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
