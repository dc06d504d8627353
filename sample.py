"""Let a trained model write, draw what it learned, measure it on a text, or hand it on to transformers.

    python sample.py                                         # a text from nothing
    python sample.py --start="ROMEO:"                        # go on from these words
    python sample.py --start=FILE:prompt.txt                 # or from a file's; - is standard input
    python sample.py --start=FILE:prompts.txt --per_line     # each line is a prompt of its own
    python sample.py --interactive                           # type a line, it goes on; Ctrl-D ends
    python sample.py --num_samples=10 --seed=2               # ten texts, generated as one batch
    python sample.py --temperature=0                         # always the likeliest token
    python sample.py --init_from=gpt2 --start="The sea"      # GPT-2 itself, fetched once; or a path to its files
    python sample.py --score=book.txt                        # loss and bits per byte of a text, instead of writing
    python sample.py --every_step                            # beside train.py: a line from each new checkpoint
    python sample.py --plot                                  # the run's losses as a picture, out/loss.png
    python sample.py --plot out-a out-b                      # several runs in one picture, compare.png
    python sample.py --show=attention --start="To be"        # which token looks at which, as out/attention.png
    python sample.py --show=probabilities --start="To be"    # what may come next, as out/probabilities.png
    python sample.py --export=FOLDER                         # the model as a folder that transformers loads
    python sample.py --help                                  # every setting, its default and its reason

The model and its tokenizer come from the checkpoint that train.py wrote: out/best.pt, else out/ckpt.pt.
"""
# Shapes in comments: B batch, T time, C channels, H heads, D head size, V vocabulary.
import ast
import codecs
import contextlib
import errno
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import prepare
import train
from train import UserError, setting

SEPARATOR = "-" * 15
SHOWN = ("attention", "probabilities")
LINE, POLL = 60, 0.5  # every_step: characters of a line, seconds between two looks at the file
ROWS = 64  # texts generated at once; each holds a cache of its own, so memory bounds their number


