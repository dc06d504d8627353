"""What a user of prepare.py relies on: the bins hold the text, nothing is half-written, a mistake is one line.

Nothing here needs a network. Where TIKTOKEN_CACHE_DIR holds the ranks of gpt2 and cl100k_base, and PREPARE_SHAKESPEARE
(or ../shared/data/tinyshakespeare.txt) is the real text, those are tested too.
"""

import gzip
import hashlib
import http.server
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare

ROOT = Path(prepare.__file__).resolve().parent
EOT = "<|endoftext|>"
tiktoken = pytest.importorskip("tiktoken")
regex = pytest.importorskip("regex")  # tiktoken brings it

# The patterns of tiktoken's openai_public.py (MIT licence, OpenAI), which are what prepare.BOUNDARY relies on.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def tiny_encoding(name: str) -> "tiktoken.Encoding":
    """A real tiktoken encoding with the real pattern, whose merges are all pairs of some common bytes."""
    common = " \n\r.,'a1s" + "e"
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (a + b for a in common for b in common):
        ranks.setdefault(pair.encode(), len(ranks))
    for more in ("aaaa", "    ", "  a", "'s", "the", "<|", "|>", "。", "日本"):
        data = more.encode()
        for end in range(2, len(data) + 1):  # every beginning, so that merging can reach it
            ranks.setdefault(data[:end], len(ranks))
    special = {EOT: len(ranks) + 3, "<|fim_prefix|>": len(ranks) + 5}  # with gaps, as cl100k_base has
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special)


TINY = {name: tiny_encoding(name) for name in PATTERNS}


@pytest.fixture
def tiny_tiktoken(monkeypatch):
    real = tiktoken.get_encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: TINY[name] if name in TINY else real(name))


def ranks_are_cached(name: str) -> bool:
    files = {"gpt2": "vocab.bpe", "cl100k_base": "cl100k_base.tiktoken"}
    folders = {"gpt2": "gpt-2/encodings/main", "cl100k_base": "encodings"}
    url = f"https://openaipublic.blob.core.windows.net/{folders[name]}/{files[name]}"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    return bool(cache) and Path(cache, hashlib.sha1(url.encode()).hexdigest()).exists()


def shakespeare_path() -> Path:
    path = Path(os.environ.get("PREPARE_SHAKESPEARE", ROOT / "../shared/data/tinyshakespeare.txt"))
    if not path.exists():
        pytest.skip("no local copy of tiny Shakespeare")
    return path


def run(*argv) -> dict:
    """Run prepare.py, which must succeed, and return the meta.json that it said it wrote."""
    assert prepare.main([str(arg) for arg in argv]) == 0
    name = next((arg.removeprefix("--name=") for arg in map(str, argv) if arg.startswith("--name=")), None)
    name = name or next((a.removeprefix("--tokenizer=") for a in map(str, argv) if a.startswith("--tok")), "char")
    return json.loads(Path("data", name, "meta.json").read_text(encoding="utf-8"))


def decoded(name: str) -> bytes:
    """The text that data/name holds, as train.py and sample.py would read it."""
    folder = Path("data", name)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = prepare.tokenizer_from_spec(meta["tokenizer"])
    text = b""
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"])
        part = tokenizer.decode_bytes(ids)
        assert len(ids) == meta["tokens"][split] > 0
        assert len(part) == meta["bytes"][split]
        assert ids.max() < meta["vocab_size"]
        text += part
    assert hashlib.sha256(text).hexdigest() == meta["corpus_sha256"]
    return text


def everything(folder="data") -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refused(*argv) -> None:
    """prepare.py ends with status 2: main() returns it, and argparse raises it."""
    try:
        status = prepare.main(list(argv))
    except SystemExit as exit:
        status = exit.code
    assert status == 2


def one_line(capsys, *needles) -> str:
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert "Traceback" not in error
    for needle in needles:
        assert needle in error
    return error


SAMPLE = "First Citizen:\r\nBefore we proceed… hear me speak. 日本語。\n\nAll:\n\tSpeak, it's 1234567!\n" * 5


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("spec", [{"kind": "char", "chars": "".join(sorted(set(SAMPLE)))}, {"kind": "byte"}])
def test_char_and_byte_round_trip(spec):
    tokenizer = prepare.tokenizer_from_spec(json.loads(json.dumps(spec)))
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.decode(ids) == SAMPLE and tokenizer.spec == spec and tokenizer.eot is None
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([-1, 10**9]) == ""


