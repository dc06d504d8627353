"""Turn text into the token files that train.py reads.

    python prepare.py                                    tiny Shakespeare, one token per character
    python prepare.py --tokenizer=gpt2                   the same text in GPT-2's byte-pair tokens
    python prepare.py notes/ diary.txt --name=mine       your own files and folders, into data/mine/
    python prepare.py tinystories --tokenizer=gpt2       a known corpus, downloaded once (--help lists them)
    python prepare.py https://example.org/book.txt.gz    anything that a URL points at
    python prepare.py fineweb --shards=25                2.5 billion tokens of the web, ready-made, into data/fineweb/

Each makes data/NAME/ with train.bin and val.bin, headerless token ids in the smallest of uint8, uint16 and uint32 that
holds the vocabulary, and meta.json, which says what they hold and how to decode them. NAME defaults to the tokenizer's.
fineweb is tokenized already: its shards are checked and kept as they come, and meta.json lists them.

The text is streamed twice, so its size does not matter: the first pass counts characters and finds the alphabet, the
second encodes. What is written appears under data/NAME/ all at once, or not at all.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import gzip
import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from xml.parsers import expat

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# Corpora that are known by name


class Corpus(NamedTuple):
    description: str
    url: str | None  # None: it is not downloaded
    sha256: str | None = None  # of the file at url; None where that file may change


CORPORA = {
    "shakespeare": Corpus(
        "tiny Shakespeare, 1.1 MB of plays (the default)",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "pydocs": Corpus("Python's language reference, 0.5 MB that every CPython carries: needs no network", None),
    "atticus": Corpus(
        "Cicero's letters to Atticus, 0.8 MB of Latin with some Greek",
        "https://raw.githubusercontent.com/PerseusDL/canonical-latinLit/1066a551aa5445ab165e9b490a6bb06ce72828da"
        "/data/phi0474/phi057/phi0474.phi057.perseus-lat1.xml",
        "82e361a4dcf554470eab9daba9cc02b0e0ea34d13dc4ae3bf35ea98d2b18f3fe",
    ),
    "tinystories": Corpus(
        "TinyStories, 2.2 GB of small children's stories written by GPT-4",
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
    ),
    "fineweb": Corpus(
        "the web in GPT-2 tokens: --shards=N (1 to 103) of 100 million, 0.2 GB each, and one to validate",
        "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2",
    ),
    "enwik8": Corpus("the first 100 MB of a Wikipedia dump, markup included", "http://mattmahoney.net/dc/enwik8.zip"),
}

GPT2S = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
GPT2S["distilgpt2"] = "distilbert/distilgpt2"
DATA = Path("data")  # in the current directory, as train.py has it
DOWNLOADS = DATA / "downloads"
BINS = ("train.bin", "val.bin", "meta.json")  # all that a folder of ours holds
SHARDS = ("fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 104)))
SHARD_HEADER, SHARD_BYTES = 1024, 200_001_024  # 256 int32; and about what a whole shard has
EOT = "<|endoftext|>"
CHUNK = 1 << 18  # bytes read and encoded at a time
OFFLINE_SECONDS = 13.0  # the quick start waits this long for Shakespeare before it goes on with pydocs
RETRY_SECONDS = (1, 2, 4)  # pauses before the second, third and fourth try of a download that makes no headway


class UserError(Exception):
    """A mistake or a circumstance that the user can mend: shown as one line, without a traceback."""


def near_match(value: str, options, cutoff=0.6) -> str:
    """near_match("shakespear", CORPORA) -> "; did you mean shakespeare?", or "" where nothing is close."""
    found = difflib.get_close_matches(value.lower(), list(options), 1, cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def bounded(seconds: float, function, *args):
    """Return function(*args), or raise TimeoutError after that many seconds.

    DNS look-ups and tiktoken's own downloads take no time limit. The thread left behind dies with the process.
    """
    future, end = Future(), time.monotonic() + seconds

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done() and time.monotonic() < end:
        wait([future], 0.1)  # short, because Windows delivers Ctrl-C only between waits
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return future.result()


NETWORK_SIGNS = {  # a pattern in what requests raises -> what it means to a person
    "NameResolution|getaddrinfo": "the name {} could not be looked up",
    "ProxyError": "the proxy on the way to {} could not be used",
    "refused": "{} refused the connection",
    "ConnectTimeout": "{} did not answer",
    "ead timed out": "{} stopped answering",
    "IncompleteRead|Connection aborted": "{} broke off the connection",
    "SSLError": "the certificate of {} was not accepted",
}


def network_reason(error: Exception) -> str:
    """A requests exception in a few words; its own are full of pool names and object addresses."""
    url = getattr(getattr(error, "request", None), "url", None)
    host = (urlsplit(url).hostname if url else None) or "the server"
    text = f"{type(error).__name__}: {error}"
    for sign, meaning in NETWORK_SIGNS.items():
        if re.search(sign, text):
            return meaning.format(host)
    return re.sub(r"<[^<>]* at 0x\w+>:? ?", "", text)[:200]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: text <-> ids


class Tokenizer:
    """What the three kinds have in common. spec is what tokenizer_from_spec() makes the same tokenizer from."""

    spec: dict
    vocab_size: int
    eot = None  # the id of <|endoftext|>, where there is one
    text_only = True  # the bytes it encodes must be UTF-8
    separator = b"\n\n"  # between documents

    def decode(self, ids) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids outside of the vocabulary decode to nothing."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_stream(self, chunks):
        """Byte chunks, each of whole characters unless not text_only -> arrays of ids."""
        return on_all_cores(self.encode_chunk, chunks)


class CharTokenizer(Tokenizer):
    """One token per character. CharTokenizer("abc").encode("cab") -> [2, 0, 1]"""

    def __init__(self, chars: str):
        self.chars = chars
        self.spec = {"kind": "char", "chars": chars}
        self.vocab_size = len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a character that is not in the vocabulary."""
        for char in text:
            if char not in self.ids:
                advice = "leave it out, or prepare the data with --tokenizer=byte, which knows them all"
                if set(unicodedata.normalize("NFC", text)) <= self.ids.keys():
                    advice = "its letters and their accents are apart: give them composed, in Unicode's form NFC"
                known = f"the {self.vocab_size} of this tokenizer"
                raise UserError(f"the character {char!r} (U+{ord(char):04X}) is not among {known}; {advice}")
        return [self.ids[char] for char in text]

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.chars[i] for i in map(int, ids) if 0 <= i < self.vocab_size).encode("utf-8")

    @cached_property
    def by_code_point(self) -> np.ndarray:
        table = np.zeros(sys.maxunicode + 1, id_dtype(self.vocab_size))
        table[code_points(self.chars)] = np.arange(self.vocab_size)
        return table

    def encode_chunk(self, chunk: bytes) -> np.ndarray:
        if self.by_code_point.itemsize == 1 and chunk.isascii():  # several times the speed of the other way
            return np.frombuffer(chunk.translate(self.by_code_point[:256].tobytes()), np.uint8)
        return self.by_code_point.take(code_points(chunk.decode("utf-8")), mode="clip")  # clip: no check of each index


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: any file, and no unknown character ever."""

    spec = {"kind": "byte"}
    vocab_size = 256
    text_only = False

    def encode(self, text: str) -> list[int]:
        # A command line that is not UTF-8 reaches Python as lone surrogates, which stand for the original bytes.
        try:
            return list(text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError as error:
            raise UserError(f"{text[error.start]!r} is half of a character; leave it out") from None

    def decode_bytes(self, ids) -> bytes:
        return bytes(i for i in map(int, ids) if 0 <= i < 256)

    def encode_stream(self, chunks):
        return (np.frombuffer(chunk, np.uint8) for chunk in chunks)


class BPETokenizer(Tokenizer):
    """One of tiktoken's encodings by its name. BPETokenizer("gpt2").encode("hello world") -> [31373, 995]

    <|endoftext|> is its one special token; the text of any other is encoded as ordinary text.
    Raises UserError where tiktoken or its ranks file cannot be had.
    """

    def __init__(self, name: str):
        try:
            import tiktoken

            self.encoding = bounded(60, tiktoken.get_encoding, name)
        except ImportError:
            raise UserError(f"the {name} tokenizer needs tiktoken: pip install tiktoken") from None
        except Exception as error:  # tiktoken lets through whatever its download, cache or check raised
            raise UserError(
                f"the ranks of {name} could not be fetched ({network_reason(error)}); where there is no network, set "
                "TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached them, or use --tokenizer=char"
            ) from None
        self.spec = {"kind": "tiktoken", "encoding": name}
        self.vocab_size = self.encoding.n_vocab
        special = {EOT} & self.encoding.special_tokens_set
        self.special = {"allowed_special": special, "disallowed_special": ()}
        if special:
            self.eot, self.separator = self.encoding.eot_token, EOT.encode()

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, **self.special)

    def decode_bytes(self, ids) -> bytes:
        pieces = []
        for i in map(int, ids):
            with contextlib.suppress(KeyError, OverflowError):  # cl100k_base has gaps even inside its vocabulary
                pieces.append(self.encoding.decode_single_token_bytes(i))
        return b"".join(pieces)

    def encode_stream(self, chunks):
        encode = partial(self.encoding.encode_to_numpy, **self.special)
        return on_all_cores(encode, pieces_at_boundaries(chunks))


def tokenizer_from_spec(spec: dict) -> Tokenizer:
    """Return the tokenizer that meta.json or a checkpoint describes: {"kind": "char", "chars": "abc"},
    {"kind": "byte"} or {"kind": "tiktoken", "encoding": "gpt2"}.

    A checkpoint may come from anyone, so nothing in it is believed. Raises UserError for anything else.
    """
    match spec:
        case {"kind": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"kind": "char", "chars": str(chars), **rest} if not rest:
            if chars and len(set(chars)) == len(chars) and not re.search("[\ud800-\udfff]", chars):
                return CharTokenizer(chars)
        case {"kind": "tiktoken", "encoding": str(name), **rest} if not rest:
            # No other name may reach get_encoding, so that a checkpoint cannot make it fetch a file of its choice.
            if name in tiktoken_names():
                return BPETokenizer(name)
            raise UserError(f"the installed tiktoken has no encoding {name[:80]!r}; pip install --upgrade tiktoken")
    raise UserError(f"this is no tokenizer: {str(spec)[:80]}; prepare the data again")


def tiktoken_names() -> list[str]:
    try:
        import tiktoken
    except ImportError:
        return []
    return tiktoken.list_encoding_names()


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and uint32 that holds the ids 0 .. vocab_size - 1, little-endian."""
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