@dataclass
class Settings:
    """All that can be set, by key = value files and --key=value flags, as for train.py."""
    out_dir: str = setting("out", "folder of the checkpoint: its best.pt, or ckpt.pt where there is none")
    ckpt: str = setting("", "path of a checkpoint, instead of out_dir's")
    init_from: str = setting("resume", "the checkpoint; or GPT-2 itself: gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                                       "distilgpt2 or a path to such files")
    export: str = setting("", "instead of writing: a new folder to put the model in, for transformers")
    score: str = setting("", "instead of writing: a text file whose loss, perplexity and bits per byte to show")
    plot: str = setting("", "instead of writing: draw the losses of these runs: --plot out-a out-b; alone, out_dir's")
    show: str = setting("", "instead of writing: draw what the model makes of the start", ("", *SHOWN))
    every_step: bool = setting(False, "a short text from each new ckpt.pt while train.py writes them, to the run's end")
    start: str = setting("", "text to go on from, FILE:path, or - for standard input; nothing begins a new text")
    per_line: bool = setting(False, "each line of the start is a prompt of its own; empty ones are left out")
    interactive: bool = setting(False, "each line typed is a prompt, until Ctrl-D")
    num_samples: int = setting(1, "texts for each prompt; a single one appears as it is written", least=1)
    max_new_tokens: int = setting(500, "length of each text in tokens, unless it ends by itself", least=0)
    stop: str = setting("", r"a text ends before this string; \n stands for a line's end")
    temperature: float = setting(0.8, "below 1 likely tokens are drawn more often, above 1 less; 0 draws the likeliest",
                                 least=0, below=1000)
    top_k: int = setting(200, "draw from this many of the likeliest tokens; 0 is off", least=0)
    top_p: float = setting(1.0, "draw from the likeliest tokens that together have this probability; 1 is off")
    min_p: float = setting(0.0, "draw from tokens with at least this share of the likeliest one's probability",
                           least=0, below=1)
    repetition_penalty: float = setting(1.0, "above 1, tokens of the prompt and the text so far are drawn less often",
                                        least=0.01, below=100)
    seed: int = setting(1337, "of the draws: the same seed, settings and hardware give the same text", least=0)
    device: str = setting("auto", "auto takes cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the matrix products; auto is bfloat16 where the hardware multiplies it natively",
                         ("auto", "float32", "bfloat16", "float16"))


def check(s):
    """Refuse what the settings' own bounds do not. Raises UserError."""
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p={s.top_p} must be above 0 and at most 1: for example --top_p=0.95, or 1 for all tokens")
    if s.interactive and (s.start or s.per_line):
        raise UserError("interactive=True takes its prompts from the keyboard: leave out --start and --per_line")
    commands = [name for name in ("export", "score", "plot", "show", "every_step", "interactive") if getattr(s, name)]
    if len(commands) > 1 or s.start and set(commands) & {"export", "score", "plot"}:
        raise UserError(f"--{' and --'.join(commands + ['start'] * bool(s.start))} are commands of their own: give one")
    if s.per_line and (s.show or s.every_step):
        raise UserError(f"--{commands[0]} takes one prompt: leave out --per_line")
    if s.every_step and s.init_from != "resume":
        raise UserError(f"--every_step waits for the checkpoints of a run: leave out --init_from={s.init_from}")
    if s.init_from == "scratch" or s.init_from != "resume" and s.ckpt:
        raise UserError(f"init_from={s.init_from}" + f" beside ckpt={s.ckpt}" * bool(s.ckpt) +
                        ": give --ckpt=PATH for a checkpoint, or --init_from=gpt2 or a path for GPT-2")


def identity(path):
    """What changes when a file is replaced by another; None where there is none."""
    try:
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    except (OSError, ValueError):
        return None


def read_checkpoint(path):
    """What train.load_checkpoint reads, also while train.py replaces it by two renames, between which it is missing."""
    for _ in range(50):
        file = identity(path)
        try:
            return train.load_checkpoint(path)
        except UserError:
            if identity(path) == file and (file or not os.path.exists(Path(path).parent / "ckpt-previous.pt")):
                raise
        time.sleep(0.01)
    return train.load_checkpoint(path)


def load(s, checkpoint=None):
    """The model, on the CPU in evaluation mode, and its tokenizer: of `checkpoint`, else of what the settings name.

    Raises UserError and prepare.UserError.
    """
    if os.path.isdir(s.ckpt):
        raise UserError(f"ckpt={s.ckpt} is a folder: --out_dir={s.ckpt} takes the best checkpoint in it")
    path = Path(s.ckpt or Path(s.out_dir) / "best.pt")
    if not s.ckpt and not os.path.exists(path):
        path = Path(s.out_dir) / "ckpt.pt"
    if checkpoint is None and s.init_from == "resume":
        checkpoint = read_checkpoint(path)
    elif checkpoint is None:
        path, checkpoint = s.init_from, read_gpt2(s.init_from)
    tokenizer = prepare.tokenizer_from_spec(checkpoint["tokenizer"])
    model = train.model_from_checkpoint(checkpoint, path)
    if tokenizer.vocab_size > (V := model.config.vocab_size):
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {V}: train anew")
    return model, tokenizer


def place(model, s):
    """Move the model to the device of the settings, to multiply in their dtype. Returns the device."""
    hardware = train.Settings(device=s.device, dtype=s.dtype)
    device = train.join_world(hardware).device
    model.to(device).compute_dtype = train.choose_dtype(hardware, device)
    return device


# ----------------------------------------------------------------------------------------------------------------------
# Drawing a token: pure functions of logits (B, V), which set what is not to be drawn to minus infinity.


def keep_top_k(logits, k):
    """The k largest logits of each row, k >= 1, and no more where some are equal. (B, V) -> (B, V)."""
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_top_p(logits, p):
    """The fewest largest logits whose probabilities reach p in sum, 0 < p <= 1: at least one. (B, V) -> (B, V).

    Nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """
    values, ids = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    enough = probabilities.cumsum(-1) - probabilities >= p  # reached before this one
    return logits.masked_fill(enough.scatter(-1, ids, enough), -torch.inf)


def keep_min_p(logits, p):
    """The logits whose probability is at least p times the largest one's, 0 <= p <= 1. (B, V) -> (B, V).

    Nguyen et al. 2024, arXiv 2407.01082.
    """
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def penalize_repetition(logits, seen, penalty):
    """Positive logits divided and negative ones multiplied by penalty > 0, where seen (B, V) is true. (B, V) -> (B, V).

    CTRL, Keskar et al. 2019, arXiv 1909.05858.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Token ids (B,) drawn from the filtered softmax of logits (B, V). The filters see the logits after temperature."""
    if temperature < 1e-4:  # 0, and what is so close to it that the division would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Generating: one pass over the prompt, then one over each new token, with the keys and values of those before it kept.


class Cache:
    """Keys and values of the last `size` tokens: for each layer a ring buffer (B, H, size, D).

    `length` counts all tokens seen, so that it is the position of the next one. Whoever calls the model advances it,
    once a forward pass. A pass over several tokens is for an empty cache only.
    """

    def __init__(self, model, batch, size):
        c, device = model.config, model.wte.weight.device
        dtype = torch.float32 if device.type == "cpu" else model.compute_dtype  # what train.Attention works in
        shape = (c.n_layer, batch, c.n_head, size, c.n_embd // c.n_head)
        self.keys = list(torch.empty(shape, device=device, dtype=dtype))
        self.values = list(torch.empty(shape, device=device, dtype=dtype))
        self.tokens = torch.empty(batch, 0, dtype=torch.long, device=device)  # the last ones, for n-grams
        self.size, self.length = size, 0

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D) over its oldest; return all, (B, H, at most size, D).

        Their order is that of the ring: attention by a single newest token does not depend on it.
        """
        slot, T = self.length % self.size, k.shape[2]
        assert T == 1 or self.length == 0, f"{T} tokens at once into a cache that has seen {self.length}"
        held = min(self.length + T, self.size)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, slot:slot + T] = k
        values[:, :, slot:slot + T] = v
        return keys[:, :, :held], values[:, :, :held]

    def before(self, idx, count):
        """The `count` tokens before the new ones idx (B, T), as (B, count), zeros before the first; idx is noted."""
        held = self.tokens if self.length else idx.new_zeros(len(idx), count)
        self.tokens = torch.cat([held, idx], 1)[:, -count:]
        return held

    def repeat(self, times):
        """Make each sequence `times` sequences, side by side."""
        self.keys = [k.repeat_interleave(times, 0) for k in self.keys]
        self.values = [v.repeat_interleave(times, 0) for v in self.values]
        self.tokens = self.tokens.repeat_interleave(times, 0)


def finite(logits):
    """The logits themselves. Raises UserError where they are not finite."""
    if not logits.isfinite().all():
        raise UserError("the model's output is not finite: its weights are damaged, or dtype is too coarse for "
                        "it: try --dtype=float32, or train anew")
    return logits


@torch.inference_mode()
def generate(model, idx, max_new_tokens, num_samples=1, repetition_penalty=1.0, forbidden=None, **drawing):
    """Yield max_new_tokens times the next token ids (B * num_samples,), int64, of prompts idx (B, T), T >= 1.

        tokens = torch.stack(list(generate(model, idx, 100, temperature=0.8, top_k=200)), 1)  # (B, 100)

    The samples of a prompt are side by side. `forbidden` is a tensor of ids that are never drawn, `drawing` is passed
    to draw(), whose defaults are the model's own distribution. The model must be in evaluation mode, on idx's device.
    Raises UserError when the model's output is not finite.

    Each token attends to the last block_size tokens. Beyond block_size, rotary or no positions let the window slide
    by a token at a time. The keys and values that stay were computed when older tokens were still visible, so a text
    differs from one recomputed from its last block_size tokens alone; it costs no more than before. Learned positions
    end at block_size: a full window starts again from its later half, recomputed. Of a longer prompt only the last
    block_size tokens count, except for the repetition penalty.
    """
    size, learned = model.config.block_size, model.config.position == "learned"
    new = recent = idx[:, -size:]  # what the model has yet to see; and what a new window is made of
    cache = Cache(model, len(idx), min(size, new.shape[1] + max_new_tokens))
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(idx), model.config.vocab_size, dtype=torch.bool, device=idx.device).scatter(1, idx, True)
        seen = seen.repeat_interleave(num_samples, 0)
    for step in range(max_new_tokens):
        logits = model(new, cache=cache)[0][:, -1]  # (B, V)
        cache.length += new.shape[1]
        if step == 0:
            logits, recent = finite(logits).repeat_interleave(num_samples, 0), recent.repeat_interleave(num_samples, 0)
            cache.repeat(num_samples)  # the prompt was read once for all its samples
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        if forbidden is not None:
            logits = logits.index_fill(1, forbidden, -torch.inf)
        token = draw(logits, **drawing)
        yield token
        new = token[:, None]
        if seen is not None:
            seen.scatter_(1, new, True)
        if learned:
            recent = torch.cat([recent, new], 1)
            if cache.length == size:
                new = recent = recent[:, -max(1, size // 2):]
                cache.length = 0


def worth_threads(model, rows):
    """Whether more than one CPU thread makes this many rows faster.

    Below, a matrix product is done about when a second thread has woken up, and where other programs keep the cores
    busy, waiting for that thread takes several times as long as the product.
    """
    return rows * model.flops_per_token() > 6 * 16e6


# ----------------------------------------------------------------------------------------------------------------------
# Text in and out


class Continuation:
    """The text of one sample as its tokens come: whole characters only, until end-of-text or the stop string."""

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop, self.held, self.ended = tokenizer, stop, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back an unfinished character

    def feed(self, token):
        """The text that an id adds and that is certain to stay; what may be the stop string's beginning is held."""
        if self.ended:
            return ""
        if token == self.tokenizer.eot:
            return self.finish()
        text = self.held + self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if self.stop and self.stop in text:
            self.held, self.ended = "", True
            return text[:text.index(self.stop)]
        kept = next((n for n in range(len(self.stop) - 1, 0, -1) if text.endswith(self.stop[:n])), 0)
        self.held = text[len(text) - kept:]
        return text[:len(text) - kept]

    def finish(self):
        """The text that was held, with U+FFFD for a character that was never finished."""
        if self.ended:
            return ""
        self.ended = True
        return self.held + self.decoder.decode(b"", final=True)


def read_start(start):
    """The text that --start means. Raises UserError where it cannot be read."""
    if start != "-" and not start.startswith("FILE:"):
        if os.path.isfile(start):
            complain(f"note: this goes on from the name {start}; from the text in that file, --start=FILE:{start}")
        return start
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    try:
        if start == "-":
            data = sys.stdin.buffer.read() if sys.stdin else b""
        else:
            data = Path(name).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"start: {name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}: "
                        "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = "it is a folder" if os.path.isdir(name) else getattr(error, "strerror", None) or error
        raise UserError(f"start: cannot read {name}: {reason}: give the path of a text file, "
                        "as in --start=FILE:prompt.txt") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")  # what Windows editors add


def typed_lines():
    """Yield the lines that are typed, until Ctrl-D."""
    while sys.stdin:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def show(text):
    """Print without a line's end, at once."""
    print(text, end="", flush=True)


def show_samples(starts, finished):
    """Print the texts in finished, a list for each start, each with a separating line after it; leave them empty."""
    for start, texts in zip(starts, finished, strict=True):
        for text in texts:
            show(start + text + ("" if (start + text).endswith("\n") else "\n") + SEPARATOR + "\n")
        texts.clear()


def in_batches(lengths, num_samples):
    """Split prompts of these lengths into batches of at most ROWS texts: yields (their numbers, samples of each).

    Only prompts of one length share a batch, so that none needs padding, which the model would have to look past.
    >>> list(in_batches([5, 3, 5], 1))
    [([0, 2], 1), ([1], 1)]
    """
    same_length = {}
    for number, length in enumerate(lengths):
        same_length.setdefault(length, []).append(number)
    samples = min(num_samples, ROWS)
    for numbers in same_length.values():
        for first in range(0, len(numbers), ROWS // samples):
            for done in range(0, num_samples, samples):
                yield numbers[first:first + ROWS // samples], min(samples, num_samples - done)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def sliding_windows(chunks, size):
    """Cut a stream of id arrays into (ids of at most size + 1, how many of the last are new), each new once.

    All but the very first id are new once, and each has at least half of `size` ids before it in its window where the
    text has them. Holds a chunk and a window at a time.
    >>> [(ids.tolist(), new) for ids, new in sliding_windows([np.arange(4), np.arange(4, 8)], 4)]
    [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7], 1)]
    """
    held, step, known = np.zeros(0, np.int64), max(1, size // 2), 1  # known: of those held, counted before
    for chunk in chunks:
        held = np.concatenate([held, chunk])
        while len(held) > size:
            yield held[:size + 1], size + 1 - known
            held, known = held[step:], size + 1 - step
    if len(held) > known:
        yield held, len(held) - known


@torch.inference_mode()
def measure(model, chunks):
    """The sum of the losses in nats of a stream of id arrays, and their number: of every id but the first."""
    T, device, total, count = model.config.block_size, model.wte.weight.device, 0.0, 0
    rows = max(1, min(64, 2**25 // (T * model.config.vocab_size)))  # so that the logits take 128 MB, or one row's
    windows = sliding_windows(chunks, T)
    while batch := list(islice(windows, rows)):
        tokens = np.zeros((len(batch), max(len(ids) for ids, _ in batch)), np.int64)
        targets = np.full_like(tokens, -1)  # -1 does not count
        for row, (ids, new) in enumerate(batch):
            tokens[row, :len(ids)] = ids
            targets[row, len(ids) - new:len(ids)] = ids[-new:]
        x, y = (torch.from_numpy(a).to(device) for a in (tokens[:, :-1], targets[:, 1:]))
        new = sum(new for _, new in batch)
        total, count = total + model(x, y.contiguous())[1].item() * new, count + new
    return total, count


def score(s):
    """Print the loss, the perplexity and the bits per byte of a text. Raises UserError and prepare.UserError."""
    if not os.path.isfile(s.score) and not os.path.isdir(s.score):
        raise UserError(f"score: there is no file {s.score}: give the path of a text, or of a folder of texts")
    model, tokenizer = load(s)
    place(model, s)
    size = 0

    def counted():
        nonlocal size
        for chunk in prepare.joined(prepare.documents_in(Path(s.score)), tokenizer):
            size += len(chunk)
            yield chunk

    if tokenizer.spec["kind"] == "char":  # its stream, made for texts whose alphabet is known, would pass any character
        ids = (np.array(tokenizer.encode(chunk.decode("utf-8")), np.int64) for chunk in counted())
    else:
        ids = tokenizer.encode_stream(counted())
    total, count = measure(model, ids)
    if not count:
        raise UserError(f"score: {s.score} has fewer than two tokens: there is nothing to predict")
    if not math.isfinite(loss := total / count):
        raise UserError("the model's output is not finite: its weights are damaged, or try --dtype=float32")
    T = model.config.block_size
    show(f"{s.score}: loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):.2f}, "
         f"{total / math.log(2) / size:.4f} bits per byte ({count:,} tokens after the first, {size:,} bytes, "
         f"each predicted from the {T - max(1, T // 2) + 1} to {T} before it)\n")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: matplotlib is imported where one is drawn, without pyplot, whose state every caller would share


GREY = "#dddddd"
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 black".split()  # Okabe and Ito's, for colour-blind eyes
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", (0, (1, 1)))  # which tell the lines apart in black and white too
TOKENS, LIKELIEST = 32, 20  # the most tokens of a prompt, and of those that may come next, in one picture


def new_figure(width, height):
    """An empty matplotlib Figure, its size in inches. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_picture(figure, target):
    """Write a Figure as a PNG file, whole or not at all, and never through a link. Raises UserError."""
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            figure.savefig(file, format="png", dpi=120)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def visible(text):
    """Text in which line ends, tabs and what cannot be printed are one visible character each."""
    joiners = "\u200c\u200d"  # without which an emoji falls into its parts, and Persian into its letters
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c in joiners else "\N{REPLACEMENT CHARACTER}" for c in text)


@cache
def usual_font():
    """matplotlib's own choice of a font, as an FT2Font."""
    from matplotlib import font_manager
    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))


@cache
def other_fonts():
    """The system's fonts that matplotlib can draw with, as (family, FT2Font) pairs."""
    from matplotlib import font_manager
    found, listed = {}, {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):
        with contextlib.suppress(Exception):  # a font that cannot be read
            font = font_manager.get_font(path)
            if font.scalable:  # colour emoji are not, and cannot be drawn
                found.setdefault(font.family_name, font)
                if path not in listed:  # it was installed after matplotlib made its list
                    font_manager.fontManager.addfont(path)
    return list(found.items())


@cache
def font_of(character):
    """The family of an installed font that has a character, or None."""
    if usual_font().get_char_index(ord(character)):
        return usual_font().family_name  # without opening all the others, which a run's picture never needs
    return next((name for name, font in other_fonts() if font.get_char_index(ord(character))), None)


def drawable(text, longest=24):
    """Text as a picture can show it: visible, not too long, and what no font has as its code: U+4E2D."""
    text = text if len(text) <= longest else text[:longest - 1] + "…"
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() and font_of(c) else f"U+{ord(c):04X}" for c in text)


def families(labels):
    """The font families that draw these labels, for matplotlib's `fontfamily`."""
    return list(dict.fromkeys([usual_font().family_name, *(font_of(c) for label in labels for c in label)]))


def names(tokenizer, ids):
    """How a picture shows each of these ids; bytes that are no characters as \\xff."""
    return [drawable(tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace")) or f"#{i}" for i in ids]


def label_below(axes, places, labels, **style):
    """Put labels below an axis; those longer than a character stand upright."""
    axes.set_xticks(places, labels, fontfamily=families(labels), parse_math=False, **style)
    for tick in axes.get_xticklabels():
        tick.set_rotation(90 if len(tick.get_text()) > 1 else 0)


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts of their finite numbers; damaged ones are left out. Raises UserError."""
    path = Path(folder) / "log.jsonl"
    try:
        text = train.plain(path).read_text("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise UserError(f"plot: cannot read {path} ({getattr(error, 'strerror', None) or error}): "
                        "give the folders of runs, as in --plot out") from None
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(line := json.loads(line), dict):
                lines.append({k: v for k, v in line.items() if type(v) in (int, float) and abs(v) < 1e18})
    lines = [line for line in lines if "step" in line and ("loss" in line or "val_loss" in line)]
    if not lines:
        raise UserError(f"plot: {path} holds no loss yet: wait for the run's first log line")
    return lines


def loss_figure(folders):
    """The picture of plot_losses, as a Figure."""
    figure, runs = new_figure(9, 6), [(folder, read_log(folder)) for folder in folders]
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter
    # nats a token cannot be compared where tokens differ; bits a byte can
    scales = [next((line["bits_per_byte"] / line["val_loss"] for line in lines if line.get("val_loss", 0) > 0
                    and "bits_per_byte" in line), None) for _, lines in runs]
    unit = "nats a token"
    if None in scales or max(scales) < 1.001 * min(scales):
        scales = [1.0] * len(runs)
    else:
        unit = "bits a byte, as the tokens differ"
    # a log of an earlier train.py has no tokens; then all are drawn by their steps
    x = "tokens" if all("tokens" in line for _, lines in runs for line in lines if line["step"]) else "step"
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    ends, shown = [], []
    for i, (folder, lines) in enumerate(runs):
        curves = {key: ([line.get(x, 0) for line in lines if key in line],
                        [line[key] * (1 if key == "lr" else scales[i]) for line in lines if key in line])
                  for key in ("loss", "val_loss", "lr")}
        shown += [y for key in ("loss", "val_loss") for at, y in zip(*curves[key], strict=True)
                  if at >= curves[key][0][-1] / 20]
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)])
        losses.plot(*curves["loss"], **style, linewidth=1, alpha=0.4)
        losses.plot(*curves["val_loss"], **style, marker=MARKERS[i % len(MARKERS)], markersize=5,
                    markevery=max(1, len(curves["val_loss"][0]) // 20))
        rates.plot(*curves["lr"], **style, linewidth=1.2)
        xs, ys = curves["val_loss" if curves["val_loss"][0] else "loss"]
        name = str(folder) if len(str(folder)) <= 24 else "…" + str(folder)[-23:]  # names of runs differ at the end
        ends.append((ys[-1], xs[-1], f"{min(ys):.4f} {drawable(name)}", style["color"]))
    bottom, top = losses.get_ylim()[0], max(shown)  # the fall at the very beginning would flatten the rest
    losses.set_ylim(top=(top := top + 0.05 * (top - bottom)))
    free = 0.0  # labels stand at their curves' ends, or above the label below
    for y, x_end, label, colour in sorted(ends):
        height = max((y - bottom) / (top - bottom), free)
        free = height + min(0.05, 1 / len(ends))
        losses.annotate(label, (x_end, y), (1.02, height), textcoords="axes fraction", color=colour, va="center",
                        fontsize=9, fontfamily=families([label]), parse_math=False,
                        arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, relpos=(0, 0.5)))
    losses.legend(handles=[
        Line2D([], [], color="black", marker="o", markersize=5, label="validation, its best at the right"),
        Line2D([], [], color="black", linewidth=1, alpha=0.4, label="training")], loc="upper right")
    losses.set_ylabel(f"loss, {unit}")
    rates.set(ylabel="learning rate", xlabel="tokens seen" if x == "tokens" else "steps (optimizer updates)")
    rates.set_ylim(bottom=0)
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (losses, rates):
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_losses(folders, target):
    """Draw the curves of runs, each a folder with a log.jsonl, into the PNG file `target`, whole or not at all.

    Losses in nats a token, or bits a byte where the runs' tokens differ, over the tokens seen (over steps where a log
    does not have them), and the learning rate.
    Raises UserError where matplotlib or a log is missing, or the file cannot be written.
    """
    save_picture(loss_figure(folders), target)


def plot(s):
    """The picture that --plot asks for. Raises UserError."""
    folders = list(dict.fromkeys(filter(None, s.plot.split("\n")))) or [s.out_dir]
    target = Path("compare.png") if len(folders) > 1 else Path(folders[0]) / "loss.png"
    plot_losses(folders, target)
    show(f"{target}\n")


class AttentionWeights(TorchFunctionMode):
    """While entered, keeps in `maps` the weights (B, H, T, T) of each attention, from the queries and keys it is given.

    The fused kernel, which goes on to do the work, never holds them as a whole.
    """

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[0].float(), args[1].float()  # (B, H, T, D)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            self.maps.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def attention_maps(model, ids):
    """How much each token (row) looks at each (column), (layer, H, T, T) on the CPU, for ids (T,) a list."""
    with AttentionWeights() as weights:
        finite(model(torch.tensor([ids], device=model.wte.weight.device))[0])
    return torch.cat(weights.maps).cpu()


def attention_figure(maps, labels):
    """A Figure of attention_maps: a grid of layers by heads, in which labels name the tokens."""
    L, H, T, _ = maps.shape
    cell = min(max(0.11, 8 / (H * (T + 1))), 0.5, 60 / (max(L, H) * (T + 1)))  # inches; 60 bound the file's size
    figure = new_figure(max(7, H * (T + 1) * cell + 2.2), L * (T + 1) * cell + 1.6)
    # one image with grey gaps, because hundreds of axes would take minutes
    mosaic = np.full((L, T + 1, H, T + 1), np.nan, np.float32)
    mosaic[:, :T, :, :T] = maps.permute(0, 2, 1, 3).numpy()
    axes = figure.subplots()
    axes.set_facecolor(GREY)
    image = axes.imshow(mosaic.reshape(L * (T + 1), H * (T + 1))[:-1, :-1], cmap="Blues", vmin=0, vmax=1,
                        aspect="auto")
    size = min(cell * 72 * 0.8, 10)
    places = [i for i in range(max(L, H) * (T + 1)) if i % (T + 1) < T]
    label_below(axes, places[:H * T], labels * H, fontsize=size)
    axes.set_yticks(places[:L * T], labels * L, fontsize=size, fontfamily=families(labels), parse_math=False)
    beside = dict(textcoords="offset points", annotation_clip=False)
    for head in range(H):
        axes.annotate(f"head {head + 1}", (head * (T + 1) + (T - 1) / 2, -0.5), (0, 5), ha="center", **beside)
    for layer in range(L):
        axes.annotate(f"layer {layer + 1}", (H * (T + 1) - 1.5, layer * (T + 1) + (T - 1) / 2), (5, 0), va="center",
                      rotation=270, **beside)
    axes.tick_params(length=0)
    axes.set(xlabel="looks at this token", ylabel="from this token")
    axes.set_title("Attention: each row is a token, and shows where it looks" +
                   f" (the last {T} tokens of the prompt)" * (T == TOKENS), pad=25)
    figure.colorbar(image, ax=axes, label="weight; each row sums to 1",
                    shrink=min(1, 3 / (L * (T + 1) * cell)))
    return figure


@torch.inference_mode()
def probabilities(model, ids):
    """The model's own distribution, at temperature 1, after each of ids (a list): (T, V) on the CPU."""
    return finite(model(torch.tensor([ids], device=model.wte.weight.device))[0][0]).softmax(-1).cpu()


def probability_figure(p, ids, tokenizer):
    """A Figure of probabilities (T, V) after each of the T ids: of what came next in them, and of what may come now."""
    figure = new_figure(9, 8)
    from matplotlib.ticker import PercentFormatter
    first = max(1, len(ids) - TOKENS)
    came = p[range(first - 1, len(ids) - 1), ids[first:]].tolist()
    given, following = figure.subplots(2, height_ratios=[2 if came else 0.01, 5])
    labels = names(tokenizer, ids[first:])
    given.bar(range(len(came)), came, color=COLOURS[0])
    label_below(given, range(len(came)), labels)
    given.set(ylabel="probability", ylim=(0, 1), title="How probable each token of the prompt was after those before" +
              f" (the last {TOKENS})" * (first > 1))
    given.yaxis.set_major_formatter(PercentFormatter(1))
    values, likeliest = p[-1].topk(min(LIKELIEST, p.shape[1]))
    count = max(1, int((values >= 0.001).sum()))  # the rest would have bars of no length
    bars = following.barh(range(count), values[:count].tolist(), color=COLOURS[0])
    following.bar_label(bars, [f"{value:.1%}" for value in values[:count].tolist()], padding=3, fontsize=9)
    labels = names(tokenizer, likeliest[:count].tolist())
    following.set_yticks(range(count), labels, fontfamily=families(labels), parse_math=False)
    following.set(xlabel="probability", title="What may come next" + f": the {count} likeliest tokens" * (count > 1))
    following.xaxis.set_major_formatter(PercentFormatter(1))
    given.margins(x=0.01)
    following.margins(x=0.1)
    following.set_ylim(max(count, 5) - 0.5, -0.5)  # the likeliest on top, and one alone no wall
    if not came:
        given.remove()
    for axes in (given, following):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def show_picture(s):
    """Draw what --show asks for. Raises UserError and prepare.UserError."""
    new_figure(1, 1)  # without matplotlib this says so, before the model is read
    writer = Writer(s)
    ids = writer.encode(read_start(s.start))
    if s.show == "attention":
        if not writer.model.config.n_layer or len(ids) < 2:
            raise UserError("show=attention: this model has no layer that could attend: n_layer=0" if len(ids) > 1 else
                            'show=attention needs a start of at least two tokens: for example --start="To be"')
        ids = ids[-TOKENS:]
        figure = attention_figure(attention_maps(writer.model, ids), names(writer.tokenizer, ids))
    else:
        figure = probability_figure(probabilities(writer.model, ids), ids, writer.tokenizer)
    folder = Path(s.ckpt).parent if s.ckpt else Path(s.out_dir if s.init_from == "resume" else "")
    save_picture(figure, folder / f"{s.show}.png")
    show(f"{folder / s.show}.png\n")
    text = writer.tokenizer.decode(ids[-TOKENS:])
    if lacking := [c for c in dict.fromkeys(text) if c.isprintable() and not font_of(c)]:
        complain(f"note: no font here can draw {' '.join(lacking)}, so codes stand for them: install one that can, but "
                 "no colour font")


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2 from files in Hugging Face's layout: the same model with other names, its matrices transposed.

GPT2_NAMES = {"blocks.": "h.", "norm1": "ln_1", "norm2": "ln_2", "norm.": "ln_f.", "qkv": "c_attn", "proj": "c_proj",
              "fc": "c_fc", "head": "lm_head"}
GPT2_CONFIG = {  # what its config.json may say, the default first; whatever else it says does not change the numbers
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"), "n_inner": (None,),
    "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (True, False), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
}


def gpt2_name(name):
    """What GPT-2's files call one of our parameters, and whether it lies transposed there.

    >>> gpt2_name("blocks.3.attn.qkv.weight")
    ('h.3.attn.c_attn.weight', True)
    """
    for ours, theirs in GPT2_NAMES.items():
        name = name.replace(ours, theirs)
    return name, ".c_" in name and name.endswith("weight")


def find_gpt2(name):
    """The folder or file of GPT-2 by its path, or by its name on the hub, from where it is fetched. UserError."""
    if os.path.exists(name):
        return Path(name)
    try:
        return prepare.fetch_gpt2(name, waits=os.environ.get("LOCAL_RANK", "0") != "0")
    except prepare.UserError as error:
        raise UserError(f"init_from={name}: {error}") from None


def read_tensors(path):
    """The tensors of a .safetensors file or a pytorch_model.bin, by name, on the CPU. Runs no code from the file."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"reading {path} needs safetensors: pip install safetensors") from None
        return load_file(path)
    if zipfile.is_zipfile(path):  # older files are bare pickles
        train.check_zip(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of strange pickles: they are refused, or read all the same
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise ValueError("views that claim more than there is")
    return tensors


def read_gpt2(name):
    """GPT-2 by its name on the hub, or from a folder or file, as a dict like a checkpoint's. Raises UserError.

    It has format, step, config, tokenizer and model; what a run would go on from, it lacks.
    """
    path = find_gpt2(name)
    if path.is_dir():
        path /= "pytorch_model.bin" if not (path / "model.safetensors").exists() else "model.safetensors"
    where = path.with_name("config.json")
    try:
        theirs = {key: known[0] for key, known in GPT2_CONFIG.items()} | json.loads(where.read_text(encoding="utf-8"))
        for key, known in GPT2_CONFIG.items():
            if theirs[key] not in known and (key, theirs[key]) != ("n_inner", 4 * theirs.get("n_embd", 0)):
                raise UserError(f"{where}: {key}={str(theirs[key])[:40]} cannot be had here, only "
                                f"{' or '.join(map(str, known))}")
        theirs["block_size"] = theirs["n_positions"]
        sizes = {spec.name: train.convert(spec, theirs[spec.name], where) for spec in fields(train.GPTConfig)
                 if spec.name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
        config = train.Settings(
            **sizes, activation="gelu" if theirs["activation_function"] == "gelu" else "gelu_tanh",
            tied_head=theirs["tie_word_embeddings"], position="learned", norm="layernorm", norm_weight=True, bias=True,
            qk_norm=False, zero_init=False, ngram=1)
        train.check(config)
        model = gpt2_weights(read_tensors(path), config, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"init_from={name}: cannot read {error.filename or path}: {error.strerror or error}") from None
    except Exception as error:  # json, safetensors, zipfile and torch.load raise many kinds for what is hostile
        reason = f"{type(error).__name__}: {' '.join(str(error).split('. ')[0].split())[:100]}"
        raise UserError(f"init_from={name}: {path} and config.json are damaged, or not GPT-2 in Hugging Face's layout "
                        f"({reason}); nothing was run") from None
    tokenizer = theirs.get("tokenizer_spec", dict(kind="tiktoken", encoding="gpt2"))  # sample.py --export notes it
    return dict(format=1, step=0, config=asdict(config), tokenizer=tokenizer, model=model)


def gpt2_weights(tensors, config, path):
    """Our GPT's state dict out of GPT-2's tensors. Raises UserError for one too many, too few or of another shape."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
               if not re.search(r"\.attn\.(masked_)?bias$", name)}  # constants that old versions saved
    head = tensors.pop("lm_head.weight", None) if config.tied_head else None
    if head is not None and not torch.equal(head, tensors.get("wte.weight", head)):
        raise UserError(f"{path}: lm_head.weight is not wte.weight, though config.json ties them")
    with torch.device("meta"):  # takes no memory before it is known to fit
        wanted = {name: tensor.shape for name, tensor in train.GPT(config).state_dict().items()}
    weights = {}
    for ours, shape in wanted.items():
        if ours == "head.weight" and config.tied_head:
            weights[ours] = weights["wte.weight"]
            continue
        name, transposed = gpt2_name(ours)
        shape = tuple(reversed(shape)) if transposed else tuple(shape)
        if name not in tensors:
            raise UserError(f"{path}: there is no tensor {name}, which has shape {shape} in such a model")
        tensor = tensors.pop(name)
        rows = slice(config.vocab_size) if ours in ("wte.weight", "head.weight") else ...  # without padding
        if tensor.ndim != len(shape) or tensor[rows].shape != shape or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)} ({tensor.dtype}), but by its "
                            f"config.json {shape}")
        weights[ours] = (tensor.T if transposed else tensor[rows]).float().contiguous()
    for name, tensor in tensors.items():
        raise UserError(f"{path}: the tensor {str(name)[:80]} of shape {tuple(tensor.shape)} has no place in GPT-2")
    return weights


