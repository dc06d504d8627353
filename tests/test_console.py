"""What train.py shows while it runs, and what it hands to TensorBoard and Weights & Biases."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent


class Terminal:
    """Stands in for standard output: notes what is written, and says that it is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def on_a_terminal(monkeypatch, *argv, **environment):
    """What train.py shows there."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for key, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(key, value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen := Terminal())
        assert train.main(argv) == 0
    return screen.text


# ----------------------------------------------------------------------------------------------------------------------
# The console


def test_a_run_in_eighty_columns_says_what_it_is_and_nothing_else(project):
    out, error = project.train("--max_iters=20")
    assert error == ""
    assert max(map(len, out.splitlines())) <= 80
    header, table = out.split("    step")
    for words in (r"corpus +tiny: [\d,]+ training and [\d,]+ validation tokens",
                  r"model +[\d,]+ parameters: .* attention",
                  r"hardware +cpu, float32, 1 process", r"work +20 steps of 64 tokens", r"time +about \d+:\d\d in all"):
        assert re.search(words, " ".join(header.split())), words
    rows = table.splitlines()[1:-2]
    assert [int(row.split()[0]) for row in rows] == [5, 10, 15, 20]
    assert len({len(row) for row in rows}) == 1 == len({len(table.splitlines()[0]) + len("    step")} | {len(rows[0])})
    assert [len(row.split()) for row in rows] == [7, 8, 7, 8], "a validation loss only where one was taken"
    best, hear = table.splitlines()[-2:]
    loss = min(line["val_loss"] for line in project.log() if line["val_loss"])
    assert f"{loss:.4f}" in best and str(Path("out/best.pt")) in best and "python sample.py" in hear


def test_the_best_loss_stands_out_on_a_terminal_alone(project, monkeypatch):
    shown = on_a_terminal(monkeypatch, *project.tiny, "--max_iters=10")
    loss = project.log()[-1]["val_loss"]
    assert f"\x1b[1m{loss:8.4f}\x1b[0m" in shown
    plain = on_a_terminal(monkeypatch, *project.tiny, "--max_iters=10", NO_COLOR="1")
    assert "\x1b" not in plain and f"{loss:8.4f}" in plain
    assert "\x1b" not in on_a_terminal(monkeypatch, *project.tiny, "--max_iters=10", TERM="dumb")


def test_a_long_evaluation_shows_how_far_it_is(project, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    shown = on_a_terminal(monkeypatch, *project.tiny, "--eval_only", "--batch_size=1")
    bars = [int(percent) for percent in re.findall(r"\revaluating \[#* *\] +(\d+)%", shown)]
    assert len(bars) > 3 and bars == sorted(bars)
    assert shown.split("\r")[-1].startswith("validation loss"), "wiped out at its end"


@pytest.mark.parametrize("seconds, shown", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_times_are_shown_as_a_clock_shows_them(seconds, shown):
    assert train.clock(seconds) == shown


# ----------------------------------------------------------------------------------------------------------------------
# Trackers


def scalars(folder):
    """{tag: {step: value}} of a folder of TensorBoard, as its own reader sees it."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert "settings/text_summary" in events.Tags()["tensors"]
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(set(steps)) == len(steps), "a step was logged twice"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def check_numbers(found, log):
    """The tracker's numbers are the log's."""
    for line in log:
        for key in line.keys() - {"step"}:
            if line[key] is None:
                assert line["step"] not in found.get(key, {})
            else:
                assert found[key][line["step"]] == pytest.approx(line[key], rel=1e-6), (key, line["step"])
    assert set(found["loss"]) == {line["step"] for line in log}


def test_tensorboard_has_the_numbers_of_the_log_and_goes_on_with_the_run(project):
    project.train("--tensorboard", "--max_iters=10")
    check_numbers(scalars("out/tensorboard"), project.log(timings=True))
    project.train("--init_from=resume", "--max_iters=20", "--log_interval=5")
    check_numbers(scalars("out/tensorboard"), log := project.log(timings=True))
    assert log[-1]["step"] == 20


def offline_records(path):
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the next block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        parts, at = parts + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_a_new_run_begins_a_curve_of_its_own(project):
    project.train("--tensorboard", "--max_iters=20")
    project.train("--tensorboard", "--max_iters=10")
    assert set(scalars("out/tensorboard")["loss"]) == {5, 10}
    assert set(scalars("out/previous/tensorboard")["loss"]) == {5, 10, 15, 20}


@pytest.mark.slow
def test_wandb_has_the_numbers_of_the_log_and_goes_on_with_the_run(project):
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    for extra in (["--max_iters=10"], ["--init_from=resume", "--max_iters=20"]):
        done = subprocess.run([sys.executable, ROOT / "train.py", *project.tiny, "--wandb", *extra], env=environment,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert re.search(r"wandb +out\S+", done.stdout)
    runs = sorted(Path("out/wandb").glob("offline-run-*"))
    identity = Path("out/wandb-id.txt").read_text()
    assert len(runs) == 2 and all(run.name.endswith(identity) for run in runs), "one run in two parts"
    records = [record for run in runs for record in offline_records(next(run.glob("*.wandb")))]
    history = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in records]
    assert ("n_embd", "32") in {(c.key, c.value_json) for r in records for c in r.run.config.update}
    found = {}
    for row in (row for row in history if "loss" in row):
        for key, value in row.items():
            found.setdefault(key, {})[row["_step"]] = value
    check_numbers(found, project.log(timings=True))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(project, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    error = project.refuse(f"--{package}")
    assert f"pip install {package}" in error


def test_wandb_without_a_login_is_one_line(project):
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {
        "HOME": str(project.path), "NETRC": str(project.path / "none"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *project.tiny, "--wandb"], env=environment, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "WANDB_MODE=offline" in done.stderr, done.stderr
