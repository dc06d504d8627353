"""The benchmarks run at tiny sizes and read logs correctly. No test asserts a time."""
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

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
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
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
        assert bench(name).main([*flags, f"--json={path}"]) == 0
        return json.loads(path.read_text(encoding="utf-8"))

    (project.path / "text.txt").write_text(project.text, encoding="utf-8")
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_help(name):
    done = subprocess.run([sys.executable, BENCH / name, "--help"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout and f"python tests/bench/{name}" in done.stdout


def test_a_step_is_measured_beside_nanogpt(measure, nanogpt):
    found = measure("step", "--size=0.8M", "--batch=2", "--steps=2", "--n=1", "--device=cpu", f"--nanogpt={nanogpt}",
                    "--optimizer=adamw")
    assert all(found["figures"][side][0]["tokens_per_second"] > 0 for side in ("nanoGPT", "train.py"))
    assert {"cores", "chip", "torch", "date", "load_before", "n"} < found["facts"].keys()


def test_sampling_is_measured_beside_nanogpt(measure, nanogpt):
    found = measure("sample", "--size=0.8M", "--batch=1,2", "--tokens=66", "--n=1", "--device=cpu",
                    f"--nanogpt={nanogpt}")
    for result in found["figures"]:
        for side in ("nanoGPT", "sample.py"):
            assert min(min(speeds) for speeds in result["tokens_per_second"][side].values()) > 0


@pytest.mark.slow
def test_a_run_is_compared_with_nanogpt(measure, nanogpt):
    found = measure("char_cpu", f"--nanogpt={nanogpt}", "--text=text.txt", "--n=1", "--target=9", "--resolution=2",
                    f"--our_flags={' '.join([*TINY, '--dataset=char'])}")
    reference, ours = found["figures"]["nanogpt"], found["figures"]["ours"]
    assert len(reference["curves"][0]) == 3 and found["figures"]["same_losses"]
    assert ours["passed"][0] > 0 and len(ours["curves"][0]) == 2


@pytest.mark.slow
def test_the_other_benchmarks_run_at_tiny_sizes(measure):
    tiny = ["--text=text.txt", "--n=1"]
    found = measure("ablations", f"--flags={' '.join([*TINY, '--dataset=char'])}", "--changes=ngram=1+norm=layernorm",
                    *tiny)
    assert [run["change"] for run in found["figures"]] == ["", "ngram=1+norm=layernorm"]
    found = measure("scaling", "--processes=1,2", "--n_layer=1", "--n_embd=16", "--batch_size=2", *tiny)
    assert list(found["figures"]) == ["1", "2"]
    assert list(measure("prepare", "--mb=0.1", "--tokenizers=byte", *tiny)["figures"]) == ["prepare.py byte"]
    assert list(measure("shards", "--shards=2", "--tokens=1000000", "--n=1")["figures"]) == ["small", "large"]