@pytest.mark.parametrize("name", PATTERNS)
def test_bpe_round_trip(name, tiny_tiktoken):
    tokenizer = prepare.tokenizer_from_spec({"kind": "tiktoken", "encoding": name})
    ids = tokenizer.encode(SAMPLE + EOT + "<|fim_prefix|>x")
    assert tokenizer.decode(ids) == SAMPLE + EOT + "<|fim_prefix|>x"
    assert ids.count(tokenizer.eot) == 1 and tokenizer.vocab_size == TINY[name].n_vocab
    fim = TINY[name].encode("<|fim_prefix|>", allowed_special="all")[0]
    assert fim not in ids  # any other special token is ordinary text
    gaps = sorted(set(range(tokenizer.vocab_size)) - set(TINY[name]._mergeable_ranks.values()) - {tokenizer.eot, fim})
    assert gaps and tokenizer.decode([gaps[0], -1, 2**40, *tokenizer.encode("ok")]) == "ok"


def test_char_names_what_it_does_not_know():
    tokenizer = prepare.CharTokenizer("abc")
    assert tokenizer.encode("cab") == [2, 0, 1]
    with pytest.raises(prepare.UserError, match=r"'é' \(U\+00E9\)"):
        tokenizer.encode("aé")


@pytest.mark.parametrize("spec", [None, [], "char", {}, {"kind": "char"}, {"kind": ["char"]}, {"kind": "pickle"},
                                  {"kind": "char", "chars": 3}, {"kind": "tiktoken"},
                                  {"kind": "tiktoken", "encoding": ["gpt2"]},
                                  {"kind": "tiktoken", "encoding": "../../etc/passwd"},
                                  {"kind": "tiktoken", "encoding": "http://127.0.0.1/x"}], ids=repr)
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(prepare.UserError):
        prepare.tokenizer_from_spec(spec)


def test_an_unknown_character_in_a_stream():
    for chars, chunk in (("abc", b"aXb"), ("abc", "aéb".encode()), ("".join(map(chr, range(300))), "ab日".encode())):
        with pytest.raises(prepare.UserError, match="unknown character"):
            list(prepare.CharTokenizer(chars).encode_stream([b"ab", chunk]))


# ----------------------------------------------------------------------------------------------------------------------
# Chunks never change a token

ATOMS = st.sampled_from(
    [
        *(" ", "  ", "     ", "\n", "\n\n", "\r\n", "\r", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u2028", "\u200b"),
        *("a", "the", "I", "'s", "'LL", "'", "é", "e\u0301", "\u0301", "ж", "Я", "ſ", "๑", "ไทย", "한국어"),
        *("日本", "。", "ー", "！", "👍🏽", "🏳️\u200d🌈", "\ufeff", "\u0378", "\U0001e4d0", "1", "23", "٣", "½"),
        *(".", "!", "...", "<", "/", "//", "(", ")", "=", "_", "|", "<|", "|>", "endoftext", "<|endof", EOT),
        "<|fim_prefix|>",
    ]
)
TEXTS = st.lists(st.one_of(ATOMS, st.text(max_size=3)), max_size=60).map("".join)


def byte_chunks(text: str, size: int) -> list[bytes]:
    """Chunks of whole characters, as read_corpus() makes them."""
    return [text[i : i + size].encode() for i in range(0, len(text), size)]


def in_pieces(encoding, text: str, size: int) -> list[int]:
    pieces = prepare.split_at_boundaries(byte_chunks(text, size))
    special = {"allowed_special": {EOT}, "disallowed_special": ()}
    return [i for piece in pieces for i in encoding.encode(piece.decode(), **special)]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS.filter(lambda text: text.isprintable() or text.encode("utf-8", "ignore").decode() == text),
       size=st.integers(2, 40))  # fmt: skip
def test_chunking_never_moves_a_piece_of_the_pattern(name, text, size):
    # Python's $ also matches before a last newline, Rust's does not.
    pattern = regex.compile(PATTERNS[name].replace("$", r"\Z"))
    pieces = [piece.decode() for piece in prepare.split_at_boundaries(byte_chunks(text, size))]
    assert "".join(pieces) == text
    assert [p for piece in pieces for p in pattern.findall(piece)] == pattern.findall(text)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_chunking_never_changes_a_token_of_the_real_encodings(name):
    if not ranks_are_cached(name):
        pytest.skip(f"TIKTOKEN_CACHE_DIR has no ranks of {name}")
    encoding = tiktoken.get_encoding(name)

    @settings(max_examples=600, deadline=None)
    @given(text=TEXTS, size=st.integers(2, 40))
    def check(text, size):
        text = text.encode("utf-8", "ignore").decode()
        whole = encoding.encode(text, allowed_special={EOT}, disallowed_special=())
        assert in_pieces(encoding, text, size) == whole

    check()


