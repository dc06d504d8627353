"""Damaged checkpoints: read as before the damage or refused with a UserError."""
import io

import pytest
import torch
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st

import train


def damaged(data, edits):
    """The bytes after a list of edits (kind, from, to, value), with from and to as fractions of the length."""
    data = bytearray(data)
    for kind, a, b, value in edits:
        i, j = sorted((int(a * len(data)), int(b * len(data))))
        if kind == "flip" and data:
            data[min(i, len(data) - 1)] ^= value
        elif kind == "cut":
            del data[i:j]
        elif kind == "insert":
            data[i:i] = bytes([value]) * (j - i)
    return bytes(data)


EDITS = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.floats(0, 1), st.floats(0, 1),
                           st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a small checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    weights = {f"w{i}": torch.arange(20.0) * i for i in range(3)}
    train.save_checkpoint(folder, dict(format=3, model=weights, optimizers=[{0: dict(step=torch.ones(1))}],
                                       config=dict(n_layer=1), tokenizer=dict(kind="byte")), False)
    return (folder / "ckpt.pt").read_bytes()


@settings(max_examples=300)
@given(EDITS)
def test_a_damaged_checkpoint_is_equal_or_refused(tmp_path, valid, edits):
    data, path = damaged(valid, edits), tmp_path / "ckpt.pt"
    path.write_bytes(data)
    try:
        assert same(train.load_checkpoint(path), torch.load(io.BytesIO(valid), weights_only=True))
    except train.UserError as error:
        assert data != valid and "ckpt.pt" in str(error) and "\n" not in str(error)
