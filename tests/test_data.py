"""The data: which windows a run sees, in which order, and what is refused instead of trained on."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train

SIZES = [(n, T) for T in (1, 2, 5, 16) for n in
         sorted({T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T - 1, 3 * T, 3 * T + 1, 10 * T + 3}) if n > T]


def starts(n_tokens, block_size, count, seed=1337, first=0):
    return np.asarray(train.window_starts(seed, first, count, n_tokens, block_size)).tolist()


def epoch_length(n_tokens, block_size):
    """How many windows fit behind any offset an epoch may begin with."""
    return max(1, n_tokens // block_size - 1)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    assert sorted(train.permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**31 + 1, 2**40, 2**40 + 7])
def test_permute_of_a_huge_range_stays_in_it(n):
    some = np.concatenate([np.arange(5000), n - 1 - np.arange(5000)])
    sent = train.permute(some, n, 3)
    assert len(set(sent.tolist())) == len(some) and sent.min() >= 0 and sent.max() < n
    assert sent.std() > n / 5, "neighbours are not sent far apart"


def test_permute_has_an_order_for_each_key():
    orders = {tuple(train.permute(np.arange(50), 50, key).tolist()) for key in range(20)}
    assert len(orders) == 20 and tuple(range(50)) not in orders


@pytest.mark.parametrize("n_tokens, block_size", SIZES)
def test_windows_and_their_targets_lie_inside_the_data(n_tokens, block_size):
    found = starts(n_tokens, block_size, 300)
    assert min(found) >= 0 and max(found) + block_size + 1 <= n_tokens


@given(st.integers(1, 20), st.integers(0, 400), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_windows_lie_inside_any_data(block_size, more, seed, first):
    found = starts(block_size + 1 + more, block_size, 50, seed, first)
    assert min(found) >= 0 and max(found) + 1 <= 1 + more


@pytest.mark.parametrize("n_tokens, block_size", [(1000, 7), (161, 16), (50, 1)])
def test_no_token_is_predicted_twice_in_an_epoch(n_tokens, block_size):
    length = epoch_length(n_tokens, block_size)
    for epoch in range(5):
        found = sorted(starts(n_tokens, block_size, length, first=epoch * length))
        assert all(b - a >= block_size for a, b in zip(found, found[1:], strict=False))
        assert length * block_size >= n_tokens - 2 * block_size, "an epoch leaves out more than its two ends"


@pytest.mark.parametrize("n_tokens, block_size", [(40, 4), (41, 4), (43, 4), (5, 4), (9, 4), (13, 1)])
def test_every_token_is_reached_as_input_and_as_target(n_tokens, block_size):
    inputs = {start + i for start in starts(n_tokens, block_size, 1000) for i in range(block_size)}
    assert inputs == set(range(n_tokens - 1))  # the last token has no successor, so it is only ever a target


def test_each_epoch_has_its_own_offset_and_order():
    length = epoch_length(1000, 10)
    epochs = [starts(1000, 10, length, first=e * length) for e in range(20)]
    assert len({epoch[0] % 10 for epoch in epochs}) > 5
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 20
    assert sorted(epochs[0]) != epochs[0]


def test_seeds_differ():
    assert len({tuple(starts(1000, 10, 50, seed)) for seed in range(20)}) == 20


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(0, 500))
def test_windows_do_not_depend_on_how_they_are_asked_for(cuts, first):
    """Neither steps nor processes nor resuming change which window is number so and so."""
    whole, parts, begin = starts(333, 4, sum(cuts), first=first), [], first
    for count in cuts:
        parts += starts(333, 4, count, first=begin)
        begin += count
    assert parts == whole


def test_targets_are_the_inputs_shifted_by_one(project):
    split, s = project.split("train"), project.settings()
    tokens = np.fromfile(project.path / "data" / "tiny" / "train.bin", dtype=np.uint8)
    x, y = train.training_batch(split, s, 0, 64, torch.device("cpu"))
    assert x.shape == y.shape == (64, s.block_size) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    for row, target, start in zip(x.tolist(), y.tolist(), starts(len(tokens), s.block_size, 64, s.seed), strict=True):
        assert row == tokens[start:start + s.block_size].tolist()
        assert target == tokens[start + 1:start + s.block_size + 1].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_split_is_read_in_each_width_and_clipped_at_its_end(project, dtype):
    folder = project.dataset("wide", project.text, dtype=dtype)
    for split in ("train", "val"):
        np.fromfile(folder / f"{split}.bin", dtype=np.uint8).astype(dtype).tofile(folder / f"{split}.bin")
    tokens = np.fromfile(folder / "val.bin", dtype=dtype).astype(np.int64)
    split = project.split("val", "--dataset=wide")
    n = len(tokens)
    found = split.read(np.array([0, 5, n - 3, n + 10]), 4)
    assert found.dtype == torch.int64
    last = tokens[-1]
    assert found.tolist() == [tokens[:4].tolist(), tokens[5:9].tolist(), [*tokens[-3:].tolist(), last], [last] * 4]
    project.train("--dataset=wide", "--max_iters=2")


def test_a_dataset_may_be_a_path(project):
    for path in (project.path / "elsewhere", project.path / "data" / "new"):
        os.replace(project.dataset("old", project.text), path)
        project.train(f"--dataset={path}", "--max_iters=2")
    project.train("--dataset=elsewhere/", "--max_iters=2")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_stays_flat_over_many_reads(project):
    """A split of 500 MB, a hole on the disk, read in every second page."""
    size = 500_000_000
    folder = project.dataset("big", project.text)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | dict(tokens=meta["tokens"] | {"train": size})))
    with open(folder / "train.bin", "wb") as file:
        file.truncate(size)
    split = project.split("train", "--dataset=big")

    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    split.read(np.arange(16) * 4096, 65)
    before, grown = resident(), 0
    for places in np.array_split(np.arange(0, size - 4096, 8192), 100):
        assert not split.read(places, 65).any()
        grown = max(grown, resident() - before)
    assert grown < 60e6, f"grew by {grown / 1e6:.0f} MB"


# What is refused.


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", [-1, 1, -100, 100])
def test_a_bin_of_another_size_is_refused_by_name(project, split, change):
    path = project.path / "data" / "tiny" / f"{split}.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    line = project.refuse()
    assert f"{split}.bin" in line and "prepare.py" in line


@pytest.mark.parametrize("damage", [os.unlink, lambda path: (os.unlink(path), path.mkdir())], ids=["gone", "folder"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_missing_file_is_refused_by_name(project, name, damage):
    damage(project.path / "data" / "tiny" / name)
    line = project.refuse()
    assert (name in line or name == "meta.json") and "prepare.py" in line


@pytest.mark.parametrize("change", [
    dict(format=2), dict(format="1"), dict(dtype="float32"), dict(dtype="int8"), dict(dtype="O"), dict(dtype="object"),
    dict(dtype="V1000000"), dict(dtype="no such"), dict(dtype=7), dict(dtype=None), dict(dtype="uint16"),
    dict(vocab_size=0), dict(vocab_size=-5), dict(vocab_size="23"), dict(vocab_size=10**12), dict(vocab_size=2.5),
    dict(vocab_size=None), dict(tokens={}), dict(tokens=[]), dict(tokens={"train": 100}), dict(tokens=7),
    dict(tokens={"train": -1, "val": 260}), dict(tokens={"train": 10**30, "val": 260}),
    dict(tokens={"train": 0, "val": 0}), dict(tokens={"train": "2331", "val": 260}), dict(bytes={}),
    dict(bytes={"train": 0, "val": 0}), dict(bytes={"train": 5, "val": -5}), dict(bytes=None), dict(tokenizer=None),
    dict(tokenizer="char"), dict(tokenizer=7)], ids=str)
def test_a_hostile_meta_json_is_refused(project, change):
    path = project.path / "data" / "tiny" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert "prepare.py" in project.refuse()


@pytest.mark.parametrize("dtype", ["int8", "int32", "float32", "float64", ">u2", "O", "V4", "S1", "datetime64[s]"])
def test_only_unsigned_tokens_are_read(project, dtype):
    """Of the right size, but not of a kind that prepare.py writes."""
    folder = project.dataset("tiny", project.text, dtype=dtype)
    for path in folder.glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size * np.dtype(dtype).itemsize))
    assert "prepare.py" in project.refuse()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_beyond_the_vocabulary_is_one_line(project, split, capsys):
    path = project.path / "data" / "tiny" / f"{split}.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert train.main(project.tiny) in (1, 2)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "255" in line and f"{split}.bin" in line


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"7", b"null", b'"meta"', b"\xff\xfe\x00", b"not json", b"[" * 100_000, b"{}", b"NaN",
    b'{"format": 1}'], ids=lambda text: repr(text[:12]))
def test_a_damaged_meta_json_is_refused(project, text):
    (project.path / "data" / "tiny" / "meta.json").write_bytes(text)
    line = project.refuse()
    assert "meta.json" in line and "prepare.py" in line


@pytest.mark.parametrize("key", ["format", "dtype", "vocab_size", "tokens", "bytes", "tokenizer"])
def test_a_meta_json_that_lacks_a_key_is_refused(project, key):
    path = project.path / "data" / "tiny" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    del meta[key]
    path.write_text(json.dumps(meta), encoding="utf-8")
    assert "meta.json" in project.refuse()