def test_text_of_every_kind_is_split():
    for text in ["word " * 9, "line\n" * 9, "これは日本語の文章です。" * 9, '{"a":1,"b":2}' * 9, f"a{EOT}" * 9]:
        assert len([piece for piece in prepare.split_at_boundaries(byte_chunks(text, 20)) if piece]) > 1, text
    assert b"".join(prepare.split_at_boundaries([b"aaaa", b"aaaa"])) == b"aaaaaaaa"  # nowhere to split


# ----------------------------------------------------------------------------------------------------------------------
# The data folder


@pytest.mark.parametrize("chunk", [4, 37, 1 << 18])
@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "cl100k_base", "o200k_base"])
def test_the_bins_hold_the_text(tokenizer, chunk, tiny_tiktoken, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    Path("a.txt").write_bytes(SAMPLE.encode())
    meta = run("a.txt", f"--tokenizer={tokenizer}")
    assert decoded(tokenizer) == SAMPLE.encode()
    n_train = len(SAMPLE) * 9 // 10
    assert meta["bytes"]["train"] == len(SAMPLE[:n_train].encode())
    whole = prepare.tokenizer_from_spec(meta["tokenizer"])
    for split, part in (("train", SAMPLE[:n_train]), ("val", SAMPLE[n_train:])):
        assert np.fromfile(f"data/{tokenizer}/{split}.bin", meta["dtype"]).tolist() == whole.encode(part)
    keys = "format corpus source corpus_sha256 characters tokenizer vocab_size dtype tokens bytes"
    assert set(meta) == set(keys.split())
    assert meta["format"] == 1 and meta["characters"] == len(SAMPLE) and meta["source"] == ["a.txt"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=2, max_size=60), st.integers(4, 20), st.sampled_from(["0.1", "0.5", "0.9"]))
def test_byte_takes_any_bytes(monkeypatch, data, chunk, fraction):
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    Path("a.bin").write_bytes(data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    characters = sum(byte & 0xC0 != 0x80 for byte in data)
    if prepare.main(["a.bin", "--tokenizer=byte", f"--val_fraction={fraction}"]) == 0:
        meta = json.loads(Path("data/byte/meta.json").read_text(encoding="utf-8"))
        assert Path("data/byte/train.bin").read_bytes() + Path("data/byte/val.bin").read_bytes() == data
        assert meta["characters"] == characters
        assert Path("data/byte/val.bin").read_bytes()[0] & 0xC0 != 0x80  # no character is cut in two
    else:
        assert characters - math.ceil(characters * Fraction(fraction)) < 1


@pytest.mark.parametrize("count, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_dtype_that_holds_the_vocabulary(count, dtype):
    text = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0xFEFF), *range(0x10000, 0x12800)]))[:count]
    Path("a.txt").write_text(text * 2, encoding="utf-8", newline="")
    assert run("a.txt")["dtype"] == dtype and decoded("char") == (text * 2).encode()


def test_prepare_twice_is_byte_identical():
    Path("a.txt").write_bytes(SAMPLE.encode())
    run("a.txt")
    first = everything()
    run("a.txt")
    assert everything() == first and set(os.listdir("data/char")) == {"train.bin", "val.bin", "meta.json"}


def test_shakespeare_has_the_lecture_s_numbers():
    meta = run(shakespeare_path())
    assert meta["tokens"] == {"train": 1_003_854, "val": 111_540} and meta["vocab_size"] == 65
    assert meta["corpus_sha256"] == prepare.CORPORA["shakespeare"][1]


def test_shakespeare_has_nanogpt_s_numbers_in_gpt2_tokens():
    if not ranks_are_cached("gpt2"):
        pytest.skip("TIKTOKEN_CACHE_DIR has no ranks of gpt2")
    meta = run(shakespeare_path(), "--tokenizer=gpt2")
    assert meta["tokens"] == {"train": 301_966, "val": 36_059} and meta["dtype"] == "uint16"
    assert decoded("gpt2") == shakespeare_path().read_bytes()


def test_the_split_is_exact_in_decimals():
    # 0.7 is a little less than 7/10 as a float, and 1 - 0.9 a little more than 1/10
    for fraction, n_train in (("0.3", 7), ("0.9", 1), ("0.1", 9), ("1e-9", 9)):
        Path("a.txt").write_text("abcdefghij")
        assert run("a.txt", f"--val_fraction={fraction}")["tokens"]["train"] == n_train


