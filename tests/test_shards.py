"""A dataset of many shards: FineWeb's are fetched and checked, and are read as if they were one file.

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
from types import SimpleNamespace

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
        self.shards = {name: shard(tokens_of(n)) for n, name in enumerate(prepare.SHARDS[:6])}
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
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0, 0))
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


def assert_whole(shards):
    """data/fineweb/ holds that many training shards and the validation shard, once, and its meta.json is right."""
    meta = json.loads(Path("data/fineweb/meta.json").read_text(encoding="utf-8"))
    names = prepare.SHARDS[:shards + 1]
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
    assert [path.name for path in Path("data/downloads").glob("*") if path.suffix != ".lock"] == []


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


def test_shards_are_fetched_once_and_more_are_added(hub):
    fineweb()
    assert_whole(1)
    assert asked(hub) == [*prepare.SHARDS[:2]]
    fineweb("--shards=4", "--tokenizer=gpt2")
    assert_whole(4)
    assert asked(hub) == [*prepare.SHARDS[2:5]]
    before = Path("data/fineweb/meta.json").read_bytes()
    fineweb()  # as many as there are
    assert_whole(4)
    assert asked(hub) == [] and Path("data/fineweb/meta.json").read_bytes() == before
    meta = fineweb("--shards=2")  # fewer: the others stay where they are
    assert_whole(2)
    assert len(meta["files"]["train"]) == 2 and len(list(Path("data/fineweb").iterdir())) == 6


def test_a_run_trains_on_what_was_fetched(hub, project, capsys):
    fineweb("--shards=3")
    project.train("--dataset=fineweb", "--max_iters=4")
    assert project.checkpoint()["step"] == 4 and project.checkpoint()["corpus"] == "fineweb"
    assert project.log()[-1]["bits_per_byte"] > 0


@pytest.mark.parametrize("damage", [
    lambda data: data[:-2], lambda data: data[:700], lambda data: b"", lambda data: data + b"\0\0",
    lambda data: b"\0" + data[1:], lambda data: data[:4] + b"\2" + data[5:], lambda data: data[:8] + b"\1" + data[9:],
    lambda data: data[:-1] + b"\xff", lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
    lambda data: data[:900] + b"x" + data[901:]],
    ids="cut short empty longer magic version count beyond one-bit header".split())
def test_a_damaged_shard_is_fetched_again_and_no_other(hub, damage, capsys):
    fineweb("--shards=3")
    path = Path("data/fineweb", prepare.SHARDS[2])
    path.write_bytes(damage(path.read_bytes()))
    asked(hub), capsys.readouterr()
    fineweb("--shards=3")
    assert_whole(3)
    assert asked(hub) == [prepare.SHARDS[2]]
    shown = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(shown) == 1 and prepare.SHARDS[2] in shown[0]


def test_a_lost_shard_is_fetched_again(hub):
    fineweb("--shards=2")
    Path("data/fineweb", prepare.SHARDS[0]).unlink()
    asked(hub)
    fineweb()
    assert_whole(2)
    assert asked(hub) == [prepare.SHARDS[0]]


@pytest.mark.parametrize("served, needle", [
    (shard([1, 2, 3], magic=20240801), "20240801"), (shard([1, 2, 3], version=2), "20240520 and 2"),
    (shard([1, 2, 3], count=4), "4 tokens"), (shard([1, 2, 3], count=-3), "-3"), (shard([]), "0 tokens"),
    (shard([1, 2, 60000]), "60000"), (shard([1, 257]), "257"), (b"\x01", "20240520"), (b"<!doctype html>", "web page"),
    (None, "404")], ids="magic version count negative none beyond just-beyond one-byte page gone".split())
def test_what_is_no_shard_is_one_line_and_changes_nothing(hub, served, needle, capsys):
    before = fineweb("--shards=1")
    hub.shards[prepare.SHARDS[2]] = served
    if served is None:
        del hub.shards[prepare.SHARDS[2]]
    capsys.readouterr()
    assert fineweb("--shards=3", status=2) == before
    one_line(capsys, prepare.SHARDS[2], needle)
    assert_whole(1)  # and nothing damaged is kept
    hub.shards[prepare.SHARDS[2]] = shard(tokens_of(2))
    fineweb("--shards=3")
    assert_whole(3)


def test_a_broken_download_goes_on_where_it_stopped(hub, capsys):
    hub.cut = 40_000
    fineweb("--shards=1")
    assert_whole(1)
    assert [place for name, place in hub.asked if name == prepare.SHARDS[1]] == [
        None, "bytes=32768-"]


def test_ctrl_c_leaves_the_old_dataset_and_the_next_run_goes_on(hub, monkeypatch, capsys):
    before, replace = fineweb("--shards=1"), os.replace
    for stop in ("000003.bin", "meta.json"):

        def interrupted(source, target, stop=stop):
            if str(target).endswith(stop):
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            assert fineweb("--shards=3", status=130) == before
        assert len(before["files"]["train"]) == 1
    asked(hub)
    fineweb("--shards=3")
    assert_whole(3)
    assert asked(hub) == []  # each had arrived


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_leaves_the_old_dataset_or_the_new(hub):
    fineweb("--shards=1")
    hub.pause = 0.01
    rng, metas = random.Random(0), set()
    for _ in range(8):
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
        for path in Path("data/fineweb").glob("*.bin"):  # under their own names only when whole
            assert path.read_bytes() == hub.shards[path.name]
    hub.pause = 0
    fineweb("--shards=5")
    assert_whole(5)
    assert metas <= {1, 5}
    assert [place for _, place in hub.asked if place], "nothing went on where it had stopped"


def test_a_full_disk_is_said_before_anything_is_fetched(hub, monkeypatch, capsys):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000_000))
    fineweb("--shards=103", status=2)
    one_line(capsys, "104 shards", "20.8 GB", "3.0 GB free", "--shards")
    assert asked(hub) == [] and not Path("data/fineweb").exists()


def test_other_data_is_not_mixed_with_shards(hub, capsys):
    Path("a.txt").write_text("some text of mine")
    assert prepare.main(["a.txt", "--name=fineweb"]) == 0
    capsys.readouterr()
    fineweb(status=2)
    one_line(capsys, "train.bin", "--name")
    fineweb("--name=web", status=0)
    assert prepare.main(["a.txt", "--name=web"]) == 2
    one_line(capsys, "fineweb_", "--name")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"files": []}', b'{"files": {"val": [], "train": [7]}}',
                                  b'{"files": {"val": [{"name": []}], "train": []}}', b"[" * 100_000, b"\xff"],
                         ids=lambda text: repr(text[:24]))
def test_a_damaged_meta_json_is_written_anew(hub, text):
    fineweb("--shards=2")
    Path("data/fineweb/meta.json").write_bytes(text)
    fineweb("--shards=2")
    assert_whole(2)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http:///x"])
def test_an_endpoint_that_is_none_is_one_line(hub, endpoint, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    fineweb(status=2)
    one_line(capsys, endpoint.rstrip("/"))
    assert not Path("data").exists()


# ----------------------------------------------------------------------------------------------------------------------
# train.py over many shards


def dataset(folder, parts, offset=HEADER, **changes):
    """A folder of shards that hold these lists of ids, the last of them for validation. Returns its meta."""
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
    return meta


def read_meta(folder):
    return train.read_meta(SimpleNamespace(dataset=f"{folder}/"))[1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 100), st.sampled_from([0, 2, 7, HEADER]),
       st.randoms(use_true_random=False))
def test_shards_are_read_as_if_they_were_one_file(tmp_path, lengths, length, offset, rng):
    parts = [[rng.randrange(257) for _ in range(n)] for n in lengths]
    dataset(tmp_path, [*parts, [1] * 20], offset)
    whole = np.array([i for part in parts for i in part])
    split = train.Split(tmp_path, "train", read_meta(tmp_path))
    starts = np.array([rng.randrange(len(whole) + 5) for _ in range(7)])
    expected = whole[np.minimum(starts[:, None] + np.arange(length), len(whole) - 1)]
    assert split.count == len(whole) and split.read(starts, length).tolist() == expected.tolist()


def test_a_run_on_shards_is_bit_for_bit_that_on_one_file(project):
    ids = np.random.default_rng(0).integers(0, 257, 3000)
    dataset(project.path / "data" / "one", [ids, ids[:300]])
    dataset(project.path / "data" / "many", [*np.array_split(ids, 40), ids[:300]])
    for name in ("one", "many"):
        project.train(f"--dataset={name}", f"--out_dir={name}")
    assert project.log("one") == project.log("many")
    assert same(project.checkpoint("one")["model"], project.checkpoint("many")["model"])


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(project, capsys):
    ids = np.arange(200) % 257
    dataset(project.path / "data" / "parts", [ids, ids, ids, ids])
    bad = ids.copy()
    bad[77] = 300
    (project.path / "data" / "parts" / "part1.bin").write_bytes(bytes(HEADER) + bad.astype("<u2").tobytes())
    assert train.main([*project.tiny, "--dataset=parts"]) == 1
    line = capsys.readouterr().err
    assert "part1.bin" in line and "300" in line and "token 77 " in line and f"byte {HEADER + 154:,})" in line


def test_a_shard_of_another_size_is_refused_by_name_and_later_ends_the_run(project, tmp_path):
    ids = np.arange(200) % 257
    dataset(tmp_path / "data" / "parts", [ids, ids, ids, ids])
    split, path = project.split("train", "--dataset=parts"), tmp_path / "data" / "parts" / "part1.bin"
    with open(path, "ab") as file:
        file.write(b"\0\0")
    assert split.read(np.array([0]), 100).shape == (1, 100)  # of another shard
    with pytest.raises(train.RunFailed, match="part1.bin has another size"):
        split.read(np.array([190]), 20)
    line = project.refuse("--dataset=parts")
    assert "part1.bin" in line and "1,426 bytes" in line and "1,424" in line and "prepare.py" in line


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no open file")
def test_a_shard_that_is_replaced_does_not_reach_the_run(project, tmp_path):
    ids = np.arange(200) % 257
    dataset(tmp_path / "data" / "parts", [ids, ids, ids])
    split = project.split("train", "--dataset=parts")
    before = split.read(np.array([150]), 100)
    for name in ("part0.bin", "part1.bin"):
        (tmp_path / name).write_bytes(bytes(10))
        os.replace(tmp_path / name, tmp_path / "data" / "parts" / name)
    assert torch.equal(split.read(np.array([150]), 100), before)


GOOD = dict(name="part0.bin", offset=HEADER, tokens=100)


@pytest.mark.parametrize("wrong", [
    *(dict(GOOD, name=name) for name in (
        "", ".", "..", "../part0.bin", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:x", "~", "part0.bin\n", "\0", ".x",
        None, 7, [], ["part0.bin"])),
    *(dict(GOOD, tokens=n) for n in (0, -100, 99, 100.0, "100", True, None, 10**30, [100])),
    *(dict(GOOD, offset=n) for n in (-2, 1024.0, "1024", False, None, 10**30)),
    *({k: v for k, v in GOOD.items() if k != key} for key in GOOD), None, 7, "part0.bin", []], ids=repr)
def test_a_hostile_list_of_files_is_refused(project, wrong):
    for files in (dict(train=[wrong], val=[GOOD]), dict(train=[GOOD], val=[wrong])):
        dataset(project.path / "data" / "parts", [range(100), range(100)], files=files)
        assert "meta.json" in project.refuse("--dataset=parts")


@pytest.mark.parametrize("files", [None, 7, [], {}, "train", dict(train=[GOOD]), dict(train=[], val=[]),
                                   dict(train=7, val=[GOOD]), dict(train=[GOOD, GOOD], val=[GOOD]),
                                   dict(train=[GOOD, dict(GOOD, tokens=0)], val=[GOOD])], ids=repr)
def test_what_is_no_list_of_files_is_refused(project, files):
    dataset(project.path / "data" / "parts", [range(100), range(100)], files=files)
    assert "meta.json" in project.refuse("--dataset=parts")


def test_a_missing_shard_is_refused_by_name(project):
    dataset(project.path / "data" / "parts", [range(100)] * 3)
    (project.path / "data" / "parts" / "part1.bin").unlink()
    line = project.refuse("--dataset=parts")
    assert "part1.bin" in line and "prepare.py" in line


def test_the_config_s_arithmetic_is_right():
    """What the docstring of config/train_gpt2.py estimates follows from its settings."""
    s = train.override(train.Settings(), [str(ROOT / "config" / "train_gpt2.py")])
    text = (ROOT / "config" / "train_gpt2.py").read_text(encoding="utf-8")
    tokens = s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size
    flops = 6 * 124e6 * tokens
    hours = flops / (0.4 * 989e12) / 3600
    assert s.dataset == "fineweb" and s.size == "gpt2"
    for said in (f"{s.max_iters:,} steps see {tokens / 1e9:.2f} billion tokens", f"{flops:.2e}".replace("e+", "e"),
                 f"{hours:.1f} hours on one GPU", f"{60 * hours / 8:.0f} minutes on eight", f"${2.5 * hours:.1f} on",
                 f"--shards={tokens / 1e8:.0f}"):
        assert said in text
    assert 2.5e9 - 2 * s.block_size > tokens, "more than an epoch"


def test_absent_fineweb_is_asked_for_as_it_is_prepared(project):
    assert "`python prepare.py fineweb`" in project.refuse("--dataset=fineweb")


@pytest.mark.skipif(os.name == "nt", reason="its holes in files take space on the disk")
def test_ten_billion_tokens_take_no_more_memory_than_a_million(tmp_path):
    """100 shards of 100 million tokens, holes on the disk: opened, and batches read from most of them."""
    peaks = []
    for name, shards, tokens in (("small", 1, 10**6), ("large", 100, 10**8)):
        folder = tmp_path / name
        dataset(folder, [])
        files = {"train": [], "val": [dict(name="val.bin", offset=0, tokens=10**6)]}
        for i in range(shards):
            files["train"].append(dict(name=f"{i}.bin", offset=HEADER, tokens=tokens))
        for part in files["train"] + files["val"]:
            with open(folder / part["name"], "wb") as file:
                file.truncate(part["offset"] + 2 * part["tokens"])
        dataset(folder, [], files=files, tokens=dict(train=shards * tokens, val=10**6), bytes=dict(train=1, val=1))
        s = train.override(train.Settings(), ["--batch_size=12", "--block_size=64", "--device=cpu"])
        tracemalloc.start()
        split = train.Split(folder, "train", read_meta(folder))
        assert split.count == shards * tokens
        for first in range(0, 180, 12):
            x, _ = train.training_batch(split, s, first, 12, torch.device("cpu"))
            assert x.shape == (12, 64) and not x.any()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks
