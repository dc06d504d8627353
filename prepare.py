"""Turn text into the token files that train.py reads: data/NAME/{train.bin,val.bin,meta.json}.

    python prepare.py                               tiny Shakespeare, one token per character
    python prepare.py --tokenizer=gpt2              the same in GPT-2's byte-pair tokens
    python prepare.py notes/ diary.txt --name=mine  your own files and folders
    python prepare.py tinystories --tokenizer=gpt2  a known corpus
    python prepare.py https://example.org/book.txt  a file at a URL
    python prepare.py fineweb --shards=25           2.5 billion tokens of web text

The text is streamed twice, to find its characters and to encode it, so it may be larger than memory.
"""
import argparse
import codecs
import contextlib
import difflib
import gzip
import hashlib
import html
import itertools
import json
import os
import pickle
import re
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

HUB = "https://huggingface.co"
CORPORA = {  # name: (URL, SHA-256)
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "pydocs": (None, None),  # Python's reference
    "atticus": ("https://raw.githubusercontent.com/PerseusDL/canonical-latinLit/1066a551aa5445ab165e9b490a6bb06ce72828"
                "da/data/phi0474/phi057/phi0474.phi057.perseus-lat1.xml",
                "82e361a4dcf554470eab9daba9cc02b0e0ea34d13dc4ae3bf35ea98d2b18f3fe"),
    "tinystories": (f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", None),
    "fineweb": (f"{HUB}/datasets/kjj0/fineweb10B-gpt2", None),
}
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
DATA, EOT = Path("data"), "<|endoftext|>"
CHUNK = 1 << 18  # bytes read at a time
RETRY_SECONDS = 2


class UserError(Exception):
    """A user's mistake: one line on stderr, exit status 2."""


def did_you_mean(value, options, cutoff=0.6):
    """did_you_mean("shakespear", CORPORA) -> '; did you mean shakespeare?' or ''."""
    matches = difflib.get_close_matches(value.lower(), list(options), 1, cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""


class LiteralUnpickler(pickle.Unpickler):
    """Loads dicts, lists, strings and numbers. Refuses classes and functions, which could run code."""

    def find_class(self, module, name):
        raise ValueError(f"{module}.{name}")


class Tokenizer:
    """Base class of the tokenizers. tokenizer_from_spec(tokenizer.spec) returns an equal one."""
    eot = None  # the id of <|endoftext|>
    separator = b"\n\n"  # between documents

    def encode(self, text):
        return self.encode_chunk(text.encode(errors="surrogateescape")).tolist()

    def encode_stream(self, chunks):
        """Byte chunks of complete characters -> arrays of ids."""
        return map(self.encode_chunk, chunks)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")


class CharTokenizer(Tokenizer):
    """One token per character. CharTokenizer("abc").encode("cab") -> [2, 0, 1]"""

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        self.spec = {"kind": "char", "chars": chars}
        self.table = np.full(sys.maxunicode + 1, -1, np.int32)  # code point -> id, -1 if unknown
        self.table[list(map(ord, chars))] = np.arange(len(chars))
        self.ascii_table = self.table[:256].astype(np.uint8).tobytes()  # 255 if unknown

    def encode_chunk(self, chunk):
        if self.vocab_size < 256 and chunk.isascii():  # much faster
            ids = np.frombuffer(chunk.translate(self.ascii_table), np.uint8)
            if ids.max(initial=0) < 255:
                return ids
        text = chunk.decode(errors="replace")
        ids = self.table.take(np.frombuffer(text.encode("utf-32-le"), "<u4"), mode="clip")  # clip: no bounds check
        if ids.min(initial=0) < 0:
            char = text[ids.argmin()]
            raise UserError(f"unknown character {char!r} (U+{ord(char):04X}): prepare the data with --tokenizer=byte")
        return ids

    def decode_bytes(self, ids):
        return "".join(self.chars[i] for i in map(int, ids) if 0 <= i < self.vocab_size).encode()


class ByteTokenizer(Tokenizer):
    """One token per byte, of any file."""
    spec, vocab_size = {"kind": "byte"}, 256

    def encode_chunk(self, chunk):
        return np.frombuffer(chunk, np.uint8)

    def decode_bytes(self, ids):
        return bytes(i for i in map(int, ids) if 0 <= i < 256)


class BPETokenizer(Tokenizer):
    """An encoding of tiktoken. BPETokenizer("gpt2").encode("hello world") -> [31373, 995]"""
    separator = EOT.encode()

    def __init__(self, name):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load tokenizer {name!r}, try char, byte, gpt2: {str(error)[:80]}") from None
        self.spec = {"kind": "tiktoken", "encoding": name}
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode_chunk(self, chunk):
        return self.encoding.encode_to_numpy(chunk.decode(errors="replace"), allowed_special={EOT},
                                             disallowed_special=())  # any other is ordinary text

    def encode_stream(self, chunks):
        pending = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases the GIL
            for chunk in split_at_boundaries(chunks):
                pending.append(pool.submit(self.encode_chunk, chunk))
                if len(pending) > os.cpu_count() + 4:  # bounds the memory
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()

    def decode_bytes(self, ids):
        pieces = []
        for i in map(int, ids):
            with contextlib.suppress(KeyError, OverflowError):  # cl100k_base has gaps within its vocabulary
                pieces.append(self.encoding.decode_single_token_bytes(i))
        return b"".join(pieces)


def tokenizer_from_spec(spec):
    match spec:
        case {"kind": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "tiktoken", "encoding": str(name)}:
            return BPETokenizer(name)
    raise UserError(f"unknown tokenizer {str(spec)[:80]}; prepare the data again")


# Where text can be split without changing a token: all OpenAI encodings start a new piece at a space or tab after
# anything but white space, and at a line end or one of these signs after a letter or digit, and none looks back.
LETTER = r"[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
BOUNDARY = re.compile(rf"(?<=\S)(?=[ \t])|(?<={LETTER})(?=[\r\n.,:;!?()<=+/。、，！？])")


def split_at_boundaries(chunks):
    """Byte chunks of complete characters -> byte chunks that encode to the same tokens as the entire text."""
    held = ""
    for chunk in chunks:
        text = held + chunk.decode()
        cut = max((match.start() for match in BOUNDARY.finditer(text, max(0, len(text) - 4096))), default=0)
        yield text[:cut].encode()
        held = text[cut:]
    yield held.encode()


def with_progress(label, chunks, total=0):
    """Yield byte chunks; print the progress every five seconds, with the time left if total is given."""
    start = shown = time.monotonic()
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            left = f", {(shown - start) * (total / done - 1):.0f} s left" if total else ""
            print(f"{label}: {done / 1e6:,.0f} MB{left}", flush=True)


def download(url, path, sha256=None, tries=4):
    """Download url to path unless it exists, resuming an earlier attempt."""
    if path.exists():
        return
    import requests
    path.parent.mkdir(parents=True, exist_ok=True)
    part, etag_file = Path(f"{path}.part"), Path(f"{path}.etag")
    url = url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    for attempt in range(1, tries + 1):
        headers = {"Accept-Encoding": "identity"}  # a compressed body has other offsets
        if part.exists() and etag_file.exists():
            headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": etag_file.read_text()}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=20) as response:
                if response.status_code == 416:  # nothing is missing
                    break
                response.raise_for_status()
                if "text/html" in response.headers.get("Content-Type", "") and ".htm" not in url:
                    raise UserError(f"{url} is a web page, not a file")
                size = int(response.headers.get("Content-Length", 0))
                with open(part, "ab" if response.status_code == 206 else "wb") as file:
                    etag_file.write_text(response.headers.get("ETag", "none"))
                    for chunk in with_progress(f"downloading {url}", response.iter_content(1 << 14), size):
                        file.write(chunk)
            break
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", None)
            reason = f"status {status}" if status else type(error).__name__
            if status in (401, 403, 404) or attempt == tries or isinstance(error, ValueError):  # not a valid URL
                raise UserError(f"cannot download {url} ({reason})") from None
            print(f"{reason}; retrying", flush=True)
            time.sleep(RETRY_SECONDS)
    # The Hugging Face hub states the SHA-256 where it redirects to its storage.
    for redirect in response.history:
        etag = redirect.headers.get("X-Linked-Etag", "").strip('"')
        sha256 = etag if len(etag) == 64 else sha256
    if sha256 and hashlib.sha256(np.memmap(part, np.uint8, "r")).hexdigest() != sha256:
        part.unlink()
        raise UserError(f"{url}: SHA-256 is not {sha256}; run the command again")
    os.replace(part, path)
    etag_file.unlink()


def download_gpt2(name):
    """The folder data/hub/NAME of a pretrained GPT-2, downloaded unless it exists."""
    if name not in GPT2_MODELS:
        near = did_you_mean(name, ("scratch", "resume", "auto", *GPT2_MODELS))
        raise UserError(f"init_from={name} is not resume, a path or one of {', '.join(GPT2_MODELS)}{near}")
    repo = "distilbert/distilgpt2" if name == "distilgpt2" else f"openai-community/{name}"
    for file in ("config.json", "model.safetensors"):
        download(f"{HUB}/{repo}/resolve/main/{file}", DATA / "hub" / name / file)
    return DATA / "hub" / name


def documents_in(source, tries=4):
    """The documents of a corpus, URL, file, zip archive or folder: (name, function that yields the bytes)."""
    if source == "fineweb":
        raise UserError("fineweb cannot be combined with other sources")
    if source == "pydocs":
        from pydoc_data.topics import topics
        return [(key, partial(iter, [topics[key].encode()])) for key in sorted(topics)]
    path = Path(source)
    if source in CORPORA or "://" in str(source):
        url, sha256 = CORPORA.get(source, (source, None))
        name = Path(url.split("?")[0]).name
        path = DATA / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{name}"
        download(url, path, sha256, tries)
    if path.is_dir() and source:
        documents = []
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden and not Path(file.parent, "train.bin").exists():
                documents += documents_in(file)
        return documents
    if not path.is_file():
        raise UserError(f"no file, folder or corpus {str(source)!r}{did_you_mean(str(source), CORPORA)}")
    if path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        members = sorted(name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/"))
        return [(f"{path}:{member}", partial(read_file, path, member)) for member in members]
    return [(str(path), partial(read_file, path))]


def read_file(path, member=""):
    """Yield the decompressed bytes of a file or of a zip archive's member, or the text of an XML file."""
    name = (member or path.name).lower()
    with zipfile.ZipFile(path).open(member) if member else open(path, "rb") as file:
        if name.endswith(".gz"):
            file = gzip.GzipFile(fileobj=file)
        if name.removesuffix(".gz").endswith(".xml"):
            yield tei_text(file.read())
        elif file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        yield from iter(partial(file.read, CHUNK), b"")


TEI_LINES = set("ab body closer head item l label opener p row sp speaker stage trailer".split())
TEI_SKIPPED = "teiHeader front back note del fw figDesc abbr/{*}expan"


def tei_text(data):
    """The text of a TEI document: a line per paragraph or verse, a blank line before headings."""
    # XML knows five named entities; others, such as &mdash;, come from a DTD that is not available.
    data = re.sub(rb"&(?!amp;|lt;|gt;|quot;|apos;)\w+;",
                  lambda name: html.unescape(name[0].decode()).encode("ascii", "xmlcharrefreplace"), data)
    root = ElementTree.fromstring(data.replace(b"\n", b" "))
    for path in TEI_SKIPPED.split():
        for element in root.findall(".//{*}" + path):
            element[:], element.text = [], None
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]  # without the namespace
        if tag in TEI_LINES:
            element.text = ("\n\f\n" if tag in ("head", "label") else "\n") + (element.text or "")
            element.tail = "\n" + (element.tail or "")
    lines = "".join(root.itertext()).split("\n")
    text = "\n".join(" ".join(line.split()) for line in lines if line.strip() or "\f" in line).lstrip("\n")
    if root.find(".//{*}body") is None or not text:
        raise ValueError("no text in a TEI <body>; rename it to .txt")
    return text.encode() + b"\n"


def read_corpus(documents, tokenizer, report_skipped=True):
    """Yield the bytes of all documents, in chunks of complete characters unless tokenizer is a ByteTokenizer."""
    separator = b""
    for name, read in documents:
        started, rest = False, b""
        try:
            for chunk in read():
                chunk = rest + chunk
                size = len(chunk)
                if not isinstance(tokenizer, ByteTokenizer):
                    size = codecs.utf_8_decode(chunk, "strict", False)[1]  # without an incomplete character
                    if b"\0" in chunk:
                        raise ValueError("contains NUL bytes")
                yield chunk[:size] if started else separator + chunk[:size]
                started, rest = True, chunk[size:]
            rest.decode()  # fails if the last character is incomplete
        except Exception as error:  # zipfile, gzip and expat raise many types
            if started or len(documents) == 1:
                raise UserError(f"cannot read {name}: {error}; use prepare.py --tokenizer=byte") from None
            if report_skipped:
                print(f"prepare.py: skipped {name}: {error}", file=sys.stderr)
        if started:
            separator = tokenizer.separator


def scan(chunks, want_alphabet):
    """The first pass: the numbers of characters and bytes, the SHA-256 and the alphabet."""
    digest = hashlib.sha256()
    characters = size = 0
    seen, seen_ascii = np.zeros(sys.maxunicode + 1, bool), b""
    for chunk in with_progress("reading", chunks):
        digest.update(chunk)
        characters += int(np.count_nonzero(np.frombuffer(chunk, np.int8) >= -64))  # 0b10xxxxxx continues one
        size += len(chunk)
        if want_alphabet and (unseen := chunk.translate(None, seen_ascii)):
            seen[np.frombuffer(unseen.decode().encode("utf-32-le"), "<u4")] = True
            seen_ascii = bytes(np.flatnonzero(seen[:128]).tolist())
    return characters, size, digest.hexdigest(), "".join(map(chr, np.flatnonzero(seen)))


def split_chunks(chunks, n_train, sizes):
    """Yield ("train", chunk) for n_train characters, then ("val", chunk). Counts their bytes in sizes."""
    split, left = "train", n_train
    for chunk in chunks:
        starts = np.frombuffer(chunk, np.int8) >= -64
        count = np.count_nonzero(starts)
        if split == "train" and count > left:
            cut = int(np.flatnonzero(starts)[left])
            sizes[split] += cut
            yield split, chunk[:cut]
            split, chunk = "val", chunk[cut:]
        left -= count
        sizes[split] += len(chunk)
        yield split, chunk


def write_bins(folder, chunks, tokenizer, n_train):
    """The second pass: write train.bin and val.bin. Returns their part of meta.json."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # uint8, uint16 or uint32
    tokens, sizes = {}, {"train": 0, "val": 0}
    for split, pairs in itertools.groupby(split_chunks(chunks, n_train, sizes), key=lambda pair: pair[0]):
        with open(folder / f"{split}.bin", "wb") as file:
            for ids in tokenizer.encode_stream(chunk for _, chunk in pairs):
                file.write(ids.astype(dtype, copy=False))
            tokens[split] = file.tell() // dtype.itemsize
    return {"dtype": dtype.name, "tokens": tokens, "bytes": sizes}


def target_folder(name, allowed):
    """data/NAME. Raises UserError if NAME is not a plain name, or if it holds files that do not match allowed."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name in ("downloads", "hub"):
        raise UserError(f"invalid --name={name}: use letters, digits, _, . and -")
    target = DATA / name
    for file in os.listdir(target) if target.exists() else ():
        if not re.fullmatch(allowed, file):
            raise UserError(f"{target / file} is not from prepare.py and would be deleted: choose another --name")
    return target


def prepare(sources, kind, name, val_fraction):
    """Write data/NAME atomically."""
    target = target_folder(name, r"(train|val)\.bin|meta\.json")
    tokenizer = CharTokenizer("") if kind == "char" else ByteTokenizer() if kind == "byte" else BPETokenizer(kind)
    sources, default, note = sources or ["shakespeare"], not sources, {}
    try:
        documents = [document for source in sources for document in documents_in(source, 1 if default else 4)]
    except UserError as error:
        if not default:
            raise
        sources, note = ["pydocs"], {"note": "offline: using pydocs instead of shakespeare"}
        print(f"prepare.py: {note['note']}: {error}", file=sys.stderr)
        documents = documents_in("pydocs")
    characters, size, sha256, alphabet = scan(read_corpus(documents, tokenizer), kind == "char")
    n_train = int(characters * (1 - val_fraction))
    if not 0 < n_train < characters:
        raise UserError(f"--val_fraction={val_fraction} of {characters:,} characters leaves an empty split")
    if kind == "char":
        tokenizer = CharTokenizer(alphabet)
    names = [re.sub("//[^/]*@", "//", s) if "://" in s else Path(s).resolve().name for s in sources]
    meta = {"format": 1, "corpus": ", ".join(Path(name).name for name in names[:3]), "source": names,
            "corpus_sha256": sha256, "characters": characters, "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, **note}
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=DATA) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        chunks = with_progress("encoding", read_corpus(documents, tokenizer, report_skipped=False), size)
        meta |= write_bins(new, chunks, tokenizer, n_train)
        (new / "meta.json").write_text(json.dumps(meta, indent=2))
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:  # KeyboardInterrupt, too
            if old.exists():
                os.rename(old, target)
            raise
    print(f"{target}: {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} validation tokens")


def prepare_fineweb(name, n_shards):
    """Download the shards that data/NAME lacks, check all of them, and write meta.json."""
    if not 0 < n_shards < 104:
        raise UserError(f"--shards={n_shards}: expected 1 to 103")
    target = target_folder(name, r"fineweb_\w+\.bin.*|meta\.json.*")
    url, tokenizer = CORPORA["fineweb"][0], BPETokenizer("gpt2")
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    shards = []
    for file in ("fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, n_shards + 1))):
        path = target / file
        download(f"{url}/resolve/main/{file}", path)
        count = (path.stat().st_size - 1024) / 2  # after a header of 256 int32
        header = np.fromfile(path, "<i4", 3).tolist()
        ids = np.memmap(path, "<u2", "r", 1024) if header == [20240520, 1, count] and count > 0 else None
        if ids is None or ids.max() >= len(lengths):
            path.unlink()
            raise UserError(f"{path} was damaged and has been deleted; run the command again")
        size = sum(int(lengths[ids[i : i + CHUNK]].sum()) for i in range(0, len(ids), CHUNK))
        shards.append({"name": file, "offset": 1024, "tokens": len(ids), "bytes": size})
    files = {"train": shards[1:], "val": shards[:1]}
    sums = {key: {split: sum(shard[key] for shard in files[split]) for split in files} for key in ("tokens", "bytes")}
    meta = {"format": 1, "corpus": "fineweb", "source": [url], "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, "dtype": "uint16", **sums, "files": files}
    (target / "meta.json.tmp").write_text(json.dumps(meta, indent=2))
    os.replace(target / "meta.json.tmp", target / "meta.json")
    print(f"{target}: {sums['tokens']['train']:,} training tokens")


def main(argv=None):
    """Returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("prepare.py", argparse.SUPPRESS, __doc__, f"Known corpora: {', '.join(CORPORA)}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("sources", nargs="*", help="corpora, URLs, files, folders; text, .gz, .zip, .xml")
    parser.add_argument("--tokenizer", default="char", help="char (default), byte, gpt2, cl100k_base, ...")
    parser.add_argument("--name", help="folder in data/ (default: the tokenizer)")
    parser.add_argument("--val_fraction", type=Fraction, default="0.1", help="default: 0.1")
    parser.add_argument("--shards", type=int, default=1, help="of fineweb")
    args = parser.parse_args(argv)
    try:
        if args.sources == ["fineweb"]:
            prepare_fineweb(args.name or "fineweb", args.shards)
        else:
            prepare(args.sources, args.tokenizer, args.name or args.tokenizer, args.val_fraction)
        return 0
    except (UserError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
        advice = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"prepare.py: {' '.join(str(error).split()) or 'interrupted'}{advice}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(main())