def fit_gpt2(s, checkpoint):
    """Cut the positions and pad the rows of what read_gpt2 returned to the settings. UserError if they contradict."""
    before, weights = checkpoint["config"], checkpoint["model"]
    if train.read_meta(s)[1]["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"dataset={s.dataset} has another tokenizer than the model to start from: `python prepare.py "
                        "--tokenizer=gpt2` makes data/gpt2 for GPT-2")
    free = ("dropout", "ngram_dropout", "recompute", "vocab_multiple")
    for key in (f.name for f in fields(train.GPTConfig) if f.name not in free):
        if getattr(s, key) != before[key] and not (key == "block_size" and s.block_size < before[key]):
            raise UserError(f"{key}={getattr(s, key)} does not fit init_from={s.init_from}, which has {before[key]}: "
                            "leave it out")
    weights["wpe.weight"] = weights["wpe.weight"][:s.block_size]
    if missing := -s.vocab_size % s.vocab_multiple:
        for key in ("wte.weight", "head.weight"):
            weights[key] = F.pad(weights[key], (0, 0, 0, missing))
    checkpoint["config"] = asdict(s)


# ----------------------------------------------------------------------------------------------------------------------
# Handing a model on to transformers: as a GPT-2 where it has GPT-2's parts, else with train.py's own code beside it


WRAPPER = '''

class ExportedConfig(PretrainedConfig):
    """The settings of a GPT, under transformers' names too."""
    model_type = "exported_gpt"
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                     "max_position_embeddings": "block_size"}


class ExportedGPT(PreTrainedModel, GenerationMixin):
    """A GPT as transformers wants it: no padding, no cache; texts past the context go on from its last block_size."""
    config_class = ExportedConfig
    _tied_weights_keys = {"gpt.head.weight": "gpt.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def _init_weights(self, module):
        """GPT has done it."""

    def get_input_embeddings(self):
        return self.gpt.wte

    def get_output_embeddings(self):
        return self.gpt.head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **rest):
        size = self.config.block_size
        mask = None if attention_mask is None else attention_mask[:, -size:]
        return {"input_ids": input_ids[:, -size:], "attention_mask": mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **rest):
        """Logits (B, T, V) and, with labels (B, T), their loss; labels of -100 do not count."""
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError("this model takes no padding: batch texts of one length")
        self.gpt.compute_dtype = self.gpt.wte.weight.dtype
        logits, loss = self.gpt(input_ids)
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)
'''


def modeling_source():
    """A module that defines train.py's model, from its own source, and the class that transformers loads."""
    source = inspect.getsource(train)
    model = next(part for part in source.split("# " + "-" * 118 + "\n") if part.startswith("# Model:"))
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom)) and any(
        re.search(rf"\b{(alias.asname or alias.name).split('.')[0]}\b", model) for alias in node.names)]
    return "\n".join((
        '"""AutoModelForCausalLM.from_pretrained(this folder, trust_remote_code=True) loads it."""',
        *map(ast.unparse, imports), "from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel",
        "from transformers.modeling_outputs import CausalLMOutput", "", model.strip(), WRAPPER))