def test_several_documents_are_joined(tiny_tiktoken):
    Path("notes/sub").mkdir(parents=True)
    for name, text in (("b.txt", "two"), ("a.txt", "\ufeffone"), ("sub/c.txt", "three"), (".hidden", "no"), ("e", "")):
        Path("notes", name).write_text(text, encoding="utf-8")
    Path("d.txt").write_text(f"four{EOT}five")
    meta = run("notes", "d.txt")
    assert decoded("char") == f"one\n\ntwo\n\nthree\n\nfour{EOT}five".encode()
    assert meta["source"] == ["notes", "d.txt"] and meta["corpus"] == "notes, d.txt"
    run("notes", "d.txt", "--tokenizer=gpt2", "--val_fraction=0.01")
    assert decoded("gpt2") == f"one{EOT}two{EOT}three{EOT}four{EOT}five".encode()
    eot = prepare.BPETokenizer("gpt2").eot
    assert np.fromfile("data/gpt2/train.bin", np.uint16).tolist().count(eot) == 4


def test_what_prepare_made_is_not_its_input():
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("some text")
    os.chdir("notes")
    run("a.txt")
    run("a.txt", ".", "--name=two")
    assert decoded("two") == b"some text\n\nsome text"


def test_gz_and_zip_are_read():
    Path("a.txt.gz").write_bytes(gzip.compress(SAMPLE.encode()))
    run("a.txt.gz")
    assert decoded("char") == SAMPLE.encode()
    with zipfile.ZipFile("b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z.txt", "last")
        archive.writestr("folder/", "")
        archive.writestr("folder/a.xml", "<TEI><teiHeader>no</teiHeader><body><p>first</p></body></TEI>")
    run("b.zip", "--tokenizer=byte")
    assert decoded("byte") == b"first\n\n\nlast"


def test_a_damaged_archive_is_one_line(capsys):
    """Whatever byte of the data is damaged."""
    rng = random.Random(2)
    good = gzip.compress(SAMPLE.encode())
    for _ in range(100):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        Path("a.txt.gz").write_bytes(bad)
        capsys.readouterr()
        if prepare.main(["a.txt.gz"]) != 0:
            one_line(capsys)


def test_tei_text():
    Path("a.xml").write_text(
        """<?xml version="1.0"?><!DOCTYPE TEI SYSTEM "tei.dtd">
        <TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><p>Header.</p></teiHeader><text><front><p>Front.</p></front>
        <body><div><head>Letter  1</head><p>Dear <name>Att</name>icus,<pb n="1"/>
        all is<note>A note, <p>with a paragraph</p>.</note> well &amp; good&mdash;
        the <abbr>e<expan>x</expan>nd</abbr>.</p><p>Bye.</p></div>
        <div><label>Letter 2</label><quote><l>Arma virumque</l><l>cano</l></quote></div></body>
        <back><head>Index</head></back></text></TEI>""",
        encoding="utf-8",
    )
    run("a.xml")
    assert decoded("char").decode() == (
        "Letter 1\nDear Atticus, all is well & good— the end.\nBye.\n\nLetter 2\nArma virumque\ncano\n"
    )


@pytest.mark.parametrize("doctype", ["", "<!DOCTYPE TEI.2 SYSTEM 'tei2.dtd'>"], ids=["none", "absent"])
def test_entities_without_their_dtd(doctype):
    body = "<p>a&mdash;b &amacr; &lt;&amp;&gt; &#233;</p>"
    Path("a.xml").write_text(f"{doctype}<TEI.2><text><body>{body}</body></text></TEI.2>")
    run("a.xml", "--tokenizer=byte")
    assert decoded("byte").decode() == "a—b ā <&> é\n"


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_what_is_not_text_is_skipped(packed, capsys):
    files = {"a.txt": b"some text", "b.png": b"\x89PNG\r\n\x1a\n\0", "c.txt": b"caf\xe9 noir", "nul.txt": b"a\0b",
             "pom.xml": b"<project>no</project>", "broken.xml": b"<TEI><body>", "d.txt.gz": b"no gzip",
             "e.xml": b"<TEI><body><p>more</p></body></TEI>"}
    Path("notes").mkdir()
    with zipfile.ZipFile("notes.zip", "w") as archive:
        for name, data in files.items():
            Path("notes", name).write_bytes(data)
            archive.writestr(name, data)
    source = "notes.zip" if packed else "notes"
    run(source)
    assert decoded("char") == b"some text\n\nmore\n"
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        f"skipped {Path(source)}{':' if packed else os.sep}{name}" for name in sorted(files) if name[0] not in "ae"]
    run(source, "--tokenizer=byte")  # takes any file, but reads XML and .gz
    assert b"PNG" in decoded("byte") and b"caf\xe9" in decoded("byte")


