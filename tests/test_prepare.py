"""prepare.py: the bins hold the text, failures leave the old data, downloads are resumed and checked."""
import gzip
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

EOT = "<|endoftext|>"
tiktoken = pytest.importorskip("tiktoken")
regex = pytest.importorskip("regex")  # tiktoken requires it

# The patterns of tiktoken's openai_public.py (MIT licence, OpenAI), on which prepare.BOUNDARY relies.
O200K_UPPER, O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_WORDS = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{O200K_UPPER}{a}{O200K_LOWER}{b}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                       for a, b in ("*+", "+*"))
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                   r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": O200K_WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SAMPLE = "First Citizen:\r\nBefore we proceed… hear me speak. 日本語。\n\nAll:\n\tSpeak, it's 1234567!\n" * 5


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tiny_encoding(name):
    """A tiktoken encoding with the real pattern, whose merges are all pairs of some common bytes."""
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


def run(*argv):
    """Run prepare.py, which must succeed. Returns its meta.json."""
    argv = [str(arg) for arg in argv]
    assert prepare.main(argv) == 0
    flags = dict(arg.removeprefix("--").split("=") for arg in argv if arg.startswith("--"))
    return json.loads(Path("data", flags.get("name", flags.get("tokenizer", "char")), "meta.json").read_text("utf-8"))


def decoded(name):
    """The text in data/NAME."""
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