def is_gpt2(c):
    """Whether a model of this config can be said in GPT-2's terms."""
    return (c.position == "learned" and c.norm == "layernorm" and not c.qk_norm and c.mlp and c.residual
            and c.ngram == 1 and c.activation in ("gelu", "gelu_tanh"))


def gpt2_tensors(model):
    """A model's tensors under GPT-2's names, with the ones and zeros that stand for parts that it was made without."""
    state, c = model.state_dict(), model.config
    with torch.device("meta"):
        wanted = train.GPT(replace(c, bias=True, norm_weight=True, vocab_multiple=1)).state_dict()
    tensors = {}
    for ours, like in wanted.items():
        name, transposed = gpt2_name(ours)
        neutral = torch.ones if name.endswith("weight") else torch.zeros
        tensor = state[ours][:len(like)] if ours in state else neutral(like.shape)  # without the rows of padding
        tensors[name if ours == "head.weight" else f"transformer.{name}"] = tensor.T if transposed else tensor
    return tensors


def model_files(model, tokenizer):
    """What goes into an exported model's folder besides its tokenizer: a dict of texts by name, and one of tensors."""
    c = model.config
    config = dict(tie_word_embeddings=c.tied_head, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot,
                  dtype="float32", tokenizer_spec=tokenizer.spec)
    if is_gpt2(c):
        config |= dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab_size, n_positions=c.block_size,
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
            attn_pdrop=0.0, layer_norm_epsilon=1e-5,
            activation_function="gelu_new" if c.activation == "gelu_tanh" else "gelu")
        tensors, texts = gpt2_tensors(model), {}
        head = "lm_head.weight"
    else:
        own = {f.name: getattr(c, f.name) for f in fields(train.GPTConfig)}
        config |= own | dict(
            architectures=["ExportedGPT"], model_type="exported_gpt", use_cache=False,
            auto_map=dict(AutoConfig="modeling_gpt.ExportedConfig", AutoModelForCausalLM="modeling_gpt.ExportedGPT"))
        tensors, texts = {f"gpt.{name}": tensor for name, tensor in model.state_dict().items()}, {
            "modeling_gpt.py": modeling_source()}
        head = "gpt.head.weight"
    if c.tied_head:
        del tensors[head]
    return texts | {"config.json": json.dumps(config, indent=1)}, tensors


