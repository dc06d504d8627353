"""What the benchmarks share: a machine's facts, medians with their spread, tables, JSON files, runs in other processes.

Importing it imports neither torch nor train.py, so that what a child process weighs is its own.
"""
import collections
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chip():
    """The processor's name, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts(**more):
    """What a figure needs beside it. Called before measuring, because the load is that of the machine without us."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return dict(cores=cores(), chip=chip(), torch=torch, python=platform.python_version(),
                date=datetime.date.today().isoformat(), load_before=load) | more


def fact_line(found):
    """facts() in one line: {"n": 3, "load_before": 0.1} -> "n 3, load before 0.1"."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items())


def spread(values, digits=1):
    """The median and, of several values, the least and most: [1, 2, 4] -> "2.0 (1.0 to 4.0)"; "-" of none."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    middle, least, most = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def summary(values):
    """The same as a dict for JSON, with every value; None of none."""
    values = [value for value in values if value is not None]
    return dict(median=statistics.median(values), least=min(values), most=max(values), all=values) if values else None


def table(rows):
    """Rows of words, the first being the heads, as aligned lines: the first column to the left, the rest to the right.

    >>> print(table([["", "MB/s"], ["prepare.py", 163]]))
                MB/s
    prepare.py   163
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write(path, figures):
    """Write figures as JSON and say where."""
    Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def timed(command, folder):
    """Run a Python command line in a folder. Returns its seconds and peak resident MB, None where Python can't say."""
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

    A child for which enough() turns true after a line is told to stop. Ends the program where one fails.
    """
    began, lines, stopped = time.perf_counter(), [], False
    child = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=folder, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    last = collections.deque(maxlen=20)
    try:
        for line in child.stdout:
            lines.append((time.perf_counter() - began, line.rstrip("\n")))
            last.append(line)
            if enough and not stopped and enough():
                child.terminate()
                stopped = True
        status = child.wait()
    finally:
        if child.poll() is None:  # this program was interrupted
            child.kill()
    if status and not stopped:
        sys.exit(f"{' '.join(map(str, command))}\nended with status {status}:\n{''.join(last)}")
    return lines, time.perf_counter() - began


def prepared(folder, text=None):
    """Have prepare.py write folder/data/char/, of a file or of its own corpus. Returns what its meta.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    launch([ROOT / "prepare.py", *([Path(text).resolve()] if text else []), "--name=char"], folder)
    return json.loads((folder / "data" / "char" / "meta.json").read_text(encoding="utf-8"))


def config_file(word):
    """The whole path of a config file, named from here or from the repository."""
    return str(Path(word).resolve() if Path(word).is_file() else ROOT / word)


def size_of(argv, vocab):
    """The Settings of a run of train.py, its tokens a step and its model's parameters."""
    import train

    s = train.override(train.Settings(), argv)
    s.vocab_size = s.vocab_size or vocab
    with train.torch.device("meta"):  # counted without being drawn
        model = train.GPT(s)
    return s, s.batch_size * s.gradient_accumulation_steps * s.block_size, sum(p.numel() for p in model.parameters())


def log_of(folder):
    """The lines of a run's log.jsonl as dicts; of none, no lines."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def nanogpt_model(checkout):
    """The module model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