def test_a_document_that_turns_out_not_to_be_text_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("fine")
    Path("notes/b.txt").write_bytes(b"fine so far\xff")
    refused("notes")
    one_line(capsys, "b.txt")


def test_pydocs_needs_no_network():
    meta = run("pydocs", "--tokenizer=byte")
    assert meta["corpus"] == "pydocs" and b"assert" in decoded("byte")


# ----------------------------------------------------------------------------------------------------------------------
# Nothing destroys data


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)],
                         ids=["Ctrl-C", "full disk"])
@pytest.mark.parametrize("step", ["scan", "write_bins", "json.dumps", "first rename", "second rename"])
def test_an_interrupted_run_leaves_the_old_data(capsys, monkeypatch, step, error, status):
    Path("a.txt").write_text("the old text")
    run("a.txt")
    before, rename = everything(), os.rename
    Path("a.txt").write_text("and the new one")
    capsys.readouterr()

    def fail(*args, **kwargs):
        raise error

    def fail_to_rename(source, target):
        if str(target).endswith("char" if step == "second rename" else "old") and not str(source).endswith("old"):
            raise error
        rename(source, target)

    with monkeypatch.context() as patch:
        if "rename" in step:
            patch.setattr(os, "rename", fail_to_rename)
        else:
            patch.setattr(prepare.json if "." in step else prepare, step.removeprefix("json."), fail)
        assert prepare.main(["a.txt"]) == status
    one_line(capsys, str(error) or "interrupted")
    assert everything() == before and os.listdir("data") == ["char"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_prepare_leaves_the_old_data_or_the_new():
    rng = random.Random(0)
    texts = [bytes([n]) * 20_000_000 for n in (65, 66)]
    for n, text in enumerate(texts):
        Path(f"{n}.txt").write_bytes(text)
    run("0.txt", "--tokenizer=byte")
    for i in range(12):
        command = [sys.executable, ROOT / "prepare.py", f"{(i + 1) % 2}.txt", "--tokenizer=byte"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not list(Path("data").glob(".byte-*")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)  # from here on there is something to destroy
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.wait()
        if not Path("data/byte").exists():  # killed between the two renames
            [old] = Path("data").glob(".byte-*/old")
            os.rename(old, "data/byte")
        assert sorted(os.listdir("data/byte")) == ["meta.json", "train.bin", "val.bin"]
        text = Path("data/byte/train.bin").read_bytes() + Path("data/byte/val.bin").read_bytes()
        meta = json.loads(Path("data/byte/meta.json").read_text(encoding="utf-8"))
        assert text in texts and meta["corpus_sha256"] == hashlib.sha256(text).hexdigest()
        for left in Path("data").glob(".byte-*"):
            shutil.rmtree(left)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT for one process alone")
def test_a_real_ctrl_c():
    Path("a.txt").write_bytes(b"all work and no play\n" * 3_000_000)
    command = [sys.executable, ROOT / "prepare.py", "a.txt"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not list(Path("data").glob(".char-*/new/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=20)
    assert child.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    assert os.listdir("data") == []


# ----------------------------------------------------------------------------------------------------------------------
# A user's mistakes

MISTAKES = {
    "missing file": (["nowhere.txt"], "nowhere.txt"),
    "nearly a corpus": (["shakespear"], "did you mean shakespeare?"),
    "empty file": (["empty.txt"], "0 characters"),
    "empty folder": (["empty/"], "0 characters"),
    "empty gz": (["empty.txt.gz"], "0 characters"),
    "empty zip": (["empty.zip"], "0 characters"),
    "one character": (["one.txt"], "too few"),
    "two good, one missing": (["good.txt", "nowhere.txt"], "nowhere.txt"),
    "unknown tokenizer": (["good.txt", "--tokenizer=gpt3"], "gpt2"),
    "upper case tokenizer": (["good.txt", "--tokenizer=GPT2"], "gpt2"),
    "strange tokenizer": (["good.txt", "--tokenizer=../x"], "../x"),
    "fraction 2": (["good.txt", "--val_fraction=2"], "--val_fraction=2"),
    "fraction 0": (["good.txt", "--val_fraction=0"], "--val_fraction=0"),
    "fraction 1": (["good.txt", "--val_fraction=1"], "--val_fraction=1"),
    "fraction -1": (["good.txt", "--val_fraction=-1"], "--val_fraction=-1"),
    "fraction nan": (["good.txt", "--val_fraction=nan"], "nan"),
    "fraction word": (["good.txt", "--val_fraction=ten%"], "ten%"),
    "too much for validation": (["good.txt", "--val_fraction=0.9999999"], "too few"),
    "NUL bytes": (["nul.txt"], "NUL"),
    "not UTF-8": (["latin.txt"], "byte 0xe9 in position 3"),
    "not UTF-8, for BPE": (["latin.txt", "--tokenizer=gpt2"], "--tokenizer=byte"),
    "cut UTF-8": (["cut.txt"], "cut.txt"),
    "cut UTF-8 after a BOM": (["cutbom.txt"], "cutbom.txt"),
    "ftp": (["ftp://127.0.0.1/a.txt"], "ftp://"),
    "file URL": (["file:///etc/passwd"], "file://"),
    "no host": (["http://"], "http://"),
    "no source in quotes": ([""], "no file"),
    "half an IPv6 address": (["http://[::1"], "[::1"),
    "strange port": (["http://127.0.0.1:notaport/x"], "notaport"),
    "name with a path": (["good.txt", "--name=../x"], "--name=../x"),
    "name with a slash": (["good.txt", "--name=a/b"], "--name=a/b"),
    "name with a backslash": (["good.txt", "--name=a\\b"], "--name"),
    "absolute name": (["good.txt", "--name=/tmp"], "--name=/tmp"),
    "dots": (["good.txt", "--name=.."], "--name=.."),
    "dot": (["good.txt", "--name=."], "--name=."),
    "the downloads' name": (["good.txt", "--name=downloads"], "downloads"),
    "newline in a name": (["good.txt", "--name=a\nb"], "--name"),
    "a folder of the user's": (["good.txt", "--name=precious"], "diary.txt"),
    "a file in the way": (["good.txt", "--name=file"], "data/file"),
    "unknown flag": (["good.txt", "--tokeniser=char"], "--tokeniser"),
    "flag of another script": (["good.txt", "--val-fraction=0.1"], "--val-fraction"),
    "flag without a value": (["good.txt", "--tokenizer"], "expected one argument"),
    "broken XML": (["broken.xml"], "broken.xml"),
    "XML without a body": (["nobody.xml"], "rename it to .txt"),
    "XML with an empty body": (["nothing.xml"], "rename it to .txt"),
    "XML that reads files": (["external.xml"], "entity"),
    "unknown entity": (["entity.xml"], "&nosuch;"),
    "not gzip": (["fake.txt.gz"], "fake.txt.gz"),
    "cut gzip": (["cut.txt.gz"], "cut.txt.gz"),
    "corrupt gzip": (["corrupt.txt.gz"], "corrupt.txt.gz"),
    "corrupt zip": (["corrupt.zip"], "corrupt.zip"),
    "binary in a zip": (["binary.zip"], "binary.zip:image.png"),
}


def make_mistakes():
    """The files that the mistakes above name, and a data folder to leave as it is."""
    noise = random.Random(1).randbytes(4000)
    zipped = gzip.compress(noise)
    files = {
        "good.txt": b"all work and no play makes jack a dull boy\n" * 10,
        "empty.txt": b"", "one.txt": b"x", "empty.txt.gz": gzip.compress(b""),
        "nul.txt": b"abc\0def", "latin.txt": b"caf\xe9 au lait", "cut.txt": b"a\xe6\x97",
        "cutbom.txt": b"\xef\xbb\xbfa\xe6",
        "broken.xml": b"<TEI><body><p>never closed</body></TEI>", "nobody.xml": b"<rss><item>news</item></rss>",
        "nothing.xml": b"<TEI><teiHeader><head>x</head></teiHeader><body><head/><note>x</note></body></TEI>",
        "external.xml": b'<!DOCTYPE x [<!ENTITY a SYSTEM "good.txt">]><TEI><body><p>&a;</p></body></TEI>',
        "entity.xml": b'<!DOCTYPE x SYSTEM "x.dtd"><TEI><body><p>&nosuch;</p></body></TEI>',
        "fake.txt.gz": b"just text", "cut.txt.gz": zipped[:-100], "corrupt.txt.gz": zipped[:50] + b"\0\0" + zipped[52:],
        "data/precious/diary.txt": b"mine", "data/file": b"mine",
    }  # fmt: skip
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Path("empty").mkdir()
    for name, member, content in (
        ("empty.zip", None, b""), ("binary.zip", "image.png", b"\x89PNG\r\n\0"), ("corrupt.zip", "a.txt", b"x" * 99)
    ):  # fmt: skip
        with zipfile.ZipFile(name, "w") as archive:
            if member:
                archive.writestr(member, content)
    data = bytearray(Path("corrupt.zip").read_bytes())
    data[60] ^= 1  # in the stored member, whose CRC now differs
    Path("corrupt.zip").write_bytes(data)
    run("good.txt")
    for name in ("gpt2", "byte"):
        os.makedirs(f"data/{name}", exist_ok=True)


@pytest.mark.parametrize("argv, needle", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_destroys_nothing(argv, needle, capsys, tiny_tiktoken):
    make_mistakes()
    before = everything(".")
    capsys.readouterr()
    refused(*argv)
    one_line(capsys, needle)
    assert everything(".") == before and not Path("../x").exists()


def test_the_command_itself():
    """As a user starts it. Importing prints nothing and needs neither torch nor the network's packages."""
    command = [sys.executable, str(ROOT / "prepare.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("--tokenizer", "--name", "--val_fraction", "python prepare.py tinystories", *prepare.CORPORA):
        assert word in shown
    assert max(map(len, shown.splitlines())) < 120
    wrong = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    probe = "import sys, prepare; print([m for m in ('torch', 'tiktoken', 'requests') if m in sys.modules])"
    quiet = subprocess.run([sys.executable, "-c", probe, "--nonsense"], capture_output=True, text=True, cwd=ROOT)
    assert (quiet.stdout, quiet.stderr) == ("[]\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, from a server that misbehaves as it is told


class Server(http.server.ThreadingHTTPServer):
    """answers: what to do with each request in turn, the last one again and again. seen: the headers of each."""

    daemon_threads = True

    def __init__(self, body: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.answers, self.seen, self.etag = body, ["whole"], [], '"one"'
        self.url = f"http://127.0.0.1:{self.server_port}/book.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.seen.append(dict(self.headers))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        body, start, kind = server.body, 0, "text/plain"
        if isinstance(answer, int):
            return self.send_error(answer)
        if answer == "range" and self.headers.get("Range") == f"bytes={len(body)}-":
            return self.send_error(416)
        if answer == "html":
            body, kind = b"<!DOCTYPE html><html>Please log in</html>", "text/html"
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and answer in ("whole", "drop") and self.headers.get("If-Range") == server.etag:
            start = int(asked[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        if answer != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        if answer != "no validator":
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[start : (start + len(body)) // 2 if answer in ("drop", "drop, no range") else None])
        self.close_connection = True


BOOK = "".join(f"line {i} of a long book\n" for i in range(40_000)).encode()


@pytest.fixture
def server():
    with Server(BOOK) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def downloads() -> list[str]:
    return sorted(path.name for path in Path("data/downloads").glob("*") if path.suffix != ".lock")


def test_a_download_and_then_no_other(server):
    meta = run(server.url)
    assert decoded("char") == BOOK and meta["source"] == [server.url] and meta["corpus"] == "book.txt"
    run(server.url, "--tokenizer=byte")
    assert len(server.seen) == 1 and len(downloads()) == 1


@pytest.mark.parametrize("answers", [[500, 503, "whole"], [429, "whole"], ["drop, no range", "whole"], ["no length"]])
def test_a_passing_fault_is_retried(server, answers):
    server.answers = answers
    run(server.url)
    assert decoded("char") == BOOK and len(downloads()) == 1


def test_a_dropped_download_is_resumed(server):
    server.answers = ["drop", "drop", "drop", "whole"]
    run(server.url)
    assert decoded("char") == BOOK
    starts = [int(seen["Range"][len("bytes=") : -1]) for seen in server.seen[1:]]
    assert len(starts) == 3 and starts == sorted(starts) and starts[0] > len(BOOK) // 3
    assert "Range" not in server.seen[0] and server.seen[1]["If-Range"] == '"one"'


def test_a_killed_download_is_resumed_by_the_next_run(server, capsys):
    server.answers = ["drop", 500]
    assert prepare.main([server.url]) == 2
    one_line(capsys, "500")
    assert not Path("data/char").exists()
    server.answers, server.seen[:] = ["whole"], []
    run(server.url)
    assert decoded("char") == BOOK and int(server.seen[0]["Range"][len("bytes=") : -1]) > len(BOOK) // 3


def test_a_file_that_changed_is_not_continued(server, capsys):
    server.answers = ["drop", 500]
    assert prepare.main([server.url]) == 2
    server.body, server.etag, server.answers = BOOK[::-1], '"two"', ["whole"]
    run(server.url)
    assert decoded("char") == BOOK[::-1]


def test_a_server_that_cannot_be_resumed(server, capsys):
    server.answers = ["drop, no range", 500]
    assert prepare.main([server.url]) == 2
    server.answers = ["no validator"]
    run(server.url)
    assert decoded("char") == BOOK


def test_a_log_in_page_does_not_spoil_what_was_begun(server, capsys):
    server.answers = ["drop", 500]
    assert prepare.main([server.url]) == 2
    begun = everything("data/downloads")
    server.answers = ["html"]
    assert prepare.main([server.url]) == 2
    assert everything("data/downloads") == begun and len(begun) == 2


@pytest.mark.parametrize(
    "answer, needle",
    [(404, "404"), (403, "403"), (500, "500"), ("html", "web page"),
     ("drop, no range", "IncompleteRead")],
)  # fmt: skip
def test_what_cannot_be_downloaded_is_one_line_and_no_data(server, capsys, answer, needle):
    server.answers = [answer]
    assert prepare.main([server.url]) == 2
    one_line(capsys, "127.0.0.1", needle)
    assert not Path("data/char").exists()
    assert not [name for name in downloads() if not name.endswith((".part", ".etag"))]
    assert len(server.seen) == (4 if answer in (500, "drop, no range") else 1)


def known(monkeypatch, url: str, sha256: str | None, name="shakespeare"):
    monkeypatch.setitem(prepare.CORPORA, name, (url, sha256))


def test_a_checksum_is_checked(server, capsys, monkeypatch):
    known(monkeypatch, server.url, hashlib.sha256(BOOK).hexdigest())
    assert run("shakespeare")["corpus"] == "shakespeare"
    assert run()["corpus"] == "shakespeare" and len(server.seen) == 1
    Path("data/downloads", downloads()[0]).unlink()
    server.body = BOOK + b"!"
    data = everything("data/char")
    capsys.readouterr()
    assert prepare.main(["shakespeare"]) == 2
    one_line(capsys, "SHA-256")
    assert everything("data/char") == data and not [name for name in downloads() if not name.endswith(".etag")]


def test_a_part_that_was_complete_is_kept(server, monkeypatch):
    """A run that was killed before the .part file got its name."""
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare.main([server.url]) == 130
    assert os.replace is replace
    server.answers = ["range"]
    run(server.url)
    assert decoded("char") == BOOK and len(server.seen) == 2 and len(downloads()) == 1


def test_a_resumed_file_with_the_wrong_checksum_is_fetched_afresh(server, monkeypatch):
    known(monkeypatch, server.url, hashlib.sha256(BOOK).hexdigest())
    server.body, server.answers = BOOK.upper(), ["drop", 500]
    assert prepare.main(["shakespeare"]) == 2
    server.body, server.answers = BOOK, ["whole"]  # another file, with the same ETag
    assert prepare.main(["shakespeare"]) == 2
    run("shakespeare")
    assert decoded("char") == BOOK


# ----------------------------------------------------------------------------------------------------------------------
# Offline


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_pydocs_instead(capsys):
    meta = run()
    line = one_line(capsys, "offline", "shakespeare", "pydocs")
    assert meta["corpus"] == "pydocs" and meta["source"] == ["pydocs"] and meta["note"] in line
    assert decoded("char").startswith(b'The "assert" statement')
    return line


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_offline_pydocs_is_used_instead(host, capsys, monkeypatch):
    known(monkeypatch, f"http://{host}:{closed_port()}/input.txt", "0" * 64)
    assert host in assert_pydocs_instead(capsys)
    assert prepare.main(["shakespeare"]) == 2  # asked for by name, it fails instead
    one_line(capsys, host)


@pytest.mark.parametrize("answer", [404, 500, "html"])
def test_a_server_that_is_no_use_is_as_good_as_offline(server, answer, capsys, monkeypatch):
    known(monkeypatch, server.url, None)
    server.answers = [answer]
    assert_pydocs_instead(capsys)


def test_ranks_that_cannot_be_fetched(capsys, monkeypatch):
    def offline(name):
        raise OSError("no network")

    Path("a.txt").write_text("some text")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare.main(["a.txt", "--tokenizer=gpt2"]) == 2
    one_line(capsys, "no network", "gpt2", "char")
    assert not Path("data").exists()