def byte_letters():
    """GPT-2's printable stand-in for each byte, a list of 256: itself where it is printable Latin-1."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merge_of(token, ranks):
    """The two tokens whose merge makes this one: byte-pair encoding it, but for its own rank, leaves these.

    >>> merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4})
    (b'a', b'bc')
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def tokenizer_files(tokenizer, block_size):
    """The tokenizer in transformers' files, a dict of texts by name; empty where it has none for this kind."""
    letters, kind = byte_letters(), tokenizer.spec["kind"]
    about = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=block_size,
                 clean_up_tokenization_spaces=False)
    by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    if tokenizer.spec == dict(kind="tiktoken", encoding="gpt2"):
        encoding = tokenizer.encoding
        ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
        spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
        merges = [merge_of(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        return {
            "vocab.json": json.dumps({spelled[token]: i for token, i in ranks.items()} | {prepare.EOT: tokenizer.eot}),
            "merges.txt": "#version: 0.2\n" + "".join(f"{spelled[a]} {spelled[b]}\n" for a, b in merges),
            "tokenizer_config.json": json.dumps(about | dict(
                tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token=prepare.EOT, eos_token=prepare.EOT,
                unk_token=prepare.EOT))}
    if kind == "byte":
        parts = dict(model=dict(type="BPE", vocab={letter: i for i, letter in enumerate(letters)}, merges=[]),
                     pre_tokenizer=by_byte, decoder=by_byte)
    elif kind == "char":
        each = dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False)
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        parts = dict(model=dict(type="WordLevel", vocab=vocab, unk_token=""), pre_tokenizer=each,
                     decoder=dict(type="Fuse"))
    else:
        return {}
    blank = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"tokenizer.json": json.dumps(dict(version="1.0", added_tokens=[]) | blank | parts),
            "tokenizer_config.json": json.dumps(about)}


