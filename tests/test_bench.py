"""The benchmarks start, and read logs rightly. What they measure is nobody's test: no time is asserted here."""
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

BENCH = ROOT / "tests" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.name != "common.py")
# A checkout as char_cpu.py needs it, of a model that is a table: all that nanoGPT's has of its own is its interface.
MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 4
    vocab_size: int = 8

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
TRAIN = """
import sys, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=int(sys.argv[1])))
torch.nn.init.zeros_(model.table.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for i in range(5):
    x = torch.zeros(1, 4, dtype=torch.long)
    model(x, x)[1].backward()
    optimizer.step()
    print(f"iter {i}: loss 1.0, time 1.00ms, mfu 0.00%")
"""


def bench(name, monkeypatch):
    """A benchmark as a module. Its folder comes last on the path: sample.py and prepare.py stay the repository's."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def common(monkeypatch):
    return bench("common", monkeypatch)


@pytest.fixture
def char_cpu(monkeypatch):
    return bench("char_cpu", monkeypatch)


@pytest.fixture
def char_loss(monkeypatch):
    return bench("char_loss", monkeypatch)


@pytest.fixture
def step(monkeypatch):
    return bench("step", monkeypatch)


def curve(*points):
    return [dict(step=step, seconds=seconds, val_loss=loss) for step, seconds, loss in points]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_explains_itself(name):
    done = subprocess.run([sys.executable, BENCH / name, "--help"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout and f"python tests/bench/{name}" in done.stdout


def test_spread_and_table(common):
    assert common.spread([4, 1, 2]) == "2.0 (1.0 to 4.0)"
    assert common.spread([1234.5], 0) == "1,234" and common.spread([None]) == "-"
    assert common.summary([3, None, 1]) == dict(median=2, least=1, most=3, all=[3, 1]) and common.summary([]) is None
    assert common.table([["", "MB/s"], ["prepare.py", 163]]) == "            MB/s\nprepare.py   163"


def test_facts_hold_what_a_figure_needs(common):
    found = common.facts(n=3)
    assert {"cores", "chip", "torch", "python", "date", "load_before", "n"} == found.keys()
    assert common.fact_line(dict(load_before=0.1, n=3)) == "load before 0.1, n 3"


def test_a_launched_command_is_stopped_once_it_has_said_enough(common, tmp_path):
    lines, seconds = common.launch(["-c", "print('a'); print('b')"], tmp_path)
    assert [line for _, line in lines] == ["a", "b"] and 0 < lines[0][0] <= lines[1][0] <= seconds
    lines, _ = common.launch(["-c", "import time; print('a'); time.sleep(60)"], tmp_path, enough=lambda: True)
    assert [line for _, line in lines] == ["a"]
    with pytest.raises(SystemExit, match="status 3:\nwhy"):
        common.launch(["-c", "print('why'); raise SystemExit(3)"], tmp_path)


def test_passing_is_the_first_evaluation_below_the_target_or_interpolated(char_cpu):
    found = curve((50, 10, 2.4), (100, 20, 2.0), (150, 30, 1.6), (200, 40, 1.9), (250, 50, 1.5))
    assert char_cpu.passing(found, 1.88) == (30, 150)
    assert char_cpu.passing(found, 1.8, interpolate=True) == pytest.approx((25, 125))
    assert char_cpu.passing(found, 2.5) == char_cpu.passing(found, 2.5, interpolate=True) == (10, 50)
    assert char_cpu.passing(found, 1.5) is None and char_cpu.passing([], 1.5) is None  # equal is not below
    assert char_cpu.at(found, 39.9)["step"] == 150 and char_cpu.at(found, 9) is None


def test_both_sides_logs_are_read(char_cpu):
    lines = [(3.0, "step 0: train loss 4.2, val loss 4.3"), (3.5, "iter 0: loss 4.2, time 500.00ms, mfu -100.00%"),
             (4.0, "iter 1: loss 4.1, time 5.00ms, mfu 0.01%"), (4.1, "step 2: train loss 4.0, val loss 4.1")]
    assert char_cpu.their_seconds(lines) == {1: 3.5, 2: 4.0}
    assert [line[:6] for line in char_cpu.their_estimates(lines)] == ["step 0", "step 2"]
    records = [dict(step=5, val_loss=None, elapsed=1.0), dict(step=10, val_loss=2.5, elapsed=2.0),
               dict(step=20, val_loss=2.0, elapsed=3.0)]
    lines = [(0.9, "model      803,072 parameters"), (1.1, "       5  3.0000"), (2.1, "      10  2.6000  2.5000")]
    assert char_cpu.our_curve(records, lines, 7) == [
        dict(step=10, seconds=2.1, tokens=70, val_loss=2.5), dict(step=20, seconds=3.0, tokens=140, val_loss=2.0)]


def test_the_table_says_never_and_how_much_sooner_at_least(char_cpu):
    theirs = dict(side="nanoGPT", parameters=4, seconds=[60.0, 62.0], passed=[None, None], end=[1.9, 1.9])
    ours = dict(side="train.py", parameters=3, sprint_parameters=2, passed=[(30.0, 300), (32.0, 300)], end=[1.7, None])
    heads, first, second = char_cpu.shown(theirs, ours, 1.88)
    assert heads[2] == "seconds to 1.88" and "61.0 s" in heads[-1]
    assert first[2] == "never" and first[4] == "-"
    assert second[1] == "2 then 3" and second[2].startswith("31.0 (30.0") and second[4] == "more than 1.97 x"
    theirs["passed"] = [(59.0, 1900), None]
    assert char_cpu.shown(theirs, ours, 1.88)[1][2] == "59.0, 1 of 2 runs"
    assert char_cpu.shown(theirs, ours, 1.88)[2][4] == "1.90 x"


def test_copies_of_another_trainers_weights_are_evaluated_over_the_whole_split(char_cpu, common, project):
    folder, checkout, copies = project.path / "data" / "tiny", project.path / "other", project.path / "copies"
    vocab = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    checkout.mkdir()
    copies.mkdir()
    (checkout / "model.py").write_text(MODEL, encoding="utf-8")
    (checkout / "train.py").write_text(TRAIN, encoding="utf-8")
    lines, _ = common.launch(["-c", char_cpu.COPYING, copies, 2, "train.py", vocab], checkout)
    assert list(char_cpu.their_seconds(lines)) == [1, 2, 3, 4, 5]
    losses, parameters = char_cpu.evaluated(copies, checkout, folder, vocab)
    assert list(losses) == [2, 4, 5] and parameters == vocab**2
    import numpy as np
    import torch
    table = torch.load(copies / "5.pt", weights_only=True)["model"]["table.weight"].double()
    ids = torch.from_numpy(np.fromfile(folder / "val.bin", np.uint8).astype(np.int64))
    assert losses[5] == pytest.approx(torch.nn.functional.cross_entropy(table[ids[:-1]], ids[1:]).item(), abs=1e-6)


def test_the_best_loss_and_the_target_are_read_from_a_log(char_loss):
    records = [dict(step=10, val_loss=None, elapsed=45.0, tokens_per_second=200),
               dict(step=20, val_loss=1.6, elapsed=51.0, tokens_per_second=200),
               dict(step=40, val_loss=1.4, elapsed=60.0, tokens_per_second=200),
               dict(step=60, val_loss=1.5, elapsed=70.0, tokens_per_second=200)]
    row = char_loss.row_of(records, 1.4697, tokens_per_step=100)
    assert (row["best"], row["step"], row["last"], row["elapsed"]) == (1.4, 40, 1.5, 70.0)
    assert (row["step_to_target"], row["seconds_to_target"]) == (40, 60.0)
    assert row["start"] == 40.0 and row["less_start"] == 20.0  # ten steps of half a second came before the first line
    none = char_loss.row_of(records, 1.3, tokens_per_step=100)
    assert none["step_to_target"] is None and none["less_start"] is None
    assert char_loss.start_of(records[1:], 100) is None
    lines = char_loss.shown([dict(row, seed=1), dict(none, seed=2)], 1.4697)
    assert lines[1][0] == "1" and lines[2][3] == "-" and lines[3][1].startswith("1.4000 ± 0.0000")
    assert lines[3][3] == "40, 1 of 2"


def test_a_config_is_run_over_seeds(char_loss, project):
    found = project.path / "figures.json"
    assert char_loss.main(["--config=config/ladder/1_bigram.py", f"--data={project.path / 'data' / 'tiny'}",
                           "--seeds=1", "--target=9", f"--json={found}", *project.tiny, "--max_iters=10"]) == 0
    figures = json.loads(found.read_text(encoding="utf-8"))
    assert figures["rows"][0]["step_to_target"] == 10 and figures["best"]["mean"] == figures["rows"][0]["best"]


def test_a_step_of_a_tiny_model_is_measured(step, tmp_path, capsys):
    found = tmp_path / "figures.json"
    assert step.main(["--size=1x2x16x8x65", "--batch=2", "--steps=2", "--n=1", "--threads=1", "--device=cpu",
                      f"--json={found}", "--optimizer=adamw"]) == 0
    figures = json.loads(found.read_text(encoding="utf-8"))
    [turn] = figures["sides"]["train.py"]["turns"]
    assert turn["tokens_per_second"] > 0 and turn["context"] == 8 and turn["of"] == "matmul"
    assert figures["facts"]["settings"] == "--optimizer=adamw" and "train.py" in capsys.readouterr().out


def test_the_work_of_a_step_is_that_of_its_shape(step):
    assert step.shape_of("1x2x16x8x65") == (1, 2, 16, 8, 65)
    assert step.flops_per_token(1, 2, 16, 8, 65) == 6 * (12 * 16**2 + 65 * 16) + 12 * 16 * 8
    with pytest.raises(SystemExit):
        step.main(["--size=11M"])
