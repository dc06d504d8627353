"""The benchmarks run at tiny sizes and read logs correctly. No test asserts a time."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the benchmarks use process groups")
BENCH = ROOT / "tests" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.name != "common.py")
# A checkout with nanoGPT's interface, of a model that is a table.
MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 4
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.0
    bias: bool = False

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature, top_k):
        return idx

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
"""
TRAIN = """
import numpy, torch
from model import GPT, GPTConfig
vocab_size = int(numpy.fromfile("data/shakespeare_char/train.bin", "uint16").max()) + 1
model = GPT(GPTConfig(vocab_size=vocab_size))
torch.nn.init.zeros_(model.table.weight)
optimizer = model.configure_optimizers(0.0, 1.0, (0.0, 0.0), "cpu")
print("tokens per iteration will be: 4\\nstep 0: train loss 1.0, val loss 1.0")
for i in range(5):
    x = torch.zeros(1, 4, dtype=torch.long)
    model(x, x)[1].backward()
    optimizer.step()
    print(f"iter {i}: loss 1.0, time 1.00ms, mfu 0.00%")
"""
PREPARE = """
import numpy
text = open("input.txt", encoding="utf-8", newline="").read()
ids = numpy.array([sorted(set(text)).index(c) for c in text], "uint16")
ids[:len(text) * 9 // 10].tofile("train.bin")
ids[len(text) * 9 // 10:].tofile("val.bin")
"""


@pytest.fixture
def bench(monkeypatch):
    """Load a benchmark as a module. Its folder is last on the path: sample.py and prepare.py are the repository's."""
    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    return load


@pytest.fixture
def nanogpt(project):
    """A checkout of the model above, with project's text."""
    checkout = project.path / "nanoGPT"
    data = checkout / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for path, text in ((checkout / "model.py", MODEL), (checkout / "train.py", TRAIN), (data / "prepare.py", PREPARE),
                       (data / "input.txt", project.text)):
        path.write_bytes(text.encode())
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True)
    return checkout


@pytest.fixture
def measure(bench, project):
    """Run a benchmark with these flags. Returns its figures."""
    def run(name, *flags):
        path = project.path / "figures.json"
        assert not bench(name).main([*flags, f"--json={path}"])
        return json.loads(path.read_text(encoding="utf-8"))

    (project.path / "text.txt").write_text(project.text, encoding="utf-8")
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_help(name):
    done = subprocess.run([sys.executable, BENCH / name, "--help"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout and f"python tests/bench/{name}" in done.stdout


def test_a_child_is_ended_when_it_fails_hangs_or_has_done_enough(bench, tmp_path):
    launch = bench("common").launch
    done = launch(["-c", "import sys; print(1); print('late', file=sys.stderr)"], tmp_path)
    assert [line for _, line in done.lines] == ["1"] and done.errors == "late\n" and done.seconds > 0 < done.peak
    with pytest.raises(SystemExit, match="status 3"):
        launch(["-c", "raise SystemExit(3)"], tmp_path)
    wait = ["-c", "import os, time; os.fork(); print(1); time.sleep(100)"]
    with pytest.raises(SystemExit, match="after . s with status -9"):
        launch(wait, tmp_path, timeout=2)
    assert launch([*wait[:1], "import time; print(1); time.sleep(100)"], tmp_path, lambda: True, statuses=(-15,)).lines


def test_a_step_is_measured_beside_nanogpt(measure, nanogpt):
    found = measure("step", "--size=tiny", "--n=1", "--device=cpu", f"--nanogpt={nanogpt}", "--accumulate=2",
                    "--optimizer=adamw", "--profile")
    for side in "nanoGPT", "ours":
        assert found["figures"][side][0]["tokens/s"] > 0 and len(found["figures"][side][0]["kernels"]) > 5
    assert {"cores", "chip", "torch", "date", "load_before", "n"} < found["facts"].keys()


def test_sampling_is_measured_beside_nanogpt(measure, nanogpt):
    found = measure("sample", "--size=tiny", "--batch=2", "--tokens=40", "--n=1", "--device=cpu",
                    f"--nanogpt={nanogpt}")
    assert all(min(found["figures"][side][0].values()) > 0 for side in ("nanoGPT", "ours"))


@pytest.mark.slow
def test_a_run_is_compared_with_nanogpt(measure, nanogpt, project):
    pytest.importorskip("matplotlib")
    found = measure("char_cpu", f"--nanogpt={nanogpt}", "--text=text.txt", "--n=1", "--target=9", "--resolution=2",
                    f"--our_flags={' '.join([*TINY, '--dataset=char'])}", "--picture=picture.png")
    theirs, ours = found["figures"]["nanoGPT"][0], found["figures"]["ours"][0]
    assert [len(theirs["curve"]), len(ours["curve"])] == [2, 2] and ours["seconds to 9"] > 0
    assert (project.path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes on two quiet cores
@pytest.mark.parametrize("part", ["correctness", "speed", "character"])
def test_the_gpu_benchmark_runs_at_tiny_sizes(measure, nanogpt, part):
    found = measure("gpu", "--tiny", f"--part={part}", "--text=text.txt", "--n=2", f"--nanogpt={nanogpt}")[part]
    assert not found["failed"] and all(runs for rows in found["rows"].values() for runs in rows.values())


@pytest.mark.slow
def test_the_other_benchmarks_run_at_tiny_sizes(measure):
    tiny = ["--text=text.txt", "--n=1"]
    found = measure("ablations", f"--flags={' '.join([*TINY, '--dataset=char'])}", "--changes=ngram=1+norm=layernorm",
                    *tiny)
    assert list(found["figures"]) == ["unchanged", "ngram=1, norm=layernorm"]
    found = measure("scaling", "--processes=1,2", "--n_layer=1", "--n_embd=16", "--batch_size=2", *tiny)
    assert list(found["figures"]) == ["1 processes", "2 processes"]
    assert list(measure("prepare", "--mb=0.1", "--tokenizers=byte", *tiny)["figures"]) == ["prepare.py byte"]
    assert list(measure("shards", "--shards=2", "--tokens=1000000", "--n=1")["figures"]) == ["small", "large"]