def export(s):
    """Write the model as a new folder, whole or not at all. Raises UserError and prepare.UserError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("writing safetensors needs safetensors: pip install safetensors") from None
    folder = Path(os.path.abspath(s.export))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export={s.export} is there and not an empty folder: name a new one")
    model, tokenizer = load(s)
    texts, tensors = model_files(model, tokenizer)
    texts |= (about_text := tokenizer_files(tokenizer, model.config.block_size))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors",
                  metadata={"format": "pt"})
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # safetensors hides it from others
        if folder.exists():
            folder.rmdir()  # it is empty; Windows would not replace it
        os.replace(temporary, folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot write export={s.export} ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    how = "GPT2LMHeadModel" if is_gpt2(model.config) else "AutoModelForCausalLM with trust_remote_code=True"
    show(f"{s.export}: {', '.join(sorted([*texts, 'model.safetensors']))}; transformers loads it as {how}\n")
    if not about_text:
        complain(f"note: transformers has no file for the tokenizer {tokenizer.spec['encoding']}: it is left out")


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Writer:
    """A model, its tokenizer and the way to draw: it goes on from starts, on standard output."""

    def __init__(self, s, checkpoint=None):
        self.model, self.tokenizer = load(s, checkpoint)
        self.device, V = place(self.model, s), self.model.config.vocab_size
        self.model.to(self.model.compute_dtype)  # once here, or every layer would do it at every token
        blank = [i for i in range(V) if not self.tokenizer.decode_bytes([i])]  # gaps, and rows beyond the vocabulary
        self.drawing = dict(
            forbidden=torch.tensor(blank, device=self.device) if blank else None,
            generator=torch.Generator(self.device).manual_seed(s.seed), repetition_penalty=s.repetition_penalty,
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
        self.threads = torch.get_num_threads()
        self.num_samples, self.max_new_tokens, self.stop = s.num_samples, s.max_new_tokens, s.stop.replace("\\n", "\n")

    def encode(self, start):
        """The last block_size ids of a start; of an empty one, what begins a text: end-of-text, a line's end or id 0.

        Raises prepare.UserError for a character that the vocabulary lacks.
        """
        if start:
            return self.tokenizer.encode(start)[-self.model.config.block_size:]
        if self.tokenizer.eot is not None:
            return [self.tokenizer.eot]
        try:
            return self.tokenizer.encode("\n")
        except prepare.UserError:
            return [0]

    def pieces(self, prompts, samples):
        """Yield step by step what each text gains, as a list; prompts are lists of ids of one length."""
        torch.set_num_threads(self.threads if worth_threads(self.model, len(prompts) * samples) else 1)
        texts = [Continuation(self.tokenizer, self.stop) for _ in range(len(prompts) * samples)]
        idx = torch.tensor(prompts, device=self.device)
        steps = generate(self.model, idx, self.max_new_tokens, samples, **self.drawing)
        # Reading an id waits for the GPU, so what nobody watches is read many steps at a time.
        at_once = 1 if len(texts) == 1 or self.device.type == "cpu" else 32
        while not all(text.ended for text in texts) and (tokens := list(islice(steps, at_once))):
            for row in torch.stack(tokens).tolist():
                yield [text.feed(token) for text, token in zip(texts, row, strict=True)]
        yield [text.finish() for text in texts]

    def write(self, starts):
        """Print each start with each of its continuations, in order; a single one as it is written.

        Raises prepare.UserError for an unknown character before anything is printed.
        """
        prompts = [self.encode(start) for start in starts]
        if len(starts) * self.num_samples == 1:
            return self.stream(starts[0], prompts[0])
        finished = [[] for _ in starts]
        for numbers, samples in in_batches([len(prompt) for prompt in prompts], self.num_samples):
            pieces = self.pieces([prompts[number] for number in numbers], samples)
            texts = ["".join(gained) for gained in zip(*pieces, strict=True)]
            for i, number in enumerate(numbers):
                finished[number] += texts[i * samples:(i + 1) * samples]
            if len(starts) == 1:  # no other can be due before these
                show_samples(starts, finished)
        show_samples(starts, finished)

    def stream(self, start, prompt):
        """Print one start and its continuation as it is written."""
        show(start)
        end = start[-1:]
        for (piece,) in self.pieces([prompt], 1):
            show(piece)
            end = piece[-1:] or end
        show("" if end == "\n" else "\n")


def every_step(s):
    """Print a line for the checkpoint that is there and for each that replaces it, until the run has ended.

    One that is replaced before it was read is left out. Raises UserError and prepare.UserError.
    """
    path, start = s.ckpt or str(Path(s.out_dir) / "ckpt.pt"), read_start(s.start)
    s = replace(s, ckpt=path, max_new_tokens=min(s.max_new_tokens, LINE))
    seen = printed = None
    if not os.path.exists(path) and not os.path.exists(Path(path).parent / "ckpt-previous.pt"):  # else it is replaced
        complain(f"there is no {path} yet: waiting until train.py has written it; Ctrl-C ends this")
    while True:
        file = identity(path)
        if file in (None, seen):
            time.sleep(POLL)
            continue
        checkpoint = read_checkpoint(path)
        seen, step, last = file, checkpoint["step"], checkpoint["config"].get("max_iters")
        if printed != (printed := (step, checkpoint.get("elapsed"))):  # equal: it was replaced after identity()
            show(line_of(s, start, checkpoint))
        if type(last) is int and step >= last:
            return complain(f"the run has ended, at step {step} of {last}")
        del checkpoint  # its memory may be what train.py needs meanwhile


def line_of(s, start, checkpoint):
    """A checkpoint in one line: its step, the best validation loss up to it, and what it makes of the start."""
    writer, text, best = Writer(s, checkpoint), "", checkpoint.get("best_val_loss")
    for (piece,) in writer.pieces([writer.encode(start)], 1):
        text += piece
        if len(text) >= LINE:
            break
    best = f"{best:.4f}" if type(best) is float and best < math.inf else "-"  # before the first evaluation
    return f"step {checkpoint['step']:6d}  best val loss {best:<6}  {visible(text[:LINE])}\n"


def run(s):
    """Write what the settings ask for. Raises UserError and prepare.UserError."""
    check(s)
    if s.export:
        return export(s)
    if s.score:
        return score(s)
    if s.plot:
        return plot(s)
    if s.show:
        return show_picture(s)
    if s.every_step:
        return every_step(s)
    starts = [] if s.interactive else [read_start(s.start)]
    if s.per_line:
        starts = [line for line in starts[0].split("\n") if line.strip()]
        if not starts:
            raise UserError(f"per_line=True finds no line with text in start={s.start!r}: "
                            "for example --start=FILE:prompts.txt")
    writer = Writer(s)
    if not s.interactive:
        return writer.write(starts)
    for line in typed_lines():
        separates = s.num_samples == 1 and not sys.stdin.isatty()  # a person sees where the next line was typed
        try:
            writer.write([line])
        except prepare.UserError as error:  # an unknown character: the next line may be better
            complain(error)
        show((SEPARATOR + "\n") * separates)


def join_folders(argv):
    """The command line with the words after --plot, which are folders and no config files, in its value, a line each.

    >>> join_folders(["--plot=a", "b", "--seed=1"])
    ['--plot=a\\nb\\n', '--seed=1']
    """
    joined, taking = [], False
    for word in argv:
        key, _, value = word.partition("=")
        if taking and not word.startswith("--"):
            joined[-1] += word + "\n"
        elif taking := key == "--plot":
            joined.append(f"--plot={value}\n")
        else:
            joined.append(word)
    return joined


def complain(error):
    """One line on stderr."""
    print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Windows pipes would have a code page
    try:
        if "--help" in argv or "-h" in argv:
            show(__doc__ + "\nSettings, each with its default:\n" + train.describe(Settings) + "\n")
        else:
            run(train.override(Settings(), join_folders(argv)))
        return 0
    except (UserError, prepare.UserError) as error:
        complain(error)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not train.is_out_of_memory(error):
            raise
        complain("out of memory on the device: try fewer --num_samples, --dtype=bfloat16 or --device=cpu")
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of writing; nothing else lets one through
        if sys.stdout is sys.__stdout__:  # what it still holds must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:  # a closed pipe; on Windows the latter
            return 0
        complain(f"cannot write the text: {error.strerror}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
