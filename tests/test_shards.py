"""A dataset of many shards: FineWeb's are downloaded and checked, and are read as if they were one file.

A loopback server stands in for the hub, and an encoding of 257 tokens for GPT-2's.
"""
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, same
from hypothesis import given
from hypothesis import strategies as st

import prepare
import train

tiktoken = pytest.importorskip("tiktoken")
HEADER = 1024
EOT = 256
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 6))]
# The command with the small encoding, for a process of its own.
COMMAND = """
import sys, tiktoken, prepare
small = tiktoken.Encoding("gpt2", pat_str=r".", mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={"<|endoftext|>": 256})
tiktoken.get_encoding = lambda name: small
sys.exit(prepare.main(sys.argv[1:]))
"""


def shard(ids, magic=20240520, version=1, count=None):
    """The bytes of a shard that holds these ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, "<u2").tobytes()


def tokens_of(n):
    """What shard n holds: always the same, each another, with <|endoftext|> at its beginning."""
    ids = np.random.default_rng(n).integers(0, 256, 30_000 + n)
    ids[0] = EOT
    return ids


class Hub(http.server.ThreadingHTTPServer):
    """Serves shards by their names. asked: (name, Range or None) of each request. cut: ends bodies after so many bytes;
    pause: seconds between each kilobyte."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.shards = {name: shard(tokens_of(n)) for n, name in enumerate(SHARDS)}
        self.asked, self.cut, self.pause = [], None, 0

    def handle_error(self, *args):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, (folder, _, name) = self.server, self.path.rpartition("/")
        if folder == "/datasets/kjj0/fineweb10B-gpt2/resolve/main":  # the hub itself holds none of its files
            self.send_response(302)
            self.send_header("Location", f"/store/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        hub.asked.append((name, self.headers.get("Range")))
        if folder != "/store" or name not in hub.shards:
            return self.send_error(404)
        body, asked = hub.shards[name], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start == len(body):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{name}"')
        self.end_headers()
        for place in range(start, min(len(body), start + (hub.cut or len(body))), 1000):
            self.wfile.write(body[place:place + 1000][:hub.cut])
            time.sleep(hub.pause)
        self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    small = tiktoken.Encoding("gpt2", pat_str=r".", mergeable_ranks={bytes([i]): i for i in range(256)},
                              special_tokens={"<|endoftext|>": EOT})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
    with Hub() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}/")
        yield running
        running.shutdown()


