"""What the tests share: a small text with structure, a working folder that holds it as a dataset, a train.py to run."""
import hashlib
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: faster on a busy machine

settings.register_profile("shared machine", deadline=None, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dataset=tiny --device=cpu --dtype=float32 --compile=False --n_layer=1 --n_head=2 --n_embd=32 --ngram=3 "
        "--ngram_buckets=64 --block_size=16 --batch_size=4 --max_iters=20 --eval_interval=10 --log_interval=5 "
        "--warmup_iters=2").split()
CHARS = "\n abcdefghijklmnopqrstuvwxyzé€😀"
TIMINGS = {"elapsed", "tokens_per_second", "peak_memory"}  # the keys of a log line that no two runs share


def random_model(seed=0, **config):
    """A tiny GPT whose every parameter is drawn wide enough that its choices differ from one context to the next."""
    import torch

    import train
    defaults = dict(vocab_size=len(CHARS), block_size=8, n_layer=2, n_head=2, n_embd=16, ngram=1)
    model = train.GPT(train.GPTConfig(**defaults | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=generator)
    return model


def sentences(count, seed=0):
    """A text that a tiny model can learn something from: always the same, and not ASCII alone."""
    draw = random.Random(seed).choice
    return "".join(f"{draw('the a'.split())} {draw('cat dog naïve fox'.split())} {draw('sees likes is'.split())} "
                   f"{draw('the a'.split())} {draw('house tree café'.split())}.\n" for _ in range(count))


class Project:
    """A folder to run train.py in, with data/tiny/ in it."""

    tiny = TINY

    def __init__(self, path, capsys):
        self.path, self.capsys, self.text = path, capsys, sentences(120)
        self.dataset("tiny", self.text)

    def dataset(self, name, text, val=None, **changes):
        """Write data/NAME/: `text` as characters, its last tenth (or `val`) for validation. Returns the folder."""
        cut = len(text) if val is not None else len(text) * 9 // 10
        texts = {"train": text[:cut], "val": text[cut:] if val is None else val}
        chars = "".join(sorted(set(text + (val or ""))))
        folder = self.path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in texts.items():
            np.array([chars.index(c) for c in part], dtype=np.uint8).tofile(folder / f"{split}.bin")
        meta = dict(
            format=1, corpus="tiny", source=[], corpus_sha256=hashlib.sha256(text.encode()).hexdigest(),
            characters=sum(map(len, texts.values())), tokenizer=dict(kind="char", chars=chars), vocab_size=len(chars),
            dtype="uint8", tokens={split: len(part) for split, part in texts.items()},
            bytes={split: len(part.encode()) for split, part in texts.items()})
        (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")
        return folder

    def settings(self, *argv):
        """The Settings of a tiny run, with what `argv` changes, as train() completes them from the data."""
        import train
        s = train.Settings(**train.parse_args(train.Settings, [*TINY, *argv])[0])
        s.vocab_size = s.vocab_size or train.read_meta(s.dataset)[1]["vocab_size"]
        return s

    def split(self, name, *argv):
        """The TokenDataset of a split."""
        import train
        folder, meta = train.read_meta(self.settings(*argv).dataset)
        return train.TokenDataset(folder, name, meta)

    def train(self, *argv, status=0):
        """Run train.py on tiny settings and what `argv` changes. Returns what it wrote to (stdout, stderr)."""
        import train
        self.capsys.readouterr()
        found = train.main([*TINY, *argv])
        written = self.capsys.readouterr()
        assert found == status, f"exit status {found}, not {status}: {written.err}"
        return written

    def refuse(self, *argv, plain=False):
        """Run train.py on a user's mistake: one line, status 2, no file touched. Returns the line."""
        import train
        before = self.files()
        self.capsys.readouterr()
        status = train.main([*([] if plain else TINY), *argv])
        error = self.capsys.readouterr().err
        assert status == 2, f"exit status {status}, not 2: {error}"
        assert error.count("\n") == 1 and error.endswith("\n"), f"not one line: {error!r}"
        assert "Traceback" not in error
        assert self.files() == before, "a refused command left something behind"
        return error

    def files(self):
        """Every file in the folder, with its size and time of change, but the lock that a run holds."""
        found = [path for path in self.path.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    def log(self, out="out", timings=False):
        """The lines of log.jsonl as dicts, less what no two runs share."""
        lines = (self.path / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if timings or k not in TIMINGS} for line in lines]

    def checkpoint(self, out="out", name="ckpt.pt"):
        """A checkpoint, read as anyone may read it."""
        import torch
        return torch.load(self.path / out / name, weights_only=True)

    def signal_at(self, monkeypatch, step, *numbers):
        """Have this process receive the signals during the update that follows `step` others."""
        import train
        real = train.get_lr

        def get_lr(now, s):
            if now == step:
                for number in numbers:
                    signal.raise_signal(number)
            return real(now, s)

        monkeypatch.setattr(train, "get_lr", get_lr)


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    import torch
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    return type(a) is type(b) and a == b


@pytest.fixture
def torch_state():
    """Torch as the test found it, when the test has ended; in between, one thread, the fastest for a tiny model."""
    import torch
    threads, grad, state = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.set_rng_state(state)


@pytest.fixture
def seeded(torch_state):
    """Random numbers that are the same each time."""
    import torch
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path, monkeypatch, capsys, torch_state):
    """A Project to work in. The signal handlers that a run installs are taken out again."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
                "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(key, raising=False)
    import train
    monkeypatch.setattr(train, "plot_losses", lambda *args: None)  # slow; see test_pictures.py
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Project(tmp_path, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)