# Where a text may be cut without changing a token of any OpenAI encoding. All of their patterns (gpt2, r50k and p50k;
# cl100k; o200k) begin a new piece at a space or tab that follows anything but white space, and at a line end or one of
# these signs that follows a letter or digit; none looks back across such a place. The white space and the letters here
# are those that every version of Unicode agrees on. No such place lies inside of <|endoftext|>.
LETTER = r"[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"  # Latin, kana, Chinese, Korean
BOUNDARY = re.compile(rf"(?<=\S)(?=[ \t])|(?<={LETTER})(?=[\r\n.,:;!?()<=+/。、，！？])")


def last_boundary(text: str) -> int:
    """The index of the last BOUNDARY in text, 0 if it has none: last_boundary("to be") -> 2"""
    for width in (4096, len(text)):  # nearly always there is one near the end
        if found := [match.start() for match in BOUNDARY.finditer(text, max(0, len(text) - width))]:
            return found[-1]
    return 0


def pieces_at_boundaries(chunks):
    """Byte chunks, each of whole characters -> strings that concatenate to the same text and encode to the same tokens.

    A chunk without a BOUNDARY is held until one comes, so memory is bounded for any text that has one every so often.
    """
    held = []
    for chunk in chunks:
        text = chunk.decode("utf-8")
        if cut := last_boundary(text):
            yield "".join((*held, text[:cut]))
            held.clear()
        held.append(text[cut:])
    yield "".join(held)