def fineweb(*argv, status=0):
    """Run prepare.py fineweb, and return the meta.json that is there afterwards, or None."""
    assert prepare.main(["fineweb", *argv]) == status
    path = Path("data/fineweb/meta.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def assert_complete(shards):
    """data/fineweb/ holds that many training shards and the validation shard, and its meta.json is right."""
    meta = json.loads(Path("data/fineweb/meta.json").read_text(encoding="utf-8"))
    names = SHARDS[:shards + 1]
    assert [[f["name"] for f in meta["files"][split]] for split in ("val", "train")] == [[*names[:1]], [*names[1:]]]
    for n, name in enumerate(names):
        assert Path("data/fineweb", name).read_bytes() == shard(tokens_of(n))
    lengths = [len(tokens_of(n)) for n in range(shards + 1)]
    assert meta["tokens"] == {"train": sum(lengths[1:]), "val": lengths[0]}
    assert meta["vocab_size"] == 257 and meta["dtype"] == "uint16"
    assert meta["tokenizer"] == {"kind": "tiktoken", "encoding": "gpt2"}
    tokenizer = prepare.tokenizer_from_spec(meta["tokenizer"])
    for split, part in (("val", [0]), ("train", range(1, shards + 1))):
        assert meta["bytes"][split] == sum(len(tokenizer.decode_bytes(tokens_of(n))) for n in part)
    assert not [path for path in Path("data/fineweb").iterdir() if path.suffix not in (".bin", ".json")]


def asked(hub):
    """The names that were asked for since the last call."""
    names = [name for name, _ in hub.asked]
    hub.asked.clear()
    return names


def one_line(capsys, *needles):
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for needle in needles:
        assert needle in error
    return error


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py fineweb


def test_shards_are_downloaded_once_and_more_are_added(hub):
    fineweb()
    assert_complete(1)
    assert asked(hub) == SHARDS[:2]
    fineweb("--shards=4")
    assert_complete(4)
    assert asked(hub) == SHARDS[2:5]
    before = Path("data/fineweb/meta.json").read_bytes()
    fineweb("--shards=4")
    assert asked(hub) == [] and Path("data/fineweb/meta.json").read_bytes() == before
    fineweb("--shards=2")  # fewer: the others stay where they are
    assert_complete(2)
    assert len(list(Path("data/fineweb").iterdir())) == 6


def test_a_run_trains_on_shards(hub, project):
    fineweb("--shards=3")
    project.train("--dataset=fineweb", "--max_iters=4")
    assert project.log()[-1]["step"] == 4 and project.log()[-1]["bits_per_byte"] > 0


@pytest.mark.parametrize("damage", [
    lambda data: data[:-2], lambda data: data[:700], lambda data: b"", lambda data: data + b"\0\0",
    lambda data: data + b"\0", lambda data: b"\0" + data[1:], lambda data: data[:4] + b"\2" + data[5:],
    lambda data: data[:8] + b"\1" + data[9:], lambda data: data[:-1] + b"\xff"],
    ids="cut short empty longer odd magic version count beyond".split())
def test_a_damaged_shard_is_deleted_and_downloaded_by_the_next_run(hub, damage, capsys):
    fineweb("--shards=3")
    path = Path("data/fineweb", SHARDS[2])
    path.write_bytes(damage(path.read_bytes()))
    asked(hub), capsys.readouterr()
    fineweb("--shards=3", status=2)
    one_line(capsys, SHARDS[2], "damaged", "again")
    assert not path.exists() and asked(hub) == []
    fineweb("--shards=3")
    assert_complete(3)
    assert asked(hub) == [SHARDS[2]]


@pytest.mark.parametrize("served", [
    shard([1, 2, 3], magic=20240801), shard([1, 2, 3], count=4), shard([1, 2, 3], count=-3), shard([]),
    shard([1, 257]), b"\x01", None], ids="magic count negative none beyond one-byte gone".split())
def test_what_is_no_shard_is_one_line_and_changes_nothing(hub, served, capsys):
    before = fineweb("--shards=1")
    hub.shards[SHARDS[2]] = served
    if served is None:
        del hub.shards[SHARDS[2]]
    capsys.readouterr()
    assert fineweb("--shards=3", status=2) == before
    one_line(capsys, SHARDS[2])
    assert_complete(1)  # and nothing damaged is kept
    hub.shards[SHARDS[2]] = shard(tokens_of(2))
    fineweb("--shards=3")
    assert_complete(3)


def test_a_broken_download_is_resumed(hub):
    hub.cut = 40_000
    fineweb()
    assert_complete(1)
    first, second = (place for name, place in hub.asked if name == SHARDS[1])
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) > 30_000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_leaves_the_old_dataset_or_the_new(hub):
    fineweb()
    hub.pause = 0.01
    rng, metas = random.Random(0), set()
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", COMMAND, "fineweb", "--shards=5"], stdout=subprocess.DEVNULL,
                                 env=os.environ | {"PYTHONPATH": str(ROOT)})
        begun, deadline = len(hub.asked), time.monotonic() + 30
        while len(hub.asked) == begun and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.8))
        child.kill()
        child.wait()
        meta = json.loads(Path("data/fineweb/meta.json").read_text(encoding="utf-8"))
        metas.add(len(meta["files"]["train"]))
        for path in Path("data/fineweb").glob("*.bin"):  # under their own names only when complete
            assert path.read_bytes() == hub.shards[path.name]
    hub.pause = 0
    fineweb("--shards=5")
    assert_complete(5)
    assert metas <= {1, 5}
    assert [place for _, place in hub.asked if place], "nothing was resumed"


