"""How fast prepare.py is, how much memory it takes, and how close it comes to tiktoken on every core.

    python tests/bench/prepare.py                               200 MB of Python's reference, three runs each
    python tests/bench/prepare.py --mb=2000 --n=1               the memory that 2 GB take
    python tests/bench/prepare.py --text=input.txt --mb=1 --nanogpt=../nanoGPT

gpt2 is left out where tiktoken has not cached its ranks and cannot fetch them. The table's figures are medians.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

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


def timed(command, folder: Path) -> tuple[float, float | None]:
    """Run a command in a folder. Returns its seconds and its peak resident megabytes, None where Python can't say."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, stdout=subprocess.DEVNULL)
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    else:
        child.wait()
        peak = None
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - began, peak


def measure(label: str, command, folder: Path, size: int, n: int) -> dict:
    runs = [timed(command, folder) for _ in range(n)]
    seconds = [run[0] for run in runs]
    peaks = [run[1] for run in runs if run[1] is not None]
    rate = size / 1e6 / statistics.median(seconds)
    return {"what": label, "MB/s": rate, "seconds": seconds, "peak MB": max(peaks) if peaks else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 file to repeat (default: Python's pydocs)")
    parser.add_argument("--mb", type=float, default=200, help="size of the text in megabytes (default: 200)")
    parser.add_argument("--n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--tokenizers", default="char,byte,gpt2", help="default: char,byte,gpt2")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to time its prepare.py on the same text")
    parser.add_argument("--out", type=Path, default=Path("prepare_bench.json"), help="default: prepare_bench.json")
    args = parser.parse_args()

    if args.text:
        text = args.text.read_bytes()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows, single = [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "text.txt"
        repeated(text, int(args.mb * 1e6), path)
        size = path.stat().st_size
        for tokenizer in args.tokenizers.split(","):
            command = [ROOT / "prepare.py", "text.txt", f"--tokenizer={tokenizer}"]
            try:
                row = measure(f"prepare.py {tokenizer}", command, folder, size, args.n)
                if tokenizer not in ("char", "byte"):
                    alone = [sys.executable, "-c", SINGLE_THREAD, path, tokenizer]
                    single = statistics.median(float(subprocess.check_output(alone)) / 1e6 for _ in range(args.n))
                    rows.append({"what": f"tiktoken {tokenizer}, one thread", "MB/s": single, "peak MB": None})
                    row["of all cores"] = row["MB/s"] / (cores * single)
                rows.append(row)
            except subprocess.CalledProcessError as error:
                print(f"{tokenizer}: left out, it ended with status {error.returncode}", file=sys.stderr)
            shutil.rmtree(folder / "data", ignore_errors=True)
        if args.nanogpt:
            theirs = folder / "theirs"
            theirs.mkdir()
            shutil.copy(args.nanogpt / "data" / "shakespeare_char" / "prepare.py", theirs)
            shutil.copy(path, theirs / "input.txt")
            rows.append(measure("nanoGPT's shakespeare_char", [theirs / "prepare.py"], theirs, size, args.n))

    machine = f"{platform.machine()}, {cores} cores, Python {platform.python_version()}"
    print(f"\n{size / 1e6:,.1f} MB, n = {args.n}, {machine}\n")
    print(f"{'':<32}{'MB/s':>8}{'peak MB':>10}{'of all cores':>14}")
    for row in rows:
        peak = f"{row['peak MB']:.0f}" if row["peak MB"] else "-"
        share = f"{row['of all cores']:.0%}" if "of all cores" in row else "-"
        print(f"{row['what']:<32}{row['MB/s']:>8.1f}{peak:>10}{share:>14}")
    report = {"machine": machine, "bytes": size, "n": args.n, "rows": rows}
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