def on_all_cores(function, items):
    """Yield function(item) for each, in order, a few ahead of the reader. For functions that release the GIL."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ahead = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > cores + 4:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


# ----------------------------------------------------------------------------------------------------------------------
# Showing progress, and downloading


class Progress:
    """Bytes, MB/s and time left, on stdout: one line redrawn on a terminal, else a plain line every five seconds."""

    def __init__(self, label: str, done: int = 0, total: int | None = None):
        self.label, self.first, self.done, self.total = label, done, done, total
        self.began = self.shown = time.monotonic()
        self.live = sys.stdout.isatty()
        self.drawn = False

    def add(self, n: int):
        self.done += n
        now = time.monotonic()
        if now - self.shown < (0.25 if self.drawn and self.live else 1.0 if self.live else 5.0):
            return  # what is over within a second needs no progress line
        self.shown = now
        rate = max(1, self.done - self.first) / (now - self.began)
        whole, left = "", ""
        if self.total:
            seconds = max(0, int((self.total - self.done) / rate))
            whole, left = f" of {self.total / 1e6:,.1f}", f", {seconds // 60}:{seconds % 60:02d} left"
        line = f"{self.label}: {self.done / 1e6:,.1f}{whole} MB, {rate / 1e6:,.1f} MB/s{left}"
        print(f"\r{line:<79}" if self.live else line, end="" if self.live else "\n", flush=True)
        self.drawn = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.drawn and self.live:
            print()


@contextlib.contextmanager
def exclusive(path: Path, busy: str):
    """Hold the lock file at path, which the system frees even when the process is killed. Raises UserError(busy)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(busy) from None
            # else: a file system without locks, on which the user is trusted not to start two at once
        yield


class TryAgain(Exception):
    """A download failed in a way that another try may mend."""


def fetch(url: str, sha256: str | None = None, deadline: float = math.inf) -> Path:
    """Download url into DOWNLOADS once, and return the file's path. A file that is there is not asked for again.

    deadline is a time.monotonic() after which no more is tried. Raises UserError when the whole file cannot be had;
    what has arrived stays beside it as .part, and the next call goes on from there if the server still has that file.
    """
    base = re.sub(r"[^A-Za-z0-9._-]", "_", urlsplit(url).path.rsplit("/", 1)[-1])[-80:] or "index"
    path = DOWNLOADS.absolute() / f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{base}"
    part, stamp = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    if path.exists() and sha256 in (None, file_sha256(path)):
        return path
    pauses = RETRY_SECONDS if deadline == math.inf else RETRY_SECONDS[:1]
    failures = 0
    with exclusive(path.with_name(f".{path.name}.lock"), f"{url}: another prepare.py is downloading it; wait for it"):
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                transfer(url, part, stamp, deadline)
                if sha256 not in (None, found := file_sha256(part)):
                    part.unlink()
                    stamp.unlink()
                    if before == 0:
                        raise UserError(f"{url}: its SHA-256 is {found}, but the file that is known has {sha256}")
                    raise TryAgain("the resumed file has another SHA-256")  # it may have changed in between
                os.replace(part, path)
                stamp.unlink(missing_ok=True)
                return path
            except TryAgain as error:
                headway = part.exists() and part.stat().st_size > before
                failures = 1 if headway else failures + 1
                pause = pauses[failures - 1] if failures <= len(pauses) else math.inf
                if pause == math.inf or time.monotonic() + pause > deadline:
                    raise UserError(f"{url}: {error}") from None
                print(f"download: {error}; trying again in {pause} s", flush=True)
                time.sleep(pause)


def transfer(url: str, part: Path, stamp: Path, deadline: float):
    """Make part the whole file at url, from where an earlier try left off if the server says it is the same file.

    Raises TryAgain or, where trying again would be in vain, UserError.
    """
    try:
        import requests
    except ImportError:
        raise UserError("downloading needs requests: pip install requests") from None
    headers = {"Accept-Encoding": "identity"}  # or lengths and ranges would be those of a compressed body
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no part, or nothing known of it
        validator, have = json.loads(stamp.read_text(encoding="utf-8"))["validator"], part.stat().st_size
        if validator and have:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        with requests.get(url, stream=True, headers=headers, timeout=(5, 20)) as answer:
            have = body_start(answer, url, part)
            chunks = answer.iter_content(1 << 14)  # what a broken connection cuts of one is lost
            first = next(chunks, b"")
            if not have:
                refuse_web_page(url, answer.headers.get("Content-Type", ""), first)
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() and "Content-Encoding" not in answer.headers else None
            etag = answer.headers.get("ETag", "")
            validator = answer.headers.get("Last-Modified") if etag.startswith("W/") or not etag else etag
            stamp.write_text(json.dumps({"validator": validator}), encoding="utf-8")
            label = f"downloading {urlsplit(url).path.rsplit('/', 1)[-1][:30]}"
            with open(part, "ab" if have else "wb") as file, Progress(label, have, total) as progress:
                for chunk in itertools.chain([first], chunks):
                    if time.monotonic() > deadline:
                        raise UserError(f"{url}: only {progress.done:,} bytes came in time")
                    file.write(chunk)
                    progress.add(len(chunk))
                sync(file)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError) as error:
        raise UserError(f"{url}: not a URL that can be fetched ({network_reason(error)})") from None
    except requests.RequestException as error:
        raise TryAgain(network_reason(error)) from None
    size = part.stat().st_size
    if size == 0 or size > (total or size):
        part.unlink()
    if size == 0 or total not in (None, size):
        raise TryAgain(f"{size:,} bytes came" + (f", not {total:,}" if total else ""))


