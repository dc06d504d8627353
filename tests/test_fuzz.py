"""Random and damaged files: each reader accepts what is valid and raises a UserError for the rest.

Config files and command lines are in test_settings.py.
"""
import io
import json
import os
import zipfile

import pytest
import torch
from conftest import random_model, same
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train


def damaged(data, edits):
    """The bytes after a list of edits: (kind, from, to, value), with from and to as fractions of the length."""
    data = bytearray(data)
    for kind, a, b, value in edits:
        i, j = sorted((int(a * len(data)), int(b * len(data))))
        if kind == "flip" and data:
            data[min(i, len(data) - 1)] ^= value
        elif kind == "cut":
            del data[i:j]
        elif kind == "insert":
            data[i:i] = bytes([value]) * (j - i)
        elif kind == "copy":
            data[j:j] = data[i:j]
        elif kind == "zero":
            data[i:j] = bytes(j - i)
    return bytes(data)


EDITS = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert", "copy", "zero"]), st.floats(0, 1), st.floats(0, 1),
                           st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a small checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    weights = {f"w{i}": torch.arange(20.0) * i for i in range(3)}
    train.save_checkpoint(folder, dict(format=2, model=weights, optimizers=[{0: dict(step=torch.ones(1))}],
                                       config=dict(n_layer=1), tokenizer=dict(kind="byte")), False)
    return (folder / "ckpt.pt").read_bytes()


def load(path, data):
    """The checkpoint in those bytes, or None if it is refused."""
    (path / "ckpt.pt").write_bytes(data)
    try:
        return train.load_checkpoint(path / "ckpt.pt")
    except train.UserError as error:
        assert "ckpt.pt" in str(error) and "\n" not in str(error)
        return None


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_random_bytes_are_not_a_checkpoint(tmp_path, data):
    assert load(tmp_path, data) is None
    assert load(tmp_path, b"PK\x03\x04" + data) is None


@settings(max_examples=300)
@given(EDITS)
@example([("flip", 0.0, 0.0, 0)])  # changes nothing
def test_a_damaged_checkpoint_is_equal_or_refused(tmp_path, valid, edits):
    data = damaged(valid, edits)
    checkpoint = load(tmp_path, data)
    if data == valid or checkpoint is not None:
        assert same(checkpoint, torch.load(io.BytesIO(valid), weights_only=True))


OPCODES = b"(.0123456789FGIJKLMNPQRSTUVXbcdegijhlopqrstu}])\x80\x81\x85\x86\x87\x88\x89\x8a\x93\x94\x95\x8c\x92\x97\x98"
PICKLES = st.lists(st.one_of(
    st.sampled_from([bytes([code]) for code in OPCODES]), st.binary(max_size=4), st.sampled_from([
        b"cos\nsystem\n", b"cbuiltins\neval\n", b"V" + b"open('canary','w')\n", b"ctorch\nload\n", b"(tR", b"\x85R",
        b"q\x01", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"U\x07storage",
        b"K\x01", b"h\x01"])), max_size=12).map(b"".join)


@settings(max_examples=200)
@given(PICKLES)
@example(b"cbuiltins\neval\n(Vopen('canary','w')\ntR")
@pytest.mark.filterwarnings("ignore")
def test_a_random_pickle_in_a_checkpoint_executes_nothing(tmp_path, valid, code):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            part = b"\x80\x02" + code + b"." if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(zipfile.ZipInfo(entry.filename), part)
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert load(tmp_path, file.getvalue()) is None
    finally:
        os.chdir(before)
    assert not (tmp_path / "canary").exists()


META = dict(corpus="c", tokenizer=dict(kind="byte"), vocab_size=256, dtype="uint8", tokens=dict(train=90, val=10),
            bytes=dict(train=90, val=10))


@settings(max_examples=200)
@given(EDITS)
def test_a_damaged_meta_json_is_read_or_refused(tmp_path, edits):
    (tmp_path / "meta.json").write_bytes(json.dumps(META).encode())
    assert train.read_meta(f"{tmp_path}/")[1] == META
    (tmp_path / "meta.json").write_bytes(damaged(json.dumps(META).encode(), edits))
    try:
        train.read_meta(f"{tmp_path}/")
    except train.UserError as error:
        assert "meta.json" in str(error) and "damaged" in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a tiny GPT-2 in Hugging Face's layout."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path_factory.mktemp("gpt2")
    model = random_model(vocab_size=256, bias=True, position="learned", norm="layernorm", norm_affine=True,
                         qk_norm=False, activation="gelu_tanh", tie_weights=True)
    _, texts, tensors = sample.model_files(model, prepare.ByteTokenizer())
    (folder / "config.json").write_text(texts["config.json"], encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert train.load_gpt2(str(folder))["model"].keys() == model.state_dict().keys()
    return folder


@settings(max_examples=150)
@given(EDITS)
def test_damaged_safetensors_are_gpt2_or_refused(tmp_path, gpt2, edits):
    """The format has no checksum: flipped bits of a weight are not detected."""
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(damaged((gpt2 / "model.safetensors").read_bytes(), edits))
    try:
        train.model_from_checkpoint(train.load_gpt2(str(tmp_path)))
    except train.UserError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)


@settings(max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=5).map(str.encode)), max_size=8))
@example(["é".encode()[:1], "é".encode()[1:]])
def test_text_is_the_same_however_it_is_cut_into_chunks(chunks):
    """What Python's own decoder accepts as a whole is accepted in parts, NUL bytes apart, and nothing else."""
    data = b"".join(chunks)
    document = ("x.txt", lambda: iter([chunk for chunk in chunks if chunk]))
    assert b"".join(prepare.read_corpus([document], prepare.ByteTokenizer())) == data
    try:
        data.decode()
        valid = b"\0" not in data
    except UnicodeDecodeError:
        valid = False
    try:
        found = list(prepare.read_corpus([document], prepare.CharTokenizer("")))
    except prepare.UserError as error:
        assert not valid and "x.txt" in str(error)
        return
    assert valid and b"".join(found) == data
    assert all(chunk.decode() is not None for chunk in found), "each chunk is whole characters"
