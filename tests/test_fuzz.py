"""Readers of files that may come from anyone, given anything: they accept what is right and refuse the rest in a line.

The config parser and the command line have theirs in test_settings.py, the chunks of the tokenizers in test_prepare.py.
"""
import io
import json
import math
import os
import pickle
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import same, sentences
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
        ["char", "byte", "tiktoken", "gpt2", "O", "uint8", "uint16", "../x", "http://127.0.0.1:9/x", 2**31, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["kind", "chars", "encoding", "train", "val", "dtype", "format", "tokens", "bytes"]) | st.text(max_size=5),
        inner, max_size=4), max_leaves=8)
META = dict(format=1, corpus="c", tokenizer=dict(kind="char", chars="abc"), vocab_size=3, dtype="uint8",
            tokens=dict(train=90, val=10), bytes=dict(train=90, val=10))


def one_line(error):
    assert str(error) and "\n" not in str(error) and len(str(error)) < 1000


def read_meta(path, text):
    """The meta of a dataset whose meta.json is that text, or None where it is refused."""
    (path / "meta.json").write_bytes(text)
    try:
        return train.read_meta(SimpleNamespace(dataset=f"{path}/"))[1]
    except train.UserError as error:
        one_line(error)
        assert "meta.json" in str(error)
    return None


def assert_usable(path, meta):
    """What the loop does with a meta: it opens the splits and computes with the numbers."""
    for key in ("tokens", "bytes"):
        assert all(type(meta[key][split]) is int and 0 < meta[key][split] for split in ("train", "val"))
    assert math.isfinite(meta["tokens"]["val"] / meta["bytes"]["val"])
    assert 0 < meta["vocab_size"] <= 2 ** (8 * {"uint8": 1, "uint16": 2, "uint32": 4}[meta["dtype"]])
    for split in ("train", "val"):
        try:
            train.Split(path, split, meta)
        except train.UserError as error:
            one_line(error)


@settings(max_examples=150)
@given(JSON)
@example([])
@example({"format": 1})
def test_any_json_is_a_meta_or_refused(tmp_path, value):
    meta = read_meta(tmp_path, json.dumps(value).encode())
    if meta is not None:
        assert_usable(tmp_path, meta)


@settings(max_examples=300)
@given(st.sampled_from([*META, "tokens.train", "tokens.val", "bytes.train", "bytes.val"]), JSON)
def test_any_value_in_a_meta_is_usable_or_refused(tmp_path, place, value):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(bytes(META["tokens"][split]))
    meta, (key, _, inner) = json.loads(json.dumps(META)), place.partition(".")
    if inner:
        meta[key][inner] = value
    else:
        meta[key] = value
    read = read_meta(tmp_path, json.dumps(meta).encode())
    if read is not None:
        assert_usable(tmp_path, read)


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_meta_or_refused(tmp_path, data):
    assert read_meta(tmp_path, data) is None


@settings(max_examples=300)
@given(JSON | st.fixed_dictionaries({"kind": st.sampled_from(["char", "byte", "tiktoken"])}, optional={
    "chars": st.text(max_size=5) | JSON, "encoding": JSON, "x": JSON}))
def test_any_spec_is_a_tokenizer_or_refused(spec):
    """None that fetches: names that tiktoken knows are tested where their ranks are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BPETokenizer", lambda name: pytest.fail(name) if name not in ALLOWED else None)
        try:
            tokenizer = prepare.tokenizer_from_spec(spec)
        except prepare.UserError as error:
            one_line(error)
            return
    if tokenizer is not None:
        assert tokenizer.spec == spec
        assert tokenizer.decode_bytes(range(tokenizer.vocab_size))


ALLOWED = set(prepare.tiktoken_names())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small checkpoint."""
    path = tmp_path_factory.mktemp("fuzz") / "ckpt.pt"
    weights = {f"w{i}": torch.arange(20.0) * i for i in range(3)}
    train.save_checkpoint(path, dict(format=1, model=weights, optimizer=[dict(state={0: dict(step=torch.ones(1))})],
                                     config=dict(n_layer=1), tokenizer=dict(kind="byte"), step=3, sequences=12))
    return path.read_bytes()


def load(path, data):
    """The checkpoint in those bytes, or None where it is refused."""
    (path / "ckpt.pt").write_bytes(data)
    try:
        return train.load_checkpoint(path / "ckpt.pt")
    except train.UserError as error:
        one_line(error)
        assert "ckpt.pt" in str(error)
        return None


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_no_checkpoint(tmp_path, data):
    assert load(tmp_path, data) is None
    assert load(tmp_path, b"PK\x03\x04" + data) is None


EDITS = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert", "copy", "zero"]), st.floats(0, 1), st.floats(0, 1),
                           st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=400)
@given(EDITS)
def test_a_changed_checkpoint_is_equal_or_refused(tmp_path, whole, edits):
    data = bytearray(whole)
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
        else:
            data[i:j] = bytes(j - i)
    checkpoint = load(tmp_path, bytes(data))
    assert checkpoint is None or same(checkpoint, torch.load(io.BytesIO(whole), weights_only=True))


OPCODES = b"(.0123456789FGIJKLMNPQRSTUVXbcdegijhlopqrstu}])\x80\x81\x85\x86\x87\x88\x89\x8a\x93\x94\x95\x8c\x92\x97\x98"
PICKLES = st.lists(st.one_of(
    st.sampled_from([bytes([code]) for code in OPCODES]), st.binary(max_size=4), st.sampled_from([
        b"cos\nsystem\n", b"cbuiltins\neval\n", b"V" + b"open('canary','w')\n", b"ctorch\nload\n", b"(tR", b"\x85R",
        b"q\x01", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"U\x07storage",
        b"K\x01", b"h\x01"])), max_size=12).map(b"".join)