def body_start(answer, url: str, part: Path) -> int:
    """The offset in the file at which the answer's body begins: 0 or the part's size. Raises UserError and TryAgain."""
    have = part.stat().st_size if part.exists() else 0
    status = answer.status_code
    if status == 200:
        return 0
    if status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        return have
    if status in (206, 416):
        part.unlink(missing_ok=True)
        raise TryAgain("the server no longer has the file that was begun")
    sentence = f"the server answered {status} {answer.reason}"
    if status >= 500 or status in (408, 429):
        raise TryAgain(sentence)
    raise UserError(f"{url}: {sentence}")


def refuse_web_page(url: str, content_type: str, beginning: bytes):
    """A server's error page or a hotel's log-in page must never become a data set. Raises UserError."""
    start = beginning[:200].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    is_page = content_type.lower().startswith("text/html") or start.startswith((b"<!doctype html", b"<html"))
    if is_page and not urlsplit(url).path.lower().endswith((".html", ".htm")):
        raise UserError(f"{url}: the server sent a web page, not a file; a browser shows what it says")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_gpt2(name: str, waits: bool = False) -> Path:
    """The folder of a published GPT-2, fetched unless it is there, or waited for while another process fetches it.

    Raises UserError for an unknown name, or when it cannot be fetched.
    """
    folder = DATA / "hub" / name
    if name not in GPT2S:
        near = near_match(name, ["scratch", "resume", *GPT2S]) or f": {', '.join(GPT2S)}"
        raise UserError(f"neither scratch nor resume, nor a path that is there, nor a GPT-2{near}")
    while waits and not (folder / "model.safetensors").exists():  # the last of its files
        time.sleep(0.2)  # should the fetching fail, torchrun ends those that wait
    try:
        fetch_from_hub(GPT2S[name], ("config.json", "model.safetensors"), folder)
    except UserError as error:
        raise UserError(f"{error}; a copy of its files will do: --init_from=FOLDER") from None
    return folder


