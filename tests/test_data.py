"""The data: windows, their order, and datasets that are refused."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train


def starts(n_tokens, block_size, count, seed=1337, first=0):
    return train.window_starts(seed, first, count, n_tokens, block_size).tolist()


def test_a_long_text_is_shuffled_in_parts_that_spread_over_it():
    found = train.window_starts(1337, 0, 2**21, 2**21 + 10, 1)
    assert len(set(found.tolist())) == 2**21 and found[:99].min() < 2**17 and found[:99].max() > 2**21 - 2**17


@given(st.integers(1, 20), st.integers(0, 400), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_windows_and_their_targets_lie_inside_the_data(block_size, more, seed, first):
    found = starts(block_size + 1 + more, block_size, 50, seed, first)
    assert min(found) >= 0 and max(found) <= more


@pytest.mark.parametrize("n_tokens, block_size", [(1000, 7), (161, 16), (50, 1)])
def test_no_token_is_predicted_twice_in_an_epoch(n_tokens, block_size):
    length = n_tokens // block_size - 1  # an epoch leaves out less than two windows, at its ends
    for epoch in range(5):
        found = sorted(starts(n_tokens, block_size, length, first=epoch * length))
        assert all(b - a >= block_size for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("n_tokens, block_size", [(40, 4), (41, 4), (43, 4), (5, 4), (9, 4), (13, 1)])
def test_every_token_is_an_input_and_a_target(n_tokens, block_size):
    inputs = {start + i for start in starts(n_tokens, block_size, 1000) for i in range(block_size)}
    assert inputs == set(range(n_tokens - 1))  # the last token has no successor: it is a target only


def test_each_epoch_and_each_seed_has_its_own_offset_and_order():
    for args in ([dict(first=99 * epoch) for epoch in range(20)], [dict(seed=seed) for seed in range(20)]):
        epochs = [starts(1000, 10, 99, **kwargs) for kwargs in args]
        assert len({epoch[0] % 10 for epoch in epochs}) > 5
        assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 20
        assert sorted(epochs[0]) != epochs[0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(0, 500))
def test_windows_do_not_depend_on_how_they_are_split_into_batches(counts, first):
    ends = np.cumsum([first, *counts])
    parts = [starts(333, 4, count, first=start) for start, count in zip(ends.tolist(), counts, strict=False)]
    assert sum(parts, []) == starts(333, 4, sum(counts), first=first)


def test_targets_are_the_inputs_shifted_by_one(project):
    """And preceded by the n - 2 tokens that are context for the n-grams alone."""
    s, tokens = project.settings("--ngram=5"), np.fromfile("data/tiny/train.bin", dtype=np.uint8)
    x, y = train.get_batch(project.split("train"), s, 0, 64, torch.device("cpu"))
    assert x.shape == (64, 3 + s.block_size) and y.shape == (64, s.block_size) and x.dtype == y.dtype == torch.int64
    for row, target, start in zip(x.tolist(), y.tolist(), starts(len(tokens), s.block_size, 64, s.seed), strict=True):
        assert row == tokens[np.arange(start - 3, start + s.block_size).clip(min=0)].tolist()
        assert target == tokens[start + 1:start + s.block_size + 1].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_split_is_read_in_each_dtype_and_its_last_token_is_repeated(project, dtype):
    folder = project.dataset("wide", project.text, dtype=dtype)
    for split in ("train", "val"):
        np.fromfile(folder / f"{split}.bin", dtype=np.uint8).astype(dtype).tofile(folder / f"{split}.bin")
    tokens, split = np.fromfile(folder / "val.bin", dtype=dtype).tolist(), project.split("val", "--dataset=wide")
    found, last = split.read(np.array([0, 5, len(tokens) - 3, len(tokens) + 10]), 4), tokens[-1]
    assert found.dtype == torch.int64
    assert found.tolist() == [tokens[:4], tokens[5:9], [*tokens[-3:], last], [last] * 4]
    project.train("--dataset=wide", "--max_iters=2")


def test_a_dataset_may_be_a_path(project):
    os.replace(project.dataset("old", project.text), "elsewhere")
    for path in (project.path / "elsewhere", "elsewhere/"):
        project.train(f"--dataset={path}", "--max_iters=2")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_stays_flat_over_many_reads(project):
    """A sparse file of 500 MB, read at every second page."""
    size = 500_000_000
    folder = project.dataset("big", project.text, tokens=dict(train=size, val=260))
    os.truncate(folder / "train.bin", 0)
    os.truncate(folder / "train.bin", size)
    split = project.split("train", "--dataset=big")

    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    split.read(np.arange(16) * 4096, 65)
    before, grown = resident(), 0
    for positions in np.array_split(np.arange(0, size - 4096, 8192), 100):
        assert not split.read(positions, 65).any()
        grown = max(grown, resident() - before)
    assert grown < 60e6, f"grew by {grown / 1e6:.0f} MB"


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_a_missing_or_incomplete_file_is_refused(project, name, change):
    path = f"data/tiny/{name}"
    if change == "missing":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) + (1 if change == "longer" else -1))
    line = project.refuse()
    assert "data/tiny" in line and (name in line or name == "meta.json") and "prepare.py" in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_beyond_the_vocabulary_is_one_line(project, split):
    with open(f"data/tiny/{split}.bin", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(file.name))
    line = project.train(status=2).err
    assert line.count("\n") == 1 and f"{split}.bin" in line and "vocabulary" in line and "prepare.py" in line


@pytest.mark.parametrize("key", ["corpus", "tokenizer", "vocab_size", "dtype", "tokens", "bytes"])
def test_a_meta_json_without_a_key_is_refused(project, key):
    path = project.path / "data" / "tiny" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    del meta[key]
    path.write_text(json.dumps(meta), encoding="utf-8")
    assert "meta.json" in project.refuse()