@settings(max_examples=300)
@given(PICKLES)
@pytest.mark.filterwarnings("ignore")
def test_any_pickle_in_the_zip_runs_nothing(tmp_path, whole, code):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, b"\x80\x02" + code + b"." if entry.endswith("data.pkl") else old.read(entry))
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert load(tmp_path, file.getvalue()) is None
    finally:
        os.chdir(before)
    assert not (tmp_path / "canary").exists()


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["format", "model", "config", "tokenizer", "step", "optimizer"]), JSON))
def test_any_plain_values_in_a_checkpoint_are_refused_or_a_model_s(tmp_path, whole, changes):
    """Values that no run writes, saved as a run saves them."""
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(whole), weights_only=True) | changes, file)
    checkpoint = load(tmp_path, file.getvalue())
    if checkpoint is not None:
        with pytest.raises(train.UserError) as error:
            train.model_from_checkpoint(checkpoint, "ckpt.pt")
        one_line(error.value)


@settings(max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=5).map(str.encode)), max_size=8))
def test_any_chunks_are_text_or_refused_with_the_offset(chunks):
    """What Python's own decoder says of the whole says the stream of its parts, however it was cut."""
    document, data = prepare.Document("x.txt", lambda: iter([chunk for chunk in chunks if chunk])), b"".join(chunks)
    try:
        found = b"".join(prepare.checked(document, text_only=True))
    except prepare.UserError as error:
        one_line(error)
        offset = int(re.search(r"offset (\d+)", str(error))[1])
        assert f"0x{data[offset]:02x}" in str(error)
        assert data[offset] == 0 or data[:offset].decode().encode() == data[:offset]  # all before it is text
        return
    assert found in (data, data.removeprefix(b"\xef\xbb\xbf")) and found.decode() is not None


def test_the_fuzzers_reach_what_is_accepted(tmp_path, whole):
    """Or they would prove nothing."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(bytes(META["tokens"][split]))
    assert read_meta(tmp_path, json.dumps(META).encode()) == META
    assert load(tmp_path, whole)["step"] == 3
    assert load(tmp_path, pickle.dumps(1)) is None
    assert prepare.tokenizer_from_spec(dict(kind="char", chars="".join(sorted(set(sentences(5)))))).vocab_size > 5


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a tiny GPT-2 in Hugging Face's layout."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    folder, (V, T, C) = tmp_path_factory.mktemp("gpt2"), (7, 4, 8)
    vectors = {"ln_1": C, "ln_2": C, "attn.c_attn": 3 * C, "attn.c_proj": C, "mlp.c_fc": 4 * C, "mlp.c_proj": C}
    tensors = {"wte.weight": torch.ones(V, C), "wpe.weight": torch.ones(T, C), "ln_f.weight": torch.ones(C),
               "ln_f.bias": torch.ones(C)}
    for name, n in vectors.items():
        rows = 4 * C if name == "mlp.c_proj" else C
        tensors[f"h.0.{name}.bias"] = torch.ones(n)
        tensors[f"h.0.{name}.weight"] = torch.ones(C) if name.startswith("ln") else torch.ones(rows, n)
    save_file(tensors, folder / "model.safetensors")
    config = dict(model_type="gpt2", vocab_size=V, n_positions=T, n_embd=C, n_layer=1, n_head=2)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train.model_from_checkpoint(sample.read_gpt2(str(folder)))
    return (folder / "model.safetensors").read_bytes(), config


def is_gpt2_or_refused(path, tensors, config):
    """Whether a folder with these bytes is read as GPT-2."""
    (path / "model.safetensors").write_bytes(tensors)
    (path / "config.json").write_bytes(config)
    try:
        return train.model_from_checkpoint(sample.read_gpt2(str(path))) is not None
    except train.UserError as error:
        one_line(error)
        assert str(path) in str(error)


ENTRY = st.fixed_dictionaries(dict(
    dtype=st.sampled_from(["F32", "F16", "I8", "?"]), shape=st.lists(st.integers(0, 2**40), max_size=3),
    data_offsets=st.lists(st.integers(0, 2**40), min_size=2, max_size=2)))


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["__metadata__", "wte.weight", "h.0.ln_1.bias", "x"]), JSON | ENTRY),
       st.binary(max_size=40))
def test_any_safetensors_header_is_gpt2_or_refused(tmp_path, gpt2, changes, tail):
    whole, config = gpt2
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(json.loads(whole[8:8 + length]) | changes).encode()
    is_gpt2_or_refused(tmp_path, len(header).to_bytes(8, "little") + header + whole[8 + length:] + tail,
                       json.dumps(config).encode())
    is_gpt2_or_refused(tmp_path, tail + whole, json.dumps(config).encode())


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner",
                                        "activation_function", "tie_word_embeddings", "tokenizer_spec", "model_type"]),
                       JSON))
def test_any_value_in_gpt2_s_config_is_gpt2_or_refused(tmp_path, gpt2, changes):
    whole, config = gpt2
    is_gpt2_or_refused(tmp_path, whole, json.dumps(config | changes).encode())
    assert is_gpt2_or_refused(tmp_path, whole, json.dumps(config).encode())
