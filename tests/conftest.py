"""Shared fixtures: a small dataset in a temporary folder, tiny models, a download server, an encoding like GPT-2's."""
import hashlib
import http.server
import json
import os
import random
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import prepare

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: faster on a busy machine
for key in ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT "
            "HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy").split():
    os.environ.pop(key, None)
prepare.RETRY_SECONDS = 0
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a background job; processes started here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shared machine", deadline=None, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dataset=tiny --device=cpu --dtype=float32 --compile=False --n_layer=1 --n_head=2 --n_embd=32 --ngram=3 "
        "--block_size=16 --batch_size=4 --max_iters=20 --eval_interval=10 --log_interval=5 "
        "--warmup_iters=2").split()
CHARS = "\n abcdefghijklmnopqrstuvwxyzé€😀"
TIMINGS = {"elapsed", "tokens_per_second"}  # the keys of a log line that no two runs share


def random_model(seed=0, **config):
    """A tiny GPT with weights so large that its predictions depend on the context."""
    import torch

    import train
    defaults = dict(vocab_size=len(CHARS), block_size=8, n_layer=2, n_head=2, n_embd=16, ngram=1)
    model = train.GPT(train.GPTConfig(**defaults | config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=generator)
    if model.ngrams is not None:
        model.ngrams.count(torch.randint(model.config.vocab_size, (200,), generator=generator))
    return model


def sentences(count, seed=0):
    """A text that a tiny model can learn, the same for each seed, with characters beyond ASCII."""
    draw = random.Random(seed).choice
    return "".join(f"{draw('the a'.split())} {draw('cat dog naïve fox'.split())} {draw('sees likes is'.split())} "
                   f"{draw('the a'.split())} {draw('house tree café'.split())}.\n" for _ in range(count))


class Project:
    """A folder to run train.py in, with data/tiny/ in it."""

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
        """The Settings of a tiny run and these flags, with the vocabulary size of the dataset."""
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
        """Run train.py with TINY and these flags. Returns its (stdout, stderr)."""
        import train
        self.capsys.readouterr()
        found = train.main([*TINY, *argv])
        written = self.capsys.readouterr()
        assert found == status, f"exit status {found}, not {status}: {written.err}"
        return written

    def refuse(self, *argv):
        """Run train.py on a user's mistake: one line, status 2, no file changed. Returns the line."""
        before = self.files()
        error = self.train(*argv, status=2).err
        assert error.count("\n") == 1 and error.endswith("\n"), f"not one line: {error!r}"
        assert self.files() == before, "a refused command changed files"
        return error

    def files(self):
        """The size and modification time of every file in the folder but .lock."""
        found = [path for path in self.path.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    def log(self, out="out", timings=False):
        """The lines of log.jsonl as dicts, without timings."""
        lines = (self.path / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if timings or k not in TIMINGS} for line in lines]

    def checkpoint(self, out="out", name="ckpt.pt"):
        """A checkpoint as a dict."""
        import torch
        return torch.load(self.path / out / name, weights_only=True)

    def state(self, out="out", name="ckpt.pt"):
        """A checkpoint without the settings and the elapsed time, in which two equal runs may differ."""
        checkpoint = self.checkpoint(out, name)
        del checkpoint["config"], checkpoint["progress"]["elapsed"]
        return checkpoint

    def step(self, out="out", name="ckpt.pt"):
        """The step of a checkpoint."""
        return self.checkpoint(out, name)["progress"]["step"]


def call_at(monkeypatch, step, action):
    """Call action() in the training step that follows `step` others."""
    import train
    real = train.get_lr
    monkeypatch.setattr(train, "get_lr", lambda now, s: (now == step and action(), real(now, s))[1])


def same(a, b):
    """Whether two checkpoints, or parts of them, are bit-identical."""
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
    """One thread, the fastest for a tiny model. Restores torch's global state."""
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
    """A Project as the working directory. Restores the signal handlers."""
    import train
    monkeypatch.setattr(train, "plot_losses", lambda *args: None)  # slow; see test_pictures.py
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # torchrun leaves a folder there
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Project(tmp_path, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (bytes by name) under `folder`, by redirects like huggingface.co below /resolve/main/.

    answers: how to respond to each request, the last one repeated: a status or words of Handler. seen: the requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.folder, self.answers, self.seen, self.etag = {}, "/", [""], [], '"one"'
        self.checksum = lambda data: hashlib.sha256(data).hexdigest()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def names(self):
        """The names of the files requested since the last call."""
        found = [path.rpartition("/")[2] for path, _ in self.seen]
        self.seen.clear()
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, (folder, _, name) = self.server, self.path.rpartition("/")
        body, start = server.files.get(name), 0
        if body is None or not self.path.startswith((server.folder, "/cdn/")):
            return self.send_error(404)
        if folder.endswith("/resolve/main"):
            self.send_response(302)
            self.send_header("Location", f"/cdn/{name}")
            self.send_header("X-Linked-Etag", f'"{server.checksum(body)}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        server.seen.append((self.path, dict(self.headers)))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        if isinstance(answer, int):
            return self.send_error(answer)
        if "html" in answer:
            body = b"<!DOCTYPE html><html>Please log in</html>"
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and "no range" not in answer and self.headers.get("If-Range") == server.etag:
            start = int(asked[1])
        if start == len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if "html" in answer else "text/plain")
        if "no length" not in answer:
            self.send_header("Content-Length", str(len(body) - start))
        if "no etag" not in answer:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[start:(start + len(body)) // 2 if "drop" in answer else None])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    """A Server in place of huggingface.co."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        yield running
        running.shutdown()


@pytest.fixture
def byte_level_gpt2(monkeypatch):
    """An encoding of the 256 bytes and <|endoftext|> in place of GPT-2's."""
    tiktoken = pytest.importorskip("tiktoken")
    small = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                              special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