def test_other_data_is_not_mixed_with_shards(hub, capsys):
    Path("a.txt").write_text("some text of mine")
    assert prepare.main(["a.txt", "--name=fineweb"]) == 0
    capsys.readouterr()
    fineweb(status=2)
    one_line(capsys, ".bin", "--name")
    fineweb("--name=web", status=0)
    assert prepare.main(["a.txt", "--name=web"]) == 2
    one_line(capsys, "fineweb_", "--name")


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http:///x"])
def test_an_endpoint_that_is_none_is_one_line(hub, endpoint, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    fineweb(status=2)
    one_line(capsys, endpoint.rstrip("/"))


# ----------------------------------------------------------------------------------------------------------------------
# train.py over many shards


def dataset(folder, parts, offset=HEADER, **changes):
    """A folder of shards that hold these lists of ids, the last of them for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": [], "val": []}
    for n, ids in enumerate(parts):
        name = f"part{n}.bin"
        (folder / name).write_bytes(bytes(offset) + np.asarray(ids, "<u2").tobytes())
        files["val" if n == len(parts) - 1 else "train"].append(dict(name=name, offset=offset, tokens=len(ids)))
    sums = {split: sum(f["tokens"] for f in files[split]) for split in files}
    meta = dict(format=1, corpus="parts", tokenizer=dict(kind="byte"), vocab_size=257, dtype="uint16", tokens=sums,
                bytes=sums, files=files) | changes
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def open_split(folder, split="train"):
    return train.TokenDataset(folder, split, train.read_meta(f"{folder}/")[1])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 100), st.sampled_from([0, 2, 7, HEADER]),
       st.randoms(use_true_random=False))
def test_shards_are_read_as_if_they_were_one_file(tmp_path, lengths, length, offset, rng):
    parts = [[rng.randrange(257) for _ in range(n)] for n in lengths]
    dataset(tmp_path, [*parts, [1] * 20], offset)
    whole = np.array([i for part in parts for i in part])
    split = open_split(tmp_path)
    starts = np.array([rng.randrange(len(whole) + 5) for _ in range(7)])
    expected = whole[np.minimum(starts[:, None] + np.arange(length), len(whole) - 1)]
    assert split.size == len(whole) and split.read(starts, length).tolist() == expected.tolist()


def test_a_run_on_shards_is_bit_for_bit_that_on_one_file(project):
    ids = np.random.default_rng(0).integers(0, 257, 3000)
    dataset(project.path / "data" / "one", [ids, ids[:300]])
    dataset(project.path / "data" / "many", [*np.array_split(ids, 40), ids[:300]])
    for name in ("one", "many"):
        project.train(f"--dataset={name}", f"--out_dir={name}")
    assert project.log("one") == project.log("many")
    assert same(project.checkpoint("one")["model"], project.checkpoint("many")["model"])


def test_a_token_beyond_the_vocabulary_is_refused_by_the_shard_s_name(tmp_path):
    ids = np.arange(200) % 257
    dataset(tmp_path, [ids, np.full(200, 300), ids])
    split = open_split(tmp_path)
    assert split.read(np.array([0]), 100).shape == (1, 100)  # of another shard
    with pytest.raises(prepare.UserError, match=r"part1\.bin.*prepare\.py"):
        split.read(np.array([190]), 20)


@pytest.mark.parametrize("change", ["longer", "missing"])
def test_a_shard_of_another_size_is_refused_by_name(project, change):
    dataset(project.path / "data" / "parts", [range(100)] * 3)
    path = project.path / "data" / "parts" / "part1.bin"
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\0\0")
    line = project.refuse("--dataset=parts")
    assert "part1.bin" in line and "prepare.py" in line


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no open file")
def test_a_shard_that_is_replaced_does_not_reach_the_run(tmp_path):
    ids = np.arange(200) % 257
    dataset(tmp_path, [ids, ids, ids])
    split = open_split(tmp_path)
    before = split.read(np.array([150]), 100)
    for name in ("part0.bin", "part1.bin"):
        (tmp_path / "new").write_bytes(bytes(10))
        os.replace(tmp_path / "new", tmp_path / name)
    assert torch.equal(split.read(np.array([150]), 100), before)


def test_the_config_s_arithmetic_is_right():
    """What the docstring of config/train_gpt2.py estimates follows from its settings."""
    s = train.Settings(**train.parse_args(train.Settings, [str(ROOT / "config" / "train_gpt2.py")])[0])
    text = (ROOT / "config" / "train_gpt2.py").read_text(encoding="utf-8")
    tokens = s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size
    flops = 6 * 124e6 * tokens
    hours = flops / (0.4 * 989e12) / 3600
    assert s.dataset == "fineweb" and (s.n_layer, s.n_head, s.n_embd) == (12, 12, 768)
    for said in (f"{s.max_iters:,} steps see {tokens / 1e9:.2f} billion tokens", f"{flops:.2e}".replace("e+", "e"),
                 f"{hours:.1f} hours on one GPU", f"{60 * hours / 8:.0f} minutes on eight", f"${2.5 * hours:.1f} on",
                 f"--shards={tokens / 1e8:.0f}"):
        assert said in text
    assert 2.5e9 - 2 * s.block_size > tokens, "more than an epoch"


@pytest.mark.skipif(os.name == "nt", reason="its holes in files take space on the disk")
def test_ten_billion_tokens_take_no_more_memory_than_a_million(tmp_path):
    """100 shards of 100 million tokens, holes on the disk: opened, and batches read from most of them."""
    peaks = []
    for name, shards, tokens in (("small", 1, 10**6), ("large", 100, 10**8)):
        folder = tmp_path / name
        files = {"train": [dict(name=f"{i}.bin", offset=HEADER, tokens=tokens) for i in range(shards)],
                 "val": [dict(name="val.bin", offset=0, tokens=10**6)]}
        dataset(folder, [], files=files, tokens=dict(train=shards * tokens, val=10**6), bytes=dict(train=1, val=1))
        for part in files["train"] + files["val"]:
            with open(folder / part["name"], "wb") as file:
                file.truncate(part["offset"] + 2 * part["tokens"])
        s = train.Settings(batch_size=12, block_size=64, device="cpu")
        tracemalloc.start()
        split = open_split(folder)
        assert split.size == shards * tokens
        for first in range(0, 180, 12):
            x, _ = train.get_batch(split, s, first, 12, torch.device("cpu"))
            assert x.shape == (12, 64) and not x.any()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000, peaks