def everything(folder="data"):
    """The contents of every file in a folder."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert not [word for word in words if word not in error], error
    return error


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


def test_an_unknown_character_is_named():
    assert prepare.CharTokenizer("abc").encode("cab") == [2, 0, 1]
    for chars, text, name in (("abc", "abXb", r"'X' \(U\+0058\)"), ("abc", "aéb", r"'é' \(U\+00E9\)"),
                              ("".join(map(chr, range(300))), "ab日", "'日'")):
        with pytest.raises(prepare.UserError, match=name):
            prepare.CharTokenizer(chars).encode(text)


# Chunks

ATOMS = st.sampled_from(
    [" ", "  ", "     ", "\n", "\n\n", "\r\n", "\r", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u2028", "\u200b",
     "a", "the", "I", "'s", "'LL", "'", "é", "e\u0301", "\u0301", "ж", "Я", "ſ", "๑", "ไทย", "한국어", "日本", "。",
     "ー", "！", "👍🏽", "🏳️\u200d🌈", "\ufeff", "\u0378", "\U0001e4d0", "1", "23", "٣", "½", ".", "!", "...", "<", "/",
     "//", "(", ")", "=", "_", "|", "<|", "|>", "endoftext", "<|endof", EOT, "<|fim_prefix|>"])
TEXTS = st.lists(st.one_of(ATOMS, st.text(max_size=3)), max_size=60).map("".join)


def in_pieces(text, size):
    """The text split at boundaries, from chunks of `size` characters."""
    chunks = [text[i:i + size].encode() for i in range(0, len(text), size)]
    return [piece.decode() for piece in prepare.split_at_boundaries(chunks)]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=400)
@given(TEXTS.map(lambda text: text.encode("utf-8", "ignore").decode()), st.integers(2, 40))
def test_chunks_do_not_change_a_token(name, text, size):
    pattern = regex.compile(PATTERNS[name].replace("$", r"\Z"))  # Python's $ also matches before a last newline
    pieces = in_pieces(text, size)
    assert "".join(pieces) == text
    assert [p for piece in pieces for p in pattern.findall(piece)] == pattern.findall(text)


def test_text_of_every_kind_is_split():
    for text in ["word " * 9, "line\n" * 9, "これは日本語の文章です。" * 9, '{"a":1,"b":2}' * 9, f"a{EOT}" * 9]:
        assert len([piece for piece in in_pieces(text, 20) if piece]) > 1, text
    assert "".join(in_pieces("a" * 8, 4)) == "a" * 8  # nowhere to split


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
    encoder = prepare.tokenizer_from_spec(meta["tokenizer"])
    for split, part in (("train", SAMPLE[:n_train]), ("val", SAMPLE[n_train:])):
        assert np.fromfile(f"data/{tokenizer}/{split}.bin", meta["dtype"]).tolist() == encoder.encode(part)
    if tokenizer == "char":
        assert meta["tokenizer"]["chars"] == "".join(sorted(set(SAMPLE))), "the ids are nanoGPT's"
    keys = "format corpus source corpus_sha256 characters tokenizer vocab_size dtype tokens bytes"
    assert set(meta) == set(keys.split())
    assert meta["format"] == 1 and meta["characters"] == len(SAMPLE) and meta["source"] == ["a.txt"]


@settings(max_examples=100)
@given(st.binary(min_size=2, max_size=60), st.integers(4, 20), st.sampled_from(["0.1", "0.5", "0.9"]))
def test_the_byte_tokenizer_accepts_any_bytes(monkeypatch, data, chunk, fraction):
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


def test_a_folder_of_prepared_data_is_not_input():
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


def test_tei_text():
    Path("a.xml").write_text(
        """<?xml version="1.0"?><!DOCTYPE TEI SYSTEM "tei.dtd">
        <TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><p>Header.</p></teiHeader><text><front><p>Front.</p></front>
        <body><div><head>Letter  1</head><p>Dear <name>Att</name>icus,<pb n="1"/>
        all is<note>A note, <p>with a paragraph</p>.</note> well &amp; good&mdash;
        the <abbr>e<expan>x</expan>nd</abbr>.</p><p>Bye.</p></div>
        <div><label>Letter 2</label><quote><l>Arma &amacr; &lt; &#233;</l><l>cano</l></quote></div></body>
        <back><head>Index</head></back></text></TEI>""",
        encoding="utf-8",
    )
    run("a.xml")
    assert decoded("char").decode() == (
        "Letter 1\nDear Atticus, all is well & good— the end.\nBye.\n\nLetter 2\nArma ā < é\ncano\n"
    )


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_files_that_are_not_text_are_skipped(packed, capsys):
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
    run(source, "--tokenizer=byte")  # still reads XML and .gz
    assert b"PNG" in decoded("byte") and b"caf\xe9" in decoded("byte")


def test_a_document_whose_end_is_not_text_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("fine")
    Path("notes/b.txt").write_bytes(b"fine so far\xff")
    assert prepare.main(["notes"]) == 2
    one_line(capsys, "b.txt")


# Failures

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


def test_help():
    """Of the script in a process of its own, which imports no torch and no optional package."""
    program = "import sys, prepare; print([m for m in ('torch', 'tiktoken', 'requests') if m in sys.modules]); " \
              "prepare.main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    assert shown.startswith("[]\n") and max(map(len, shown.splitlines())) < 120
    for word in ("--tokenizer", "--name", "--val_fraction", "python prepare.py tinystories", *prepare.CORPORA):
        assert word in shown


# Downloads

BOOK = "".join(f"line {i} of a long book\n" for i in range(40_000)).encode()


@pytest.fixture
def book(server):
    """The URL of a text on the server."""
    server.files["book.txt"] = BOOK
    return f"{server.url}/book.txt"


def downloads():
    return sorted(path.name for path in Path("data/downloads").glob("*"))


def positions(server):
    """The first byte of each request for a part of the file, 0 for all of it."""
    return [int(headers.get("Range", "bytes=0-")[len("bytes="):-1]) for _, headers in server.seen]


def test_a_file_is_downloaded_once(server, book):
    meta = run(book)
    assert decoded("char") == BOOK and meta["source"] == [book] and meta["corpus"] == "book.txt"
    run(book, "--tokenizer=byte")
    assert len(server.seen) == 1 and len(downloads()) == 1


@pytest.mark.parametrize("answers", [[500, 503, ""], [429, ""], ["drop, no range", "no range"], ["no length"]])
def test_a_temporary_failure_is_retried(server, book, answers):
    server.answers = answers
    run(book)
    assert decoded("char") == BOOK and len(downloads()) == 1


def test_a_dropped_download_is_resumed(server, book):
    server.answers = ["drop", "drop", "drop", ""]
    run(book)
    assert decoded("char") == BOOK
    first, *later = positions(server)
    assert first == 0 and len(later) == 3 and later == sorted(later) and later[0] > len(BOOK) // 3
    assert server.seen[1][1]["If-Range"] == '"one"'


def test_an_interrupted_download_is_resumed_by_the_next_run(server, book, capsys):
    server.answers = ["drop", 500]
    assert prepare.main([book]) == 2
    one_line(capsys, "500")
    begun = everything("data/downloads")
    server.answers = ["html"]
    assert prepare.main([book]) == 2
    assert everything("data/downloads") == begun and len(begun) == 2, "a log-in page changes nothing"
    server.answers, server.seen[:] = [""], []
    run(book)
    assert decoded("char") == BOOK and positions(server)[0] > len(BOOK) // 3


def test_a_file_that_changed_is_downloaded_again(server, book):
    server.answers = ["drop", 500]
    assert prepare.main([book]) == 2
    server.files["book.txt"], server.etag, server.answers = BOOK[::-1], '"two"', [""]
    run(book)
    assert decoded("char") == BOOK[::-1]


def test_a_download_from_a_server_without_ranges_begins_again(server, book):
    server.answers = ["drop, no range", 500]
    assert prepare.main([book]) == 2
    server.answers = ["no etag, no range"]
    run(book)
    assert decoded("char") == BOOK


@pytest.mark.parametrize("answer, word, tries", [(404, "404", 1), (403, "403", 1), (500, "500", 4),
                                                 ("html", "web page", 1), ("drop, no range", "ChunkedEncoding", 4)])
def test_a_failed_download_is_one_line(server, book, capsys, answer, word, tries):
    server.answers = [answer]
    assert prepare.main([book]) == 2
    one_line(capsys, "127.0.0.1", word)
    assert not Path("data/char").exists() and len(server.seen) == tries
    assert not [name for name in downloads() if not name.endswith((".part", ".etag"))]


def test_a_checksum_is_checked(server, book, capsys, monkeypatch):
    monkeypatch.setitem(prepare.CORPORA, "shakespeare", (book, hashlib.sha256(BOOK).hexdigest()))
    assert run("shakespeare")["corpus"] == run()["corpus"] == "shakespeare" and len(server.seen) == 1
    Path("data/downloads", downloads()[0]).unlink()
    data = everything("data/char")
    server.files["book.txt"], server.answers = BOOK.upper(), ["drop", 500]
    assert prepare.main(["shakespeare"]) == 2
    server.files["book.txt"], server.answers = BOOK, [""]  # another file with the same ETag
    capsys.readouterr()
    assert prepare.main(["shakespeare"]) == 2
    one_line(capsys, "SHA-256")
    assert everything("data/char") == data and not [name for name in downloads() if not name.endswith(".etag")]
    run("shakespeare")
    assert decoded("char") == BOOK


def test_a_complete_part_is_not_downloaded_again(server, book, monkeypatch):
    """Of a run that was killed before it renamed the file."""
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert prepare.main([book]) == 130
    run(book)
    assert decoded("char") == BOOK and positions(server) == [0, len(BOOK)] and len(downloads()) == 1


# Offline

@pytest.mark.parametrize("answer", ["offline", 404, "html"])
def test_without_the_network_pydocs_is_the_default(server, book, answer, capsys, monkeypatch):
    server.answers = [answer]
    if answer == "offline":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            book = f"http://127.0.0.1:{free.getsockname()[1]}/book.txt"
    monkeypatch.setitem(prepare.CORPORA, "shakespeare", (book, None))
    meta = run()
    assert meta["note"] in one_line(capsys, "offline", "shakespeare", "pydocs", "127.0.0.1")
    assert meta["corpus"] == "pydocs" and meta["source"] == ["pydocs"]
    assert decoded("char").startswith(b'The "assert" statement')
    assert prepare.main(["shakespeare"]) == 2, "an error if named"


def test_a_tokenizer_that_cannot_be_downloaded_is_one_line(capsys, monkeypatch):
    def offline(name):
        raise OSError("no network")

    Path("a.txt").write_text("some text")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare.main(["a.txt", "--tokenizer=gpt2"]) == 2
    one_line(capsys, "no network", "gpt2", "char")
    assert not Path("data").exists()
