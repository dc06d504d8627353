"""Shared by the benchmarks: facts about the machine, medians and ranges, tables, JSON files, runs in child processes.

Importing it imports neither torch nor train.py, which keeps the memory of child processes their own.
"""
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # n_layer, n_head, n_embd, block_size, vocab_size
    "0.8M": (4, 4, 128, 64, 65), "10.8M": (6, 6, 384, 256, 65), "124M": (12, 12, 768, 1024, 50304),
}
NAMES = "n_layer", "n_head", "n_embd", "block_size", "vocab_size"


def chip():
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts(**more):
    """What a figure is reported with. Call it before measuring: the load is that of other programs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return dict(cores=cores, chip=chip(), torch=importlib.metadata.version("torch"),
                date=datetime.date.today().isoformat(), load_before=load) | more


def spread(values, digits=1):
    """The median and, of several values, the range: [1, 2, 4] -> "2.0 (1.0 to 4.0)"; "-" of none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    middle, least, most = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def table(rows):
    """Align rows, the first being the header: the first column to the left, the rest to the right.

    >>> print(table([["", "MB/s"], ["prepare.py", 163]]))
                MB/s
    prepare.py   163
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def report(path, known, rows, figures):
    """Print the facts and a table, and write all figures as JSON."""
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known.items()))
    print(table(rows))
    Path(path).write_text(json.dumps(dict(facts=known, figures=figures), indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def timed(command, folder):
    """Run a Python command line in a folder. Returns its seconds and peak resident MB, None where unknown."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, stdout=subprocess.DEVNULL)
    peak = None
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    if child.wait():
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.perf_counter() - began, peak


def launch(command, folder, enough=None):
    """Run a Python command line in a folder. Returns its lines, each after its seconds since launch, and its seconds.

    The child is terminated when enough() is true after a line. Exits if the child fails.
    """
    began, lines, stopped = time.perf_counter(), [], False
    with subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace") as child:
        for line in child.stdout:
            lines.append((time.perf_counter() - began, line.rstrip("\n")))
            if enough and not stopped and enough():
                child.terminate()
                stopped = True
    if child.returncode and not stopped:
        last = "\n".join(line for _, line in lines[-20:])
        sys.exit(f"{' '.join(map(str, command))}\nended with status {child.returncode}:\n{last}")
    return lines, time.perf_counter() - began


def log_of(folder):
    """The records of a run's log.jsonl, [] if there is none."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_train(argv, folder, out, enough=None):
    """Run train.py as launch() does. Returns the records of its log, each with its `seconds` since launch.

    `elapsed` in the log starts when the header of the table is printed, after imports and opening the data.
    """
    lines, _ = launch([ROOT / "train.py", *argv, f"--out_dir={out}"], folder, enough)
    start = next(seconds for seconds, line in lines if line.split()[:2] == ["step", "loss"])
    return [record | dict(seconds=start + record["elapsed"]) for record in log_of(out)]


def prepared(folder, text=None):
    """Write folder/data/char/ with prepare.py, from a file or its default corpus. Returns meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    launch([ROOT / "prepare.py", *([Path(text).resolve()] if text else []), "--name=char"], folder)
    return json.loads((folder / "data" / "char" / "meta.json").read_text(encoding="utf-8"))


def config_file(word):
    """The absolute path of a config file, relative to the current folder or to the repository."""
    return str(Path(word).resolve() if Path(word).is_file() else ROOT / word)


def flops_per_token(n_layer, n_head, n_embd, block_size, vocab_size):
    """Floating point operations of a training step per token: three passes over each weight, and PaLM's attention."""
    return 6 * (12 * n_layer * n_embd**2 + vocab_size * n_embd) + 12 * n_layer * n_embd * block_size


def peak_flops(name):
    """Dense 16-bit operations per second of a GPU by its data sheet, or None if it is unknown."""
    peaks = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
             "A10": 125e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12,
             "MI300X": 1307e12}
    return next((peak for key, peak in peaks.items() if re.search(rf"\b{key}\b", name)), None)


def nanogpt_model(checkout):
    """The module model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