def fetch_from_hub(repository: str, names, folder: Path):
    """Download the named files of a public Hugging Face repository into folder, in this order. Raises UserError.

    The hub says the SHA-256 of its large files, in a header of the redirection. HF_ENDPOINT may name another hub.
    """
    for name in names:
        if (folder / name).exists():
            continue
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{hub}/{repository}/resolve/main/{name}"
        try:
            import requests

            asked = requests.head(url, allow_redirects=True, timeout=20)
            hashes = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in (*asked.history, asked)]
            path = fetch(url, next((h for h in hashes if re.fullmatch("[0-9a-f]{64}", h)), None))
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / name)
        except ImportError:
            raise UserError("downloading needs requests: pip install requests") from None
        except OSError as error:  # the disk's, and all of requests'
            raise UserError(f"{url}: {network_reason(error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Documents: from what the user named to one stream of bytes


class Document(NamedTuple):
    name: str  # what an error message calls it
    chunks: object  # chunks() -> an iterator over its bytes; called once a pass


class Source(NamedTuple):
    name: str  # for meta.json: short, and without the path of this machine
    origin: str
    documents: list[Document]


def find_source(text: str) -> Source:
    """Resolve one SOURCE argument. A known corpus wins over a file of that name: ./NAME means the file.

    Raises UserError where there is nothing of that name, or nothing in it.
    """
    if text in CORPORA:
        return known_corpus(text)
    if "://" in text:
        parts, path = checked_url(text), fetch(text)
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a password stays out of meta.json
        return Source(path.name.partition("-")[2], shown, documents_in(path))
    path = Path(text)
    if not text or not path.exists():  # "", which is what an unset variable gives, is not the folder we are in
        beside = [str(file) for file in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = near_match(text, beside, 0.8) or near_match(text, CORPORA)
        hint = hint or "; python prepare.py --help lists the corpora"
        raise UserError(f"there is no file, folder or known corpus {text!r}{hint}")
    name = Path(os.path.abspath(path)).name or text
    return Source(name, name, documents_in(path))


def checked_url(url: str):
    """The parts of a URL. Raises UserError where it is none that fetch() could take."""
    if url.partition("://")[0].lower() not in ("http", "https"):
        raise UserError(f"{url} cannot be fetched: only http:// and https:// can; for a local file give its path")
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError("it names no host")
        return parts
    except ValueError as error:
        raise UserError(f"{url} is not a URL: {error}") from None


def known_corpus(name: str, deadline: float = math.inf) -> Source:
    corpus = CORPORA[name]
    if corpus.url is not None:
        return Source(name, corpus.url, documents_in(fetch(corpus.url, corpus.sha256, deadline)))
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python carries no pydoc_data.topics; name another corpus, or files of your own") from None
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    documents = [Document(f"topic {key}", partial(iter, [topics[key].encode("utf-8")])) for key in sorted(topics)]
    return Source(name, f"pydoc_data.topics of Python {python}", documents)


def shakespeare_or_pydocs() -> tuple[Source, str | None]:
    """The quick start's text and, when Shakespeare cannot be had within OFFLINE_SECONDS, the sentence that says so."""
    deadline = time.monotonic() + OFFLINE_SECONDS
    try:
        return bounded(OFFLINE_SECONDS, known_corpus, "shakespeare", deadline), None
    except (UserError, TimeoutError) as error:
        reason = str(error).removeprefix(f"{CORPORA['shakespeare'].url}: ")
    note = f"OFFLINE: Shakespeare could not be fetched ({reason}); pydocs, Python's own reference, stands in for it"
    print(f"prepare.py: {note}", file=sys.stderr, flush=True)
    return known_corpus("pydocs"), note


def documents_in(path: Path) -> list[Document]:
    """A file is one document, a zip one for each member, a folder all of its files, sorted, but hidden ones.

    Raises UserError where that leaves none.
    """
    if path.is_dir():
        files, unlisted = [], []
        for folder, folders, names in os.walk(path, onerror=unlisted.append):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if not set(BINS) <= set(names):  # what prepare.py made is never its input
                files += [Path(folder, name) for name in names if not name.startswith(".")]
        if unlisted:
            raise unlisted[0]
        documents = [document for file in sorted(files, key=lambda file: file.parts) for document in documents_in(file)]
        if not documents:
            raise UserError(f"the folder {path} holds no files")
        return documents
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder")
    if path.suffix.lower() != ".zip":
        return [Document(str(path), partial(read_file, path))]
    with damage_reported(str(path)), zipfile.ZipFile(path) as archive:
        names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
    if not names:
        raise UserError(f"the archive {path} holds no files")
    return [Document(f"{path}:{name}", partial(read_file, path, name)) for name in names]


def read_file(path: Path, member: str | None = None):
    """Yield the bytes of a file or of a zip's member, decompressed, and of an XML file the text alone."""
    with damage_reported(f"{path}:{member}" if member else str(path)), contextlib.ExitStack() as opened:
        name = (member or path.name).lower()
        if member:
            file = opened.enter_context(opened.enter_context(zipfile.ZipFile(path)).open(member))
        else:
            file = opened.enter_context(open(path, "rb"))
        if name.endswith(".gz"):
            file = opened.enter_context(gzip.GzipFile(fileobj=file))
        chunks = iter(partial(file.read, CHUNK), b"")
        yield from tei_text(chunks) if name.removesuffix(".gz").endswith(".xml") else chunks


@contextlib.contextmanager
def damage_reported(name: str):
    """Turn what the standard library raises for an unreadable file into a UserError that names it."""
    try:
        yield
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, expat.ExpatError) as error:
        raise UserError(f"{name} is damaged, or not what its name says: {error}") from None
    except (RuntimeError, NotImplementedError, ValueError) as error:  # what zipfile does not do, and tei_text's
        raise UserError(f"{name} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None


# Elements that end a line; everything else is part of one.
TEI_LINES = set("ab body closer head item l label opener p row sp speaker stage trailer".split())
TEI_LEFT_OUT = {"note", "del", "fw", "figDesc"}  # editors' notes, deletions, page headers, descriptions of pictures
TEI_ALTERNATIVES = {"sic", "orig", "expan"}  # left out where the edition gives another reading beside them


def tei_text(chunks):
    """The text in the body of a TEI document, as bytes: a line for each paragraph or verse, white space made single.

    Raises ValueError for a document without a body, and for one that declares entities, which are how a small file
    becomes billions of laughs; expat.ExpatError for one that is not well formed. No other file is ever opened.
    """
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    path, line, done = [], [], []  # open elements, pieces of the line, finished lines
    bodies = left_out = 0  # depth inside of body elements, and inside of those whose text is not wanted

    def end_line():
        if words := "".join(line).split():
            done.append(" ".join(words) + "\n")
        line.clear()

    def start(name, attributes):
        nonlocal bodies, left_out
        name = name.rpartition(" ")[2]  # without its namespace
        alternative = name in TEI_ALTERNATIVES and path and path[-1] in ("choice", "abbr")
        bodies += name == "body"
        left_out += bool(left_out or alternative or name in TEI_LEFT_OUT)
        if name in TEI_LINES and not left_out:
            end_line()
            if bodies and name in ("head", "label"):
                done.append("\n")  # a letter or chapter begins
        path.append(name)

    def end(name):
        nonlocal bodies, left_out
        name = path.pop()
        if name in TEI_LINES and not left_out:
            end_line()
        left_out = max(0, left_out - 1)
        bodies -= name == "body"

    def characters(text):
        if bodies and not left_out:
            line.append(text)

    def skipped(name, is_parameter):  # an entity of a DTD that is not read, such as &mdash;
        if not is_parameter:
            text = html.unescape(f"&{name};")
            if text == f"&{name};":
                raise ValueError(f"nothing explains the entity &{name};, write the character itself")
            characters(text)

    def entity(name, is_parameter, *rest):
        if not is_parameter:
            raise ValueError(f"it declares the entity {name!r}, and no entities are taken; write it out")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = characters
    parser.SkippedEntityHandler, parser.EntityDeclHandler = skipped, entity
    found = False
    for chunk in itertools.chain(chunks, [None]):
        parser.Parse(b"" if chunk is None else chunk, chunk is None)
        text = "".join(done)
        text = text if found else text.lstrip("\n")
        done.clear()
        if text:
            found = True
            yield text.encode("utf-8")
    if not found:
        raise ValueError("there is no text in a TEI <body> in it; to keep an XML file as it is, rename it to .txt")


def checked(document: Document, text_only: bool):
    """Yield a document's bytes without a byte order mark. text_only: whole characters of UTF-8, or a UserError."""
    offset, rest = 0, b""
    for chunk in document.chunks():
        if offset == 0 and not rest and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk[3:], 3
        if not text_only:
            offset += len(chunk)
            yield chunk
            continue
        data, used = rest + chunk, len(rest) + len(chunk)
        advice = "save it as UTF-8, leave it out, or prepare it with --tokenizer=byte, which takes any bytes"
        if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{document.name} is UTF-16, not UTF-8: save it as UTF-8 "
                            f"(iconv -f UTF-16 -t UTF-8 {document.name} > new.txt)")
        if b"\0" in data:
            raise UserError(f"{document.name} is not text: byte 0x00 at offset {offset + data.index(0)}; {advice}")
        if not data.isascii():
            try:
                used = codecs.utf_8_decode(data, "strict", False)[1]  # all but a character that the chunk's end cuts
            except UnicodeDecodeError as error:
                byte = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
                raise UserError(f"{document.name} is not UTF-8 text: {byte}; {advice}") from None
        yield data[:used]
        offset, rest = offset + used, data[used:]
    if rest:
        raise UserError(f"{document.name} is not UTF-8 text: byte 0x{rest[0]:02x} at offset {offset}; {advice}")


def joined(documents: list[Document], tokenizer):
    """All documents as one stream of bytes, the tokenizer's separator between those that are not empty."""
    begun = False
    for document in documents:
        fresh = begun
        for chunk in checked(document, tokenizer.text_only):
            if chunk:
                if fresh:
                    yield tokenizer.separator
                fresh, begun = False, True
                yield chunk


# ----------------------------------------------------------------------------------------------------------------------
# The two passes: count, then split and encode


class Survey(NamedTuple):
    characters: int  # bytes that begin a character, so that bytes which are no UTF-8 can be counted too
    bytes: int
    sha256: str
    alphabet: str  # sorted; "" unless it was asked for


def begins_character(chunk: bytes) -> np.ndarray:
    return np.frombuffer(chunk, np.int8) >= -64  # the bytes 0b10xxxxxx, -128 to -65, continue one


def count_characters(chunk: bytes) -> int:
    return len(chunk) if chunk.isascii() else int(np.count_nonzero(begins_character(chunk)))


def survey(chunks, want_alphabet: bool) -> Survey:
    """The first pass over the text. Raises UserError where there is none."""
    digest = hashlib.sha256()
    characters = size = 0
    seen, known = np.zeros(sys.maxunicode + 1, bool), b""  # by code point, and the ASCII ones again
    with Progress("reading") as progress:
        for chunk in chunks:
            digest.update(chunk)
            characters += count_characters(chunk)
            size += len(chunk)
            if want_alphabet and (rest := chunk.translate(None, known)):  # known ASCII gone, the rest is still UTF-8
                seen[code_points(rest.decode("utf-8"))] = True
                known = bytes(np.flatnonzero(seen[:128]).tolist())
            progress.add(len(chunk))
    if size == 0:
        raise UserError("there is no text in what was given: it is empty")
    return Survey(characters, size, digest.hexdigest(), "".join(map(chr, np.flatnonzero(seen))))


def split_chunks(chunks, n_train: int):
    """Yield ("train", chunk) for the first n_train characters, then ("val", chunk) for the rest."""
    left = n_train
    split = "train"
    for chunk in chunks:
        here = count_characters(chunk)
        if split == "train" and here > left:
            cut = left if chunk.isascii() else int(np.flatnonzero(begins_character(chunk))[left])
            if cut:
                yield "train", chunk[:cut]
            split, chunk = "val", chunk[cut:]
        left -= here
        yield split, chunk


def write_bins(folder: Path, chunks, tokenizer, found: Survey, n_train: int) -> tuple[dict, dict]:
    """The second pass: fill folder/train.bin and folder/val.bin; return the token counts and the text's byte counts.

    Raises UserError if the text is no longer what the survey found.
    """
    dtype = id_dtype(tokenizer.vocab_size)
    digest = hashlib.sha256()
    tokens, sizes = {"train": 0, "val": 0}, {"train": 0, "val": 0}

    def watched(pairs):
        for split, chunk in pairs:
            digest.update(chunk)
            sizes[split] += len(chunk)
            progress.add(len(chunk))
            yield chunk

    with Progress("encoding", total=found.bytes) as progress:
        for split, pairs in itertools.groupby(split_chunks(chunks, n_train), key=lambda pair: pair[0]):
            with open(folder / f"{split}.bin", "wb") as file:
                for ids in tokenizer.encode_stream(watched(pairs)):
                    file.write(ids.astype(dtype, copy=False).data)
                    tokens[split] += len(ids)
                sync(file)
    if digest.hexdigest() != found.sha256:
        raise UserError("a source changed while it was being read; run the command again when it is at rest")
    return tokens, sizes


# ----------------------------------------------------------------------------------------------------------------------
# data/NAME/: all at once or not at all


def siblings(target: Path) -> tuple[Path, Path]:
    """Where a folder is built, and where the one that it replaces stands for an instant."""
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def target_folder(name: str, ours=BINS) -> Path:
    """data/NAME. Raises UserError for a name that could lie elsewhere, and for a folder with other files than ours."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(".") or name.lower() == DOWNLOADS.name:
        raise UserError(f"--name={name} cannot name a folder in data/; use letters, digits, - and _, as in --name=mine")
    target = DATA / name
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is not a folder; move it away, or choose another --name")
    if target.is_dir() and (others := sorted(set(os.listdir(target)) - set(ours))):
        raise UserError(f"{target} holds {others[0]!r}, which would be lost; move it away, or choose another --name")
    return target


def recover(target: Path):
    """Clear what a killed run left. If it died between the two renames, the old folder goes back to its place."""
    new, old = siblings(target)
    if old.exists() and not target.exists():
        os.rename(old, target)
    for stale in (new, old):
        if stale.exists():
            shutil.rmtree(stale)


def swap_in(target: Path):
    """Put the finished folder in the target's place, and then delete what stood there.

    No portable call exchanges two folders, so this takes two renames. A kill in the instant between them leaves both
    folders whole, and recover() puts one back.
    """
    new, old = siblings(target)
    sync_folder(new)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:  # Ctrl-C too
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(file):
    """Have what was written to an open file on the disk before anything else happens."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path):
    if os.name != "nt":  # Windows opens no folders, and needs no such call
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, meta: dict):
    # backslashreplace: a file name that is no Unicode becomes \udcXX, which is how JSON writes it anyway
    text = json.dumps(meta, ensure_ascii=False, indent=2) + "\n"
    with open(path, "wb") as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))
        sync(file)


