"""A dataset of many shards, such as FineWeb: prepare.py downloads and checks them, train.py reads them as one file.

The shards are small, and GPT-2's encoding has 257 tokens.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import same
from hypothesis import given
from hypothesis import strategies as st

import prepare
import train

HEADER = 1024
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 6))]


def shard(ids, magic=20240520, version=1, count=None):
    """The bytes of a shard with these ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, "<u2").tobytes()


def tokens_of(n):
    """The ids of shard n, the first one <|endoftext|>."""
    ids = np.random.default_rng(n).integers(0, 256, 3000 + n)
    ids[0] = 256
    return ids


@pytest.fixture
def hub(server, byte_level_gpt2, tmp_path, monkeypatch):
    """A server with the shards. The tests run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    server.folder = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
    server.files = {name: shard(tokens_of(n)) for n, name in enumerate(SHARDS)}
    return server


def fineweb(*argv, status=0):
    """Run prepare.py fineweb."""
    assert prepare.main(["fineweb", *argv]) == status


def assert_complete(shards):
    """data/fineweb/ has that many training shards, the validation shard and a correct meta.json."""
    meta = json.loads(Path("data/fineweb/meta.json").read_text(encoding="utf-8"))
    names, ids = SHARDS[:shards + 1], [tokens_of(n) for n in range(shards + 1)]
    assert [f["name"] for split in ("val", "train") for f in meta["files"][split]] == names
    assert [Path("data/fineweb", name).read_bytes() for name in names] == list(map(shard, ids))
    assert meta["tokens"] == {"train": sum(map(len, ids[1:])), "val": len(ids[0])}
    lengths = [len(part) - 1 + len("<|endoftext|>") for part in ids]
    assert meta["bytes"] == {"train": sum(lengths[1:]), "val": lengths[0]}
    assert meta["vocab_size"] == 257 and meta["dtype"] == "uint16"
    assert meta["tokenizer"] == {"kind": "tiktoken", "encoding": "gpt2"}
    assert not [path for path in Path("data/fineweb").iterdir() if path.suffix not in (".bin", ".json")]


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1, error
    assert not [word for word in words if word not in error], error


# prepare.py fineweb

def test_shards_are_downloaded_once_and_more_are_added(hub):
    fineweb()
    assert_complete(1)
    assert hub.names() == SHARDS[:2]
    fineweb("--shards=4")
    assert_complete(4)
    assert hub.names() == SHARDS[2:5]
    fineweb("--shards=2")  # the others are kept
    assert_complete(2)
    assert hub.names() == [] and len(os.listdir("data/fineweb")) == 6


def test_a_run_trains_on_shards(hub, project):
    fineweb("--shards=3")
    project.train("--dataset=fineweb", "--max_iters=4")
    assert project.log()[-1]["step"] == 4 and project.log()[-1]["bits_per_byte"] > 0


@pytest.mark.parametrize("damage", [
    lambda data: data[:-2], lambda data: b"", lambda data: data + b"\0\0", lambda data: data + b"\0",
    lambda data: b"\0" + data[1:], lambda data: data[:4] + b"\2" + data[5:], lambda data: data[:8] + b"\1" + data[9:],
    lambda data: data[:-1] + b"\xff"], ids="cut empty longer odd magic version count beyond".split())
def test_a_damaged_shard_is_deleted_and_downloaded_by_the_next_run(hub, damage, capsys):
    fineweb("--shards=3")
    path = Path("data/fineweb", SHARDS[2])
    path.write_bytes(damage(path.read_bytes()))
    hub.names()
    fineweb("--shards=3", status=2)
    one_line(capsys, SHARDS[2], "damaged", "again")
    assert not path.exists() and hub.names() == []
    fineweb("--shards=3")
    assert_complete(3)
    assert hub.names() == [SHARDS[2]]


@pytest.mark.parametrize("served", [shard([1, 2, 3], magic=20240801), shard([]), None], ids="magic none gone".split())
def test_a_failed_download_changes_nothing(hub, served, capsys):
    fineweb()
    hub.files[SHARDS[2]] = served
    fineweb("--shards=3", status=2)
    one_line(capsys, SHARDS[2])
    assert_complete(1)
    hub.files[SHARDS[2]] = shard(tokens_of(2))
    fineweb("--shards=3")
    assert_complete(3)


def test_other_data_is_not_mixed_with_shards(hub, capsys):
    Path("a.txt").write_text("some text of mine")
    assert prepare.main(["a.txt", "--name=fineweb"]) == 0
    fineweb(status=2)
    one_line(capsys, ".bin", "--name")
    fineweb("--name=web")
    assert prepare.main(["a.txt", "--name=web"]) == 2
    one_line(capsys, "fineweb_", "--name")


def test_an_invalid_endpoint_is_one_line(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    fineweb(status=2)
    one_line(capsys, "http://[::1")


# train.py

def dataset(folder, parts, offset=HEADER, **changes):
    """A folder with a shard for each list of ids, the last one for validation."""
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
    ids = np.array([i for part in parts for i in part])
    split = open_split(tmp_path)
    starts = np.array([rng.randrange(len(ids) + 5) for _ in range(7)])
    expected = ids[np.minimum(starts[:, None] + np.arange(length), len(ids) - 1)]
    assert split.size == len(ids) and split.read(starts, length).tolist() == expected.tolist()


def test_a_run_on_shards_equals_one_on_a_single_file(project):
    ids = np.random.default_rng(0).integers(0, 257, 3000)
    dataset(project.path / "data" / "one", [ids, ids[:300]])
    dataset(project.path / "data" / "many", [*np.array_split(ids, 40), ids[:300]])
    for name in ("one", "many"):
        project.train(f"--dataset={name}", f"--out_dir={name}")
    assert project.log("one") == project.log("many")
    assert same(project.checkpoint("one")["model"], project.checkpoint("many")["model"])


def test_a_shard_of_the_wrong_size_is_refused(project):
    dataset(project.path / "data" / "parts", [range(100)] * 3)
    with open("data/parts/part1.bin", "ab") as file:
        file.write(b"more")
    assert "part1.bin" in project.refuse("--dataset=parts")
