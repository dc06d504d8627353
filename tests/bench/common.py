"""Shared by the benchmarks: options, facts about the machine, Markdown tables, JSON files, runs in child processes.

Importing it imports neither torch nor train.py, which keeps the memory of child processes their own.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
NAMES = "n_layer", "n_head", "n_embd", "block_size", "vocab_size"
SIZES = {"tiny": (1, 12, 96, 32, 65), "0.8M": (4, 4, 128, 64, 65), "10.8M": (6, 6, 384, 256, 65),
         "124M": (12, 12, 768, 1024, 50304)}  # NAMES by parameters


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and the default of each option."""


def parser(doc, name, n=3, text=True):
    """An ArgumentParser with the options that the benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    made.add_argument("--n", type=int, default=n, help="runs of each")
    made.add_argument("--json", type=Path, default=Path(f"bench-{name}.json"), help="file to write")
    if text:
        made.add_argument("--text", type=Path, help="a UTF-8 file instead of prepare.py's default corpus")
    return made


# Facts and figures --------

def facts(**more):
    """What a figure is reported with. Call it before measuring: the load is that of other programs."""
    info = Path("/proc/cpuinfo")
    chip = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8") if info.exists() else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(cores=cores, chip=chip[1] if chip else platform.processor(), torch=importlib.metadata.version("torch"),
                date=datetime.date.today().isoformat(), load_before=round(os.getloadavg()[0], 2)) | more


def spread(values, digits=None):
    """The median and, of several values, the range: [1, 2, 4] -> "2.0 (1.0 to 4.0)"; "-" of none."""
    values = [value for value in values if value is not None]
    if not values or isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values)) or "-"
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = digits if digits is not None else 0 if middle >= 100 else 1
    text = f"{middle:,.{digits}f}"
    return text if least == most else f"{text} ({least:,.{digits}f} to {most:,.{digits}f})"


def table(found):
    """A Markdown table of {row: [figures of a run as a dict]}, without the figures that are lists or dicts."""
    columns = dict.fromkeys(key for runs in found.values() for run in runs for key, value in run.items()
                            if not isinstance(value, (list, dict)))
    rows = [[label, *(spread([run.get(key) for run in runs], 4 if "loss" in key else None) for key in columns)]
            for label, runs in found.items()]
    lines = [f"| {' | '.join(row)} |" for row in [["", *columns], *rows]]
    return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])


def report(path, known, found):
    """Print the facts and a table, and write all figures as JSON."""
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known.items()))
    print(table(found))
    path.write_text(json.dumps(dict(facts=known, figures=found), indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def mfu(tokens_per_second, gpu, n_layer, n_head, n_embd, block_size, vocab_size):
    """Percent of the GPU's dense 16-bit FLOPS by its data sheet, or None if it is unknown.

    A token costs three passes over each weight in the matrix products, and PaLM's count for attention.
    """
    flops = 6 * (12 * n_layer * n_embd**2 + vocab_size * n_embd) + 12 * n_layer * n_embd * block_size
    peaks = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "A10": 125,
             "L40S": 362, "L4": 121, "4090": 165, "3090": 71, "V100": 125, "T4": 65}
    peak = next((peak for key, peak in peaks.items() if re.search(rf"\b{key}\b", gpu)), None)
    return peak and 100 * tokens_per_second * flops / (peak * 1e12)


# Child processes ----------

def launch(command, folder, enough=None, timeout=10**6, statuses=(0,), env=()):
    """Run a Python command line in a folder. Exits if the child ends with another status.

    Returns its `lines`, each after its seconds since launch, what it wrote to stderr (`errors`), its `seconds` and its
    peak resident memory in MB (`peak`). The child is terminated when enough() is true after a line.
    """
    began, lines = time.perf_counter(), []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=folder, env=os.environ | dict(env),
                                 stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace",
                                 start_new_session=True)
        timer = threading.Timer(timeout, os.killpg, (child.pid, signal.SIGKILL))  # with its children
        try:
            timer.start()
            for line in child.stdout:
                lines.append((time.perf_counter() - began, line.rstrip("\n")))
                if enough and enough():
                    os.kill(child.pid, signal.SIGTERM)  # child.terminate() would reap it, if it has ended
            _, code, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(code)
        finally:
            timer.cancel()
            if child.returncode is None:  # interrupted
                os.killpg(child.pid, signal.SIGKILL)
        seconds = time.perf_counter() - began
        errors.seek(0)
        text = errors.read()
    if child.returncode not in statuses:
        end = f"ended after {seconds:.0f} s with status {child.returncode}"
        sys.exit(f"{' '.join(map(str, command))}\n{end}:\n{text[-4000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return SimpleNamespace(lines=lines, errors=text, seconds=seconds, peak=peak)


def log_of(folder):
    """The records of a run's log.jsonl, [] if there is none."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_train(argv, folder, out, target=None, processes=0, script=(ROOT / "train.py",), launch=launch):
    """Run train.py, also with torchrun, until a loss below the target. Returns its log, with seconds since launch."""
    def reached():
        return any(record["val_loss"] and record["val_loss"] < target for record in log_of(out)[-1:])

    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    env = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive") if processes else {}
    run = launch([*torchrun, *script, *argv, f"--out_dir={out}"], folder, target and reached, env=env,
                 statuses=(0, 143) if target else (0,))
    # `elapsed` starts when the header of the table is printed, after imports and opening the data
    start = next(seconds for seconds, line in run.lines if line.split()[:2] == ["step", "loss"])
    return [record | dict(seconds=start + record["elapsed"], exit=run.seconds) for record in log_of(out)]


def prepared(folder, text=None):
    """Write folder/data/char/ with prepare.py, from a file or its default corpus. Returns meta.json."""
    launch([ROOT / "prepare.py", *([Path(text).resolve()] if text else []), "--name=char"], folder)
    return json.loads((folder / "data" / "char" / "meta.json").read_text(encoding="utf-8"))


def nanogpt_model(checkout, **config):
    """A GPT of nanoGPT's model.py with these settings."""
    module = runpy.run_path(str(Path(checkout) / "model.py"))
    return module["GPT"](module["GPTConfig"](**config))


def compare(script, options, measure, argv):
    """The command line of a benchmark of two sides. They alternate, in processes that print measure(args, rest)."""
    options.add_argument("--nanogpt", help="a checkout of nanoGPT to compare with")
    options.add_argument("--size", default="10.8M", choices=SIZES, help="of the model, in parameters")
    options.add_argument("--batch", type=int, default=0, help="sequences at once; 0 depends on the size")
    options.add_argument("--device", default="auto", help="as in train.py")
    options.add_argument("--dtype", default="auto", help="as in train.py")
    options.add_argument("--side", choices=("ours", "nanoGPT"), help="measure this side only and print JSON")
    words = sys.argv[1:] if argv is None else argv
    args, extra = options.parse_known_args(words)
    if args.side:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(args, extra)))
        return
    known = facts(n=args.n, settings=" ".join(words))
    found = {side: [] for side in ("nanoGPT", "ours") if args.nanogpt or side == "ours"}
    for _ in range(args.n):
        for side, turns in found.items():
            turns.append(json.loads(launch([script, f"--side={side}", *words], ".").lines[-1][1]))
    report(args.json, known, found)