def build(target: Path, documents: list[Document], tokenizer, found: Survey, n_train: int, facts: dict) -> dict:
    """Write the data folder and return its meta.json, which is facts and what the second pass counted."""
    new, _ = siblings(target)
    with exclusive(target.with_name(f".{target.name}.lock"), f"another prepare.py is writing {target}; wait for it"):
        recover(target)
        try:
            new.mkdir()
            tokens, sizes = write_bins(new, joined(documents, tokenizer), tokenizer, found, n_train)
            meta = facts | {"tokens": tokens, "bytes": sizes}
            write_json(new / "meta.json", meta)
            swap_in(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# FineWeb: shards of GPT-2 tokens, each checked before it gets its place in the data folder


def shard_facts(path: Path, lengths: np.ndarray) -> dict:
    """What meta.json says of a shard. lengths: each token's in bytes. Raises ValueError for what is no whole shard."""
    with open(path, "rb") as file:
        header, size = file.read(SHARD_HEADER), os.fstat(file.fileno()).st_size
        magic, version, count = np.frombuffer(header.ljust(SHARD_HEADER, b"\0"), "<i4")[:3].tolist()
        if (magic, version) != (20240520, 1):
            raise ValueError(f"its magic number and version are {magic} and {version}, not 20240520 and 1")
        if size != SHARD_HEADER + 2 * count or count < 1:
            raise ValueError(f"its header counts {count:,} tokens, which its {size:,} bytes do not hold exactly")
        digest, text = hashlib.sha256(header), 0
        while chunk := file.read(1 << 22):
            ids = np.frombuffer(chunk, "<u2")
            if ids.max() >= len(lengths):
                raise ValueError(f"it has a token {ids.max()}, and the vocabulary {len(lengths):,}")
            digest.update(chunk)
            text += int(lengths.take(ids).sum(dtype=np.int64))
    return {"offset": SHARD_HEADER, "tokens": count, "bytes": text, "sha256": digest.hexdigest()}


def install_shard(place: Path, url: str, lengths: np.ndarray, sha256: str | None) -> dict:
    """Have the whole shard at place, from url unless it is there already. Returns its facts. Raises UserError."""
    if place.exists():
        try:
            facts = shard_facts(place, lengths)
            if sha256 in (None, facts["sha256"]):
                return facts
            raise ValueError(f"its SHA-256 is {facts['sha256']}, and was {sha256}")
        except ValueError as error:
            print(f"{place} is damaged: {error}; it is downloaded again", flush=True)
    arrived = fetch(url)
    try:
        facts = shard_facts(arrived, lengths)
    except ValueError as error:
        arrived.unlink()
        raise UserError(f"{url}: {error}; it was deleted: run the command again, it goes on from here") from None
    place.parent.mkdir(exist_ok=True)
    os.replace(arrived, place)
    return facts


def prepare_fineweb(args: argparse.Namespace):
    """Bring data/fineweb/ to the shards asked for. Raises UserError, and then its meta.json is what it was before."""
    if args.sources != ["fineweb"]:
        raise UserError("fineweb comes in shards of tokens, to which no other source can be joined: prepare it alone")
    if args.tokenizer not in (None, "gpt2"):
        raise UserError(f"--tokenizer={args.tokenizer}: fineweb comes in the tokens of gpt2; leave it out")
    if args.val_fraction is not None:
        raise UserError(f"--val_fraction={args.val_fraction}: fineweb has a shard for validation; leave it out")
    if args.shards is not None and not (re.fullmatch("[0-9]{1,3}", args.shards) and 0 < int(args.shards) < len(SHARDS)):
        raise UserError(f"--shards={args.shards[:20]} is not a number from 1 to {len(SHARDS) - 1}; try --shards=1")
    target = target_folder("fineweb" if args.name is None else args.name, ("meta.json", *SHARDS))
    tokenizer = BPETokenizer("gpt2")
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)], np.uint8)
    source = CORPORA["fineweb"].url
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    hub = checked_url(source.replace("https://huggingface.co", mirror) if mirror else source).geturl()
    with exclusive(target.with_name(f".{target.name}.lock"), f"another prepare.py is writing {target}; wait for it"):
        recover(target)
        known = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # a meta.json not of ours
            files = json.loads((target / "meta.json").read_text(encoding="utf-8"))["files"]
            known = {shard["name"]: shard["sha256"] for split in ("val", "train") for shard in files[split]}
        names = SHARDS[: 1 + int(args.shards or max(1, len(known) - 1))]
        missing = SHARD_BYTES * sum(not (target / name).exists() for name in names)
        if (free := shutil.disk_usage(DATA).free) < missing - SHARD_BYTES:
            sizes = f"{missing / 1e9:.1f} GB more, but {DATA} has {free / 1e9:.1f} GB free"
            raise UserError(f"{len(names)} shards take {sizes}: make room, or give a lower --shards")
        facts = []
        for name in names:
            url = f"{hub}/resolve/main/{name}"
            facts.append({"name": name} | install_shard(target / name, url, lengths, known.get(name)))
            print(f"{target / name}: {facts[-1]['tokens']:,} tokens, checked", flush=True)
        files = {"train": facts[1:], "val": facts[:1]}
        sums = {key: {split: sum(f[key] for f in files[split]) for split in files} for key in ("tokens", "bytes")}
        meta = {"format": 1, "corpus": "fineweb", "source": [source], "tokenizer": tokenizer.spec}
        meta |= {"vocab_size": tokenizer.vocab_size, "dtype": "uint16", **sums, "files": files}
        sync_folder(target)  # so that the shards' names are on the disk before the list of them
        write_json(new := target.with_name(f".{target.name}.json"), meta)
        os.replace(new, target / "meta.json")
    print(f"{target}: {sums['tokens']['train']:,} training and {sums['tokens']['val']:,} validation tokens of gpt2")
    print(f"next: python train.py config/train_gpt2.py --dataset={target.name}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = {flag.lstrip("-") for action in self._actions for flag in action.option_strings}
        wrong = re.search(r"unrecognized arguments: -*([^\s=]+)", message)
        hint = near_match(wrong[1], flags).replace("did you mean ", "did you mean --") if wrong else ""
        raise UserError(f"{message}{hint or '; python prepare.py --help shows what can be given'}")


def parse(argv) -> argparse.Namespace:
    examples = "\n".join(re.findall("^    (python .*)", __doc__ or "", re.MULTILINE))
    table = "\n".join(f"{name:<12} {corpus.description}" for name, corpus in CORPORA.items())
    parser = Parser(
        prog="prepare.py",
        description="Turn text into the token files that train.py reads: data/NAME/{train.bin,val.bin,meta.json}.",
        epilog=f"known corpora (a file of the same name is ./NAME):\n{table}\n\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = "text in UTF-8, .gz, .zip, .xml (the text of a TEI body)"
    sources = f"a known corpus, a URL, files and folders: {kinds}; several are several documents (default: shakespeare)"
    tokenizers = "char, byte (takes any file), or one of tiktoken's: gpt2, r50k_base, cl100k_base, o200k_base, ..."
    fraction = "how much of the text, from its end and by characters, is for validation (default: 0.1)"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=sources)
    shards = "how many of fineweb's training shards, beside one for validation (default: 1, or as many as are there)"
    parser.add_argument("--tokenizer", help=f"{tokenizers} (default: char)")
    parser.add_argument("--name", help="the folder in data/ to make (default: the tokenizer's name)")
    parser.add_argument("--val_fraction", help=fraction)
    parser.add_argument("--shards", help=shards)
    return parser.parse_args(argv)


def val_fraction_of(text: str) -> Fraction:
    """The decimal that was typed, exactly: "0.1" -> 1/10. Raises UserError unless it is between 0 and 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return Fraction(str(float(text)))
    raise UserError(f"--val_fraction={text} is not a number between 0 and 1; try --val_fraction=0.1")


def tokenizer_named(name: str):
    """The tokenizer for --tokenizer=name, or None for char, whose alphabet the text has yet to give."""
    if name == "char":
        return None
    if name == "byte":
        return ByteTokenizer()
    options = ["char", "byte", *tiktoken_names()]
    if name not in options:
        raise UserError(f"there is no tokenizer {name!r}{near_match(name, options)} (there are {', '.join(options)})")
    return BPETokenizer(name)


def prepare(sources: list[str], tokenizer_name: str, name: str | None, val_fraction: Fraction):
    """Make data/NAME/ and say what it holds. Raises UserError, and then what was there before is still there."""
    tokenizer = tokenizer_named(tokenizer_name)
    target = target_folder(tokenizer_name if name is None else name)
    note = None
    if sources:
        found_sources = [find_source(source) for source in sources]
    else:
        source, note = shakespeare_or_pydocs()
        found_sources = [source]
    documents = [document for source in found_sources for document in source.documents]

    found = survey(joined(documents, tokenizer or CharTokenizer), want_alphabet=tokenizer is None)
    n_train = found.characters - math.ceil(found.characters * val_fraction)
    if n_train < 1:
        raise UserError(f"{found.characters:,} characters are too few to split into train and val; give more text")
    tokenizer = tokenizer or CharTokenizer(found.alphabet)

    names = [source.name for source in found_sources]
    facts = {
        "format": 1,
        "corpus": ", ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]),
        "source": [source.origin for source in found_sources],
        "corpus_sha256": found.sha256,
        "characters": found.characters,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size).name,
    } | ({"note": note} if note else {})
    meta = build(target, documents, tokenizer, found, n_train, facts)

    vocabulary = f"a vocabulary of {meta['vocab_size']:,} {tokenizer_name} tokens"
    files = f" in {len(documents):,} documents" * (len(documents) > 1)
    print(f"{meta['corpus']}: {found.characters:,} characters{files}, {vocabulary}")
    if "\r" in found.alphabet:
        print(r"\r is among them, as in Windows' line ends \r\n: the model will learn it too")
    for split in ("train", "val"):
        print(f"{target / split}.bin: {meta['tokens'][split]:,} tokens of {meta['dtype']}")
    config = "config/train_char_cpu.py" if target.name == tokenizer_name == "char" else f"--dataset={target.name}"
    print(f"next: python train.py {config}")


def main(argv=None) -> int:
    """Run the command and return its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name of a file is worth a UnicodeEncodeError
    try:
        args = parse(argv)
        if "fineweb" in args.sources:
            prepare_fineweb(args)
        elif args.shards is not None:
            raise UserError(f"--shards={args.shards[:20]} is for fineweb alone: python prepare.py fineweb --shards=1")
        else:
            tokenizer, fraction = ("char" if args.tokenizer is None else args.tokenizer), args.val_fraction
            prepare(args.sources, tokenizer, args.name, val_fraction_of("0.1" if fraction is None else fraction))
        return 0
    except UserError as error:
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted; nothing in data/ is half-written", 130
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        message, status = f"{place}{error.strerror or error}", 2
    print(f"prepare.py: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
