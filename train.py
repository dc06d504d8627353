"""Train a GPT. The whole of it is in this file: settings, model, optimizer, data, processes, checkpoint, loop.

    python prepare.py                                       # once: fetch tiny Shakespeare, write data/char/
    python train.py                                         # the defaults below, on whatever hardware there is
    python train.py config/train_char_sprint.py             # two CPU cores, seconds
    python train.py config/train_char_cpu.py                # two CPU cores, 100 seconds
    python train.py config/train_char.py --device=cuda      # 10.8M parameters, one GPU
    torchrun --nproc_per_node=4 train.py                    # four processes: the same curve, sooner
    python train.py --init_from=resume                      # go on exactly where the last run stopped
    python train.py config/finetune_gpt2.py                 # GPT-2, fetched once, on your gpt2-tokenized text
    python train.py --help                                  # every setting, its default and its reason

Every run writes out/ckpt.pt (latest), out/best.pt (best validation loss), out/log.jsonl and, where matplotlib is
installed, out/loss.png.
"""
# A first reading of 600 lines: the sections Model, Optimizer, Schedule and evaluation, The loop, and window_starts.
# Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary. Everywhere `s` is the Settings of the run,
# `out` the Path of its folder, `split` a Split of the data.
import time

LAUNCHED = time.monotonic()  # before the slow imports, because the time a user waits begins here

import ast
import contextlib
import difflib
import errno
import importlib.util
import json
import math
import operator
import os
import pickletools
import re
import shlex
import shutil
import signal
import struct
import sys
import textwrap
import threading
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Settings: each declared once, with its type, default and reason; files and flags override them from left to right.


class UserError(Exception):
    """A mistake of the user's: shown as one line on stderr, exit status 2."""


class RunFailed(Exception):
    """A run that cannot go on, through no mistake in what was typed: one line on stderr, exit status 1."""


def tell(text, stream="stdout"):
    """Print a line at once. A full disk or a closed pipe ends the output, but never the training."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))


def setting(default, reason, choices=(), least=-math.inf, below=math.inf):
    """A dataclass field that carries its reason, shown by --help, and the values it may have."""
    return field(default=default, metadata=dict(reason=reason, choices=choices, least=least, below=below))


SIZES = {  # n_layer, n_head, n_embd, as in minGPT's table
    "gpt-nano": (3, 3, 48), "gpt-micro": (4, 4, 128), "gpt-mini": (6, 6, 192), "gopher-44m": (8, 16, 512),
    "openai-gpt": (12, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass
class GPTConfig:
    """What a GPT is made of: all that the model reads. GPT-2 itself is config/gpt2.py."""
    vocab_size: int = setting(0, "tokens in the vocabulary; 0 takes the data's", least=0, below=2**33)
    vocab_multiple: int = setting(1, "pad the vocabulary to a multiple of this; GPUs like 64", least=1, below=10**6)
    block_size: int = setting(64, "T, the longest context in tokens", least=1)
    n_layer: int = setting(4, "blocks; 0 makes a bigram model", least=0, below=10**4)
    n_head: int = setting(4, "attention heads in a block; must divide n_embd", least=1)
    n_embd: int = setting(128, "C, channels of the residual stream", least=1, below=10**6)
    ngram: int = setting(5, "the longest n-gram whose embedding is added to the token's; 1 is off", least=1, below=9)
    ngram_rows: int = setting(32768, "rows of the table for each n; n-grams share them by a hash", least=1, below=2**31)
    ngram_dropout: float = setting(0.0, "of the n-grams' embeddings; 0.5 helps beyond one epoch", least=0, below=1)
    dropout: float = setting(0.0, "share of the residual branches' outputs dropped in training", least=0, below=1)
    bias: bool = setting(False, "biases in the linear layers and LayerNorms")
    position: str = setting("rope", "how a token knows its place", ("rope", "learned", "none"))
    norm: str = setting("rmsnorm", "normalization before each branch and the head", ("rmsnorm", "layernorm", "none"))
    norm_weight: bool = setting(False, "a learned gain in each normalization")
    qk_norm: bool = setting(True, "normalize queries and keys, which allows larger learning rates")
    mlp: bool = setting(True, "an MLP after each attention")
    activation: str = setting("relu2", "the MLP's nonlinearity", ("relu2", "relu", "gelu", "gelu_tanh"))
    residual: bool = setting(True, "add each branch's output to its input; False goes on with the output alone")
    tied_head: bool = setting(False, "share the head's weight with the token embedding")
    zero_init: bool = setting(True, "projections into the residual stream, and an untied head, start at zero")
    recompute: bool = setting(False, "compute a block's activations again for its gradient: less memory, more time")


@dataclass
class Settings(GPTConfig):
    """All that can be set: the model's own settings, then the run's. Names are nanoGPT's where the meaning is."""
    size: str = setting("", "sets n_layer, n_head and n_embd by a model's name", ("", *SIZES))
    # files
    dataset: str = setting("char", "folder below data/ that prepare.py wrote, or a path to one")
    out_dir: str = setting("out", "folder of checkpoints and log")
    init_from: str = setting("scratch", "start anew; resume: go on from out_dir/ckpt.pt; gpt2, gpt2-medium, "
                                        "gpt2-large, gpt2-xl, distilgpt2 or a path to such files: finetune GPT-2")
    train_last: int = setting(0, "train only this many last blocks and what follows them; 0 is everything", least=0)
    # batch
    batch_size: int = setting(12, "sequences in one forward and backward pass of one process", least=1, below=10**6)
    gradient_accumulation_steps: int = setting(1, "times batch_size is the global batch of all processes", least=1,
                                               below=10**6)
    # optimizer
    optimizer: str = setting("muon", "Muon for the blocks' matrices, else AdamW; or AdamW alone", ("muon", "adamw"))
    learning_rate: float = setting(5e-3, "peak, for every parameter: Muon's update is scaled to AdamW's size", least=0)
    max_iters: int = setting(2000, "optimizer updates in all", least=1)
    weight_decay: float = setting(0.1, "decoupled, on matrices and embeddings", least=0)
    beta1: float = setting(0.9, "AdamW's decay of the gradient mean", least=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the squared gradient mean", least=0, below=1)
    momentum: float = setting(0.95, "Muon's decay of the gradient mean", least=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm, longer ones are scaled down; 0 is off", least=0)
    # schedule
    decay_lr: bool = setting(True, "decay the learning rate; False holds it after the warm-up")
    schedule: str = setting("wsd", "decay by a cosine, or warm up, stay, decay linearly", ("wsd", "cosine"))
    warmup_iters: int = setting(10, "updates of linear warm-up", least=0)
    decay_share: float = setting(1.0, "wsd: the share of the run spent in its linear decay", least=0.01, below=1.01)
    lr_decay_iters: int = setting(0, "update at which the decay ends; 0 is max_iters", least=0)
    min_lr: float = setting(0.0, "learning rate at the end of the decay", least=0)
    # evaluation and log
    eval_interval: int = setting(250, "updates between evaluations, each followed by a checkpoint", least=1)
    checkpoint_minutes: float = setting(10.0, "save also when this long has passed since the last; 0 is off", least=0)
    eval_iters: int = setting(0, "batches in an evaluation; 0 is the whole validation split", least=0)
    eval_only: bool = setting(False, "evaluate once and stop")
    log_interval: int = setting(10, "updates between log lines", least=1)
    tensorboard: bool = setting(False, "log to out_dir/tensorboard too; needs the package tensorboard")
    wandb: bool = setting(False, "log to Weights & Biases too, in its project gpt; needs the package wandb")
    # hardware
    device: str = setting("auto", "auto takes cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the matrix products; auto is bfloat16 where the hardware multiplies it natively",
                         ("auto", "float32", "bfloat16", "float16"))
    parallel: str = setting("ddp", "a process holds the whole model, or its part of every tensor", ("ddp", "fsdp"))
    compile: str = setting("auto", "torch.compile; auto where it pays back within the run", ("auto", "True", "False"))
    deterministic: bool = setting(False, "bitwise equal runs on GPUs too, at some cost in speed; CPU runs always are")
    seed: int = setting(1337, "of the weights, the batches and the dropout", least=0)


RETIRED = {  # nanoGPT settings that need no counterpart: accepted with a note, so that its config files load
    "always_save_checkpoint": "best.pt keeps the best model and ckpt.pt the latest", "backend": "the device decides it",
    **dict.fromkeys(("wandb_log", "wandb_project", "wandb_run_name"), "--wandb=True logs to the project gpt"),
}
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def literal(node):
    """The value of a syntax tree made of literals and arithmetic on numbers. ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = ast.BinOp(ast.Constant(0), ast.Sub(), node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = literal(node.left), literal(node.right)
        numbers = all(isinstance(x, float) or isinstance(x, int) and abs(x) < 10**999 for x in (left, right))
        # 9**9**9 would fill the memory before anyone could object
        if numbers and not (isinstance(node.op, ast.Pow) and (left < 0 or left > 1e6 or abs(right) > 64)):
            return ARITHMETIC[type(node.op)](left, right)
    raise ValueError("not a literal")


def read_config(path):
    """The (key, value, "file:line") triples of a config file of `key = literal` lines. Parsed, never executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        near = difflib.get_close_matches(str(path), [p.as_posix() for p in Path("config").rglob("*.py")], 1)
        flags_and_files = 'flags are written --key=value, a prompt --start="...", config files end in .py'
        hint = f"did you mean {near[0]}?" if near else flags_and_files
        raise UserError(f"cannot read config file {path} ({error.strerror}): {hint}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        hint = "" if str(path).endswith(".py") else f"; a text goes to `python prepare.py {path}`"
        raise UserError(f"{where}: not a config file: write one `key = value` a line{hint}") from None
    found = []
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            [target], value = node.targets, literal(node.value)
            if isinstance(value, int) and abs(value) > 2**63:
                raise ValueError("more than any setting takes")
            found.append((target.id, value, where))
        except (AttributeError, ValueError, ArithmeticError, RecursionError):
            raise UserError(f"{where}: nothing in a config file is executed: write `key = value`, the value a "
                            "number, a string, True or False, or arithmetic on numbers") from None
    return found


def convert(spec, value, where):
    """`value`, a literal of a config file or a word of the command line, as the type of the setting `spec`."""
    allowed, example = spec.metadata, f"for example --{spec.name}={spec.default}"
    try:
        if spec.type is bool:
            return WORDS[str(value).lower()]
        if spec.type is not str:
            number = float(value)  # so that 5e3 is a whole number too
            if isinstance(value, bool) or not math.isfinite(number) or (
                    spec.type is int and (number % 1 or abs(number) > 2**53)):  # above it a float skips numbers
                raise ValueError
            value = spec.type(number)
    except (KeyError, ValueError, OverflowError, TypeError):
        kind = {int: "a whole number below 2**53", float: "a number", bool: "True or False"}[spec.type]
        raise UserError(f"{where}: {spec.name}={str(value)[:40]} is not {kind}: {example}") from None
    if spec.type is not str:
        if allowed["least"] <= value < allowed["below"]:
            return value
        bounds = f"at least {allowed['least']}" + f" and below {allowed['below']}" * (allowed["below"] < math.inf)
        raise UserError(f"{where}: {spec.name}={value} must be {bounds}: {example}")
    choices, word = {choice.lower(): choice for choice in allowed["choices"]}, str(value).lower()
    if "true" in choices and word in WORDS:  # auto, True or False: as a person writes them
        word = str(WORDS[word]).lower()
    if choices and word not in choices:
        raise UserError(f"{where}: {spec.name}={value} is not one of {', '.join(filter(None, choices.values()))}")
    return choices[word] if choices else str(value)


def flags(argv, specs):
    """The (key, value, where) triples of the command line: config files, --key=value, --key value and --flag."""
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            yield from read_config(arg)
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals and key in specs and (specs[key].type is bool or "True" in specs[key].metadata["choices"]):
            value = rest.pop(0) if rest and rest[0].lower() in WORDS else "True"
        elif not equals and rest:
            value = rest.pop(0)
        elif not equals and key in specs:
            raise UserError(f"command line: --{key} needs a value: for example --{key}={specs[key].default}")
        yield key, value, "command line"


def override(settings, argv):
    """Set on `settings`, any dataclass of `setting` fields, what `argv` says: config files and flags, later wins.

    Returns the same object. Raises UserError with the place, the value found and the nearest known name.
    """
    specs = {spec.name: spec for spec in fields(settings)}
    for key, value, where in flags(argv, specs):
        if key in specs:
            setattr(settings, key, convert(specs[key], value, where))
        elif key in RETIRED:
            tell(f"note: {where}: {key} has no use here: {RETIRED[key]}", "stderr")
        else:
            near = difflib.get_close_matches(key, specs, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            raise UserError(f"{where}: unknown setting {key}: {hint}")
        if key == "size" and settings.size:
            settings.n_layer, settings.n_head, settings.n_embd = SIZES[settings.size]
    return settings


def describe(cls):
    """The text of --help: each setting with its default, type and reason, as wide as the terminal."""
    lines = []
    for spec in fields(cls):
        choices = ", ".join(filter(None, spec.metadata["choices"]))
        line = f"  {f'--{spec.name}={spec.default}':<32} {spec.type.__name__:<6}{spec.metadata['reason']}"
        lines.append(textwrap.fill(line + f": {choices}" * bool(choices), max(80, shutil.get_terminal_size().columns),
                                   subsequent_indent=" " * 41, break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def check(s):
    """Refuse Settings, or a GPTConfig, that cannot work together, before any work is done. Raises UserError."""
    if s.n_embd % s.n_head:
        near = min((h for h in range(1, s.n_embd + 1) if s.n_embd % h == 0), key=lambda h: abs(h - s.n_head))
        raise UserError(f"n_embd={s.n_embd} is not divisible by n_head={s.n_head}: for example --n_head={near}")
    if s.position == "rope" and s.n_embd // s.n_head % 2:
        raise UserError(f"position=rope needs an even head size, n_embd={s.n_embd} / n_head={s.n_head} is odd: "
                        f"choose another n_head, or --position=learned")
    if s.zero_init and not s.residual:
        raise UserError("residual=False learns nothing from zero_init=True, whose branches are zero: add "
                        "--zero_init=False")
    for package in ("tensorboard", "wandb"):
        if getattr(s, package, False) and importlib.util.find_spec(package) is None:
            raise UserError(f"{package}=True needs the package {package}: pip install {package}")
    if getattr(s, "train_last", 0) > s.n_layer:
        raise UserError(f"train_last={s.train_last} is more than there are blocks: at most --train_last={s.n_layer}")


# ----------------------------------------------------------------------------------------------------------------------
# Model: a decoder-only transformer. The defaults are what learns fastest at small size; every part has a setting.


class Linear(nn.Linear):
    """A linear layer whose float32 weight is cast to its input's dtype where it is used.

    Autocast does the same at about twice the cost in a small model's backward pass.
    """

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last dimension; learned parameters only if asked for."""

    def __init__(self, config, learned):
        super().__init__()
        self.kind = config.norm
        with_bias = learned and config.bias and config.norm == "layernorm"
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if learned and config.norm != "none" else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if with_bias else None

    def forward(self, x):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], weight, bias)
        return F.rms_norm(x, x.shape[-1:], weight) if self.kind == "rmsnorm" else x


def rotary(positions, head_size):
    """Cosines and signed sines (T, 1, 1, D) that turn each channel pair by an angle growing with its position.

    Rotary position embedding, Su et al. 2021, arXiv 2104.09864. float32, for integer positions (T,).
    """
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angle = positions[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None, None], torch.cat([-sin, sin], -1)[:, None, None]


class Attention(nn.Module):
    """Causal self-attention over H heads of size D."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qk_norm = Norm(config, learned=False) if config.qk_norm else nn.Identity()
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotation, cache):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = self.qk_norm(qkv[:, :, :2]), qkv[:, :, 2]  # queries and keys as one tensor: half as many kernels
        if rotation is not None:
            cos, sin = rotation
            qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], v))  # each (B, H, T, D)
        if x.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()  # the CPU's bfloat16 backward is about six times slower
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        # A single query is the newest token, which sees all that the cache holds.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.proj(y.transpose(1, 2).reshape(B, T, C).to(x.dtype))


ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
}


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    """Attention lets tokens talk, the MLP lets each think; both add to the residual stream x (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.dropout, self.residual = config.dropout, config.residual
        self.norm1, self.attn = Norm(config, config.norm_weight), Attention(config, layer)
        self.norm2, self.mlp = (Norm(config, config.norm_weight), MLP(config)) if config.mlp else (None, None)

    def add(self, x, branch):
        """The stream after a branch. Dropout is here, not on the attention weights, which would lose fused kernels."""
        branch = F.dropout(branch, self.dropout, self.training)
        return x + branch if self.residual else branch

    def forward(self, x, rotation, cache):
        x = self.add(x, self.attn(self.norm1(x), rotation, cache))
        return x if self.mlp is None else self.add(x, self.mlp(self.norm2(x)))


class NGrams(nn.Module):
    """Embeddings of the 2, 3, ... tokens that end at each place, beside the token's own: (B, T) -> (B, T, C).

    What a small model's first layers would have to learn about its neighbours, a table lookup brings at no cost. Rows
    are found by multiplicative hashing (Knuth, TAOCP 6.4), so rare n-grams share them; Huang et al. 2025, arXiv
    2501.16975, show that it helps large models too. Tables of a quarter of the channels learn as much from a fourth
    of the memory. Before the first token stand zeros.
    """

    def __init__(self, config):
        super().__init__()
        self.n, self.rows, self.vocab_size = config.ngram, config.ngram_rows, config.vocab_size
        self.dropout = config.ngram_dropout
        width = max(1, config.n_embd // 4)
        self.tables = nn.ModuleList(nn.Embedding(self.rows, width) for _ in range(self.n - 1))
        self.mix = Linear(width * (self.n - 1), config.n_embd, bias=False)

    def ids(self, idx, cache):
        """The row (B, T) of each table."""
        older = self.n - 1
        before = idx.new_zeros(len(idx), older) if cache is None else cache.before(idx, older)
        tokens, gram, found = torch.cat([before, idx], 1), idx, []
        for back in range(1, self.n):
            gram = gram * self.vocab_size + tokens[:, older - back:-back]
            found.append((gram * 2654435761 % 2**32 * self.rows) >> 32)
        return found

    def forward(self, idx, cache):
        found = [table(ids) for table, ids in zip(self.tables, self.ids(idx, cache), strict=True)]
        return self.mix(F.dropout(torch.cat(found, -1), self.dropout, self.training))


class GPT(nn.Module):
    """A decoder-only transformer language model.

    >>> model = GPT(GPTConfig(vocab_size=65))
    >>> logits, loss = model(torch.zeros(1, 8, dtype=torch.long))
    >>> logits.shape
    torch.Size([1, 8, 65])
    """

    def __init__(self, config):
        super().__init__()
        assert config.vocab_size > 0, "GPTConfig.vocab_size must be set"
        self.config = config
        self.compute_dtype = torch.float32  # of activations and matrix products; parameters stay float32
        rows = -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ngrams = NGrams(config) if config.ngram > 1 else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config, config.norm_weight)
        self.head = Linear(config.n_embd, rows, bias=False)
        self.init_weights()
        if config.tied_head:
            self.head.weight = self.wte.weight

    def init_weights(self):
        """Normal with standard deviation 0.02, less for projections into the residual stream (or zero); zero biases."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith("proj"):  # GPT-2: keeps the residual stream's variance from growing with depth
                    std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                elif name == "head" and self.config.zero_init:
                    std = 0.0
                elif name == "ngrams.mix":
                    std = 0.1  # with 0.02 the tables are too faint at first: 1.581 instead of 1.569 after 500 steps
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) for token ids idx (B, T), and their mean cross-entropy in nats against targets (B, T).

        The loss is None without targets; targets of -1 do not count. With a cache (see sample.py), idx continues what
        the cache holds, and only the last position's logits (B, 1, V) are computed.
        """
        T, start = idx.shape[1], 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        if self.ngrams is not None:
            x = x + self.ngrams(idx, cache)
        x = F.dropout(x.to(self.compute_dtype), self.config.dropout, self.training)  # (B, T, C)
        rotation = None
        if self.config.position == "rope":
            rotation = [t.to(x.dtype) for t in rotary(positions, self.config.n_embd // self.config.n_head)]
        for block in self.blocks:
            if self.config.recompute and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rotation, cache, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        x = self.norm(x if cache is None else x[:, -1:])
        logits = self.head(x).float()
        if logits.shape[-1] > self.config.vocab_size:
            logits = logits[..., :self.config.vocab_size]  # padding rows end here and are never drawn
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def parameters_by_part(self):
        """Parameter counts as a dict: embedding, ngrams, attention, mlp, norm, head (0 when tied)."""
        count = dict(embedding=0, ngrams=0, attention=0, mlp=0, norm=0, head=0)
        for name, p in self.named_parameters():
            part = next((part for key, part in ((".attn.", "attention"), (".mlp.", "mlp"), ("norm", "norm"),
                                                ("ngrams", "ngrams"), ("head", "head")) if key in name), "embedding")
            count[part] += p.numel()
        return count

    def flops_per_token(self):
        """Floating-point operations of a forward and backward pass, by token (PaLM, arXiv 2204.02311, appendix B)."""
        c, weights = self.config, sum(p.numel() for p in self.blocks.parameters()) + self.head.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices inside the blocks, AdamW for the rest.


def orthogonalize(G, dtype, steps=5):
    """The nearest orthogonal matrices, roughly, to a stack of matrices G (N, rows, columns) with rows <= columns.

    Newton-Schulz iteration with Jordan et al.'s quintic, which brings every singular value to between about 0.7
    and 1.2: https://kellerjordan.github.io/posts/muon
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.to(G.dtype)


def is_sharded(x):
    """Whether this process holds only a part of tensor x."""
    return hasattr(x, "full_tensor")


def local(x):
    """The part of tensor x that this process holds: all of it, unless it is sharded."""
    return x.to_local() if is_sharded(x) else x


def whole(x):
    """Tensor x, gathered from all processes if it is sharded."""
    return x.full_tensor() if is_sharded(x) else x


def laid_out_like(p, x):
    """Tensor x, which every process has whole, sharded as parameter p is."""
    if not is_sharded(p) or x.shape != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized, scaled to the RMS of an AdamW update.

    The scale 0.2 * sqrt(max(rows, columns)) and the decoupled weight decay are Liu et al.'s 2025, arXiv 2502.16982,
    so that one learning rate serves Muon and AdamW. A group's `chunks` says how many matrices lie stacked in each
    of its parameters (3 for queries, keys and values). Matrices of one shape are orthogonalized together, and shared
    out over the processes.
    """

    def __init__(self, params, lr=1e-2, momentum=0.95, weight_decay=0.1, chunks=1, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, chunks=chunks))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One update, which is left in the gradients' place."""
        alike = {}  # (shape up to transposition, chunks) -> [(parameter, group)]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, means = [local(p.grad) for p in params], [local(self.state[p]["momentum"]) for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, means, group["momentum"])
            for p in params:
                key = *sorted((p.shape[0] // group["chunks"], p.shape[1])), group["chunks"]
                alike.setdefault(key, []).append((p, group))
        for (_, longer, chunks), entries in alike.items():
            at_once = dist.get_world_size() if is_sharded(entries[0][0]) else len(entries)  # sharded ones are gathered
            for first in range(0, len(entries), at_once):
                some = entries[first:first + at_once]
                updates = orthogonalize_together([whole(p.grad) for p, _ in some], chunks, self.dtype)
                for (p, group), update in zip(some, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(laid_out_like(p, update), alpha=-group["lr"] * 0.2 * math.sqrt(longer))


def orthogonalize_together(updates, chunks, dtype):
    """Orthogonalize `chunks` matrices stacked in each of `updates`, alike or transposed; processes share the work."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    each = -(-len(updates) // size)
    stacks = [u.view(chunks, -1, u.shape[1]) for u in updates]
    stacks = [s.mT if s.shape[1] > s.shape[2] else s for s in stacks]
    mine = stacks[rank * each:(rank + 1) * each]
    mine += [torch.zeros_like(stacks[0])] * (each - len(mine))  # the last share may be short
    done = orthogonalize(torch.cat(mine), dtype)
    if size > 1:
        parts = [torch.empty_like(done) for _ in range(size)]
        dist.all_gather(parts, done.contiguous())
        done = torch.cat(parts)
    return [(d if u.shape[0] // chunks == d.shape[1] else d.mT).reshape(u.shape)
            for u, d in zip(updates, done.split(chunks), strict=False)]  # less the zeros of the last share


def freeze(model, train_last):
    """Keep embeddings and all but the last blocks as they are: no gradient, no optimizer state. 0 freezes nothing."""
    for part in (model.wte, model.wpe, model.ngrams, *model.blocks[:-train_last]) if train_last else ():
        if part is not None:
            part.requires_grad_(False)


def make_optimizers(model, s):
    """The optimizers of a run, as a list; every parameter that learns is in exactly one group of one of them."""
    matrices = [(n, p) for n, p in model.blocks.named_parameters()
                if p.requires_grad and p.ndim == 2 and s.optimizer == "muon"]
    taken = {id(p) for _, p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [dict(params=[p for p in rest if p.ndim >= 2], weight_decay=s.weight_decay),
              dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)] if groups else []
    if matrices:
        groups = [dict(params=[p for n, p in matrices if n.endswith("qkv.weight") == (chunks == 3)], chunks=chunks)
                  for chunks in (3, 1)]
        optimizers.append(Muon(groups, lr=s.learning_rate, momentum=s.momentum, weight_decay=s.weight_decay,
                               dtype=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32))
    return optimizers


# ----------------------------------------------------------------------------------------------------------------------
# Data: memory maps of token ids. A batch is a pure function of the seed and of how many sequences came before it.


def plain(path):
    """`path`, which may be missing. Raises OSError for what would be read without end, as a named pipe or a device."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return path


def read_meta(s):
    """The folder of a dataset and its meta.json as a dict. Raises UserError when it is missing or damaged."""
    folder = Path(s.dataset) if "/" in s.dataset or os.sep in s.dataset else Path("data") / s.dataset
    path = folder / "meta.json"
    if os.path.isfile(folder):
        raise UserError(f"dataset={s.dataset} is a file, not yet tokens: run `python prepare.py {s.dataset} "
                        "--name=mine`, then --dataset=mine")
    try:
        meta = json.loads(plain(path).read_text(encoding="utf-8"))
        dict(meta["tokenizer"]), str(meta["corpus"])
        sizes = [meta["vocab_size"], *(meta[key][split] for key in ("tokens", "bytes") for split in ("train", "val"))]
        bits = dict(uint8=8, uint16=16, uint32=32)[meta["dtype"]]
        good = (meta["format"] == 1 and all(type(size) is int and 0 < size <= 2**53 for size in sizes)
                and meta["vocab_size"] <= 2**bits)
        for split in ("train", "val") if "files" in meta else ():
            rows = [(shard["name"], shard["tokens"], shard["offset"]) for shard in meta["files"][split]]
            names, counts, offsets = zip(*rows, strict=True)
            good = (good and all(type(n) is int and 0 <= n <= 2**53 for n in counts + offsets)
                    and min(counts) > 0 and sum(counts) == meta["tokens"][split]
                    and all(re.fullmatch(r"\w[\w.-]*", name) for name in names))  # a path could lead out of the folder
        if not good:
            raise ValueError
        for key in {"corpus", "note"} & meta.keys():  # shown to people: without what would command their terminal
            meta[key] = "".join(filter(str.isprintable, str(meta[key])))
    except FileNotFoundError:
        near = difflib.get_close_matches(folder.name, [p.parent.name for p in folder.parent.glob("*/meta.json")], 1)
        text = dict(char="", fineweb=" fineweb", gpt2=" --tokenizer=gpt2").get(s.dataset, f" TEXT --name={s.dataset}")
        hint = f"did you mean --dataset={near[0]}? Else " if near else ""
        raise UserError(f"no data in {folder}: {hint}run `python prepare.py{text}` first") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not a meta.json that prepare.py wrote: run prepare.py again") from None
    return folder, meta


def text_of(meta):
    """What tells the text of a dataset, and its split, from others."""
    return [str(meta.get("corpus_sha256")), *(meta["tokens"][split] for split in ("train", "val"))]


class Split:
    """The token ids of one split ("train" or "val"), never loaded whole: one file or many shards, indexed as one."""

    def __init__(self, folder, name, meta):
        self.count, self.vocab_size, self.dtype = meta["tokens"][name], meta["vocab_size"], np.dtype(meta["dtype"])
        shards = meta["files"][name] if "files" in meta else [dict(name=f"{name}.bin", offset=0, tokens=self.count)]
        self.path = folder / shards[0]["name"]
        self.ends = np.cumsum([shard["tokens"] for shard in shards], dtype=np.int64)  # as if all were one file
        self.shards = []  # (path, open file, byte at which the tokens begin, size)
        for shard in shards:
            path, offset = folder / shard["name"], shard["offset"]
            try:
                file = open(plain(path), "rb", buffering=0)  # held open: what replaces it does not reach a running job
            except OSError as error:
                raise UserError(f"cannot read {path} ({error.strerror}): run prepare.py again") from None
            size = offset + shard["tokens"] * self.dtype.itemsize
            self.shards.append((path, file, offset, size))
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise UserError(f"{path} has {found:,} bytes, but by its meta.json {size:,}: run prepare.py again")

    def read(self, starts, length):
        """Token ids (len(starts), length), int64; positions past the end repeat the last token.

        For each shard that a row reaches into, what lies in it is read, and what the other shards gave is kept.
        Raises RunFailed for an id beyond the vocabulary, which only a damaged file has.
        """
        index = np.minimum(starts[:, None] + np.arange(length), self.count - 1)
        first, last = np.searchsorted(self.ends, index[:, [0, -1]].T, side="right")  # the shards that a row lies in
        tokens = np.empty(index.shape, np.int64)
        for i in sorted({i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)}):
            path, file, offset, size = self.shards[i]
            if os.fstat(file.fileno()).st_size != size:
                raise RunFailed(f"{path} has another size than when this run began: prepare it anew, then resume")
            ids = np.memmap(file, self.dtype, "r", offset)  # mapped anew, or all pages ever read would stay resident
            rows = (first <= i) & (i <= last)
            places = index[rows] - (self.ends[i] - len(ids))
            inside = places.clip(0, len(ids) - 1)  # what lies in the shards before and after is not taken from here
            found = ids[inside]
            if found.max() >= self.vocab_size:
                where = inside.flat[found.argmax()]
                raise RunFailed(f"{path} is damaged: token {where:,} (byte {offset + where * self.dtype.itemsize:,}) "
                                f"is {found.max()}, its vocabulary has {self.vocab_size}: run prepare.py again")
            tokens[rows] = np.where(inside == places, found, tokens[rows])
        return torch.from_numpy(tokens)


def splitmix(x):
    """Bits of x (uint64 array) well mixed: the output function of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i, n, key):
    """Where a permutation of range(n), chosen by the integer `key`, sends the indices `i` (array). Needs no memory.

    A Feistel network permutes the next power of four; values that fall outside range(n) are sent on until they
    are inside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = splitmix(np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + splitmix(np.uint64([key])))

    def scramble(x):
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (splitmix(right + k) & low)
        return left << half | right

    x = scramble(np.asarray(i, dtype=np.uint64))
    while (outside := x >= n).any():
        x[outside] = scramble(x[outside])
    return x.astype(np.int64)


def window_starts(seed, first, count, n_tokens, block_size):
    """Start offsets (count,) of the training sequences number `first` to first + count - 1.

    An epoch cuts the split into windows of block_size, from an offset of its own, and takes each once, in an order
    of its own. Over the epochs every token is reached. Pure: the same arguments always give the same windows.
    """
    windows = max(1, n_tokens // block_size - 1)  # one less than there are, which leaves the offset room
    epoch, place = np.divmod(np.arange(first, first + count), windows)
    starts = np.empty(count, dtype=np.int64)
    for e in np.unique(epoch):
        key = splitmix(np.uint64([seed])).item() ^ int(e)
        offset = splitmix(np.uint64([key])).item() % (n_tokens - windows * block_size)
        starts[epoch == e] = offset + block_size * permute(place[epoch == e], windows, key)
    return starts


def training_batch(split, s, first, count, device):
    """Inputs and targets, each (count, T), of the training sequences from number `first`: targets are one later."""
    tokens = split.read(window_starts(s.seed, first, count, split.count, s.block_size), s.block_size + 1)
    if device.type == "cuda":
        tokens = tokens.pin_memory()  # so that the copy overlaps the step under way
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def check_data(s, splits, meta):
    """Refuse settings that do not fit the data. Raises UserError."""
    split = min(splits.values(), key=lambda split: split.count)
    if split.count <= s.block_size:
        raise UserError(f"block_size={s.block_size} is not shorter than {split.path} ({split.count:,} tokens): "
                        f"for example --block_size={max(1, split.count // 2)}, or prepare more text")
    if s.vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size={s.vocab_size} is less than the data's {meta['vocab_size']}: leave it out")


# ----------------------------------------------------------------------------------------------------------------------
# Processes and hardware. Under torchrun each process has a rank and takes its share of the same global batch.


@dataclass
class World:
    """This process's place among all: rank of size, its device, and the key-value store that torchrun shares."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    store: object = None
    watcher: threading.Thread = None  # of watch()
    ended: threading.Event = field(default_factory=threading.Event)

    def share(self, first, count):
        """The range of items first .. first + count - 1 that falls to this process."""
        return range(first + count * self.rank // self.size, first + count * (self.rank + 1) // self.size)

    def total(self, x):
        """The sum of tensor x over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def say(self, text):
        """Print a line, once for all processes."""
        if self.rank == 0:
            tell(text)

    def any(self, *flags):
        """For each flag, whether it is true in any process."""
        return [count > 0 for count in self.total(torch.tensor(flags, dtype=torch.float32)).tolist()]

    def fail(self, text):
        """Say on stderr why the run stops: once on each machine, and the reason of the process that failed first."""
        machine, ours = os.environ.get("GROUP_RANK", "0"), f"process {self.rank}: {text}"
        first = ours
        try:
            first = self.store.compare_set("failure", "", ours).decode()
            if self.store.add(f"failure was said on {machine}", 1) > 1:
                return
        except RuntimeError:
            pass  # the process that held the store is gone
        tell(f"train.py: {first}", "stderr")

    def watch(self):
        """End this process soon after another failed, also where it waits for that one and would wait for long."""
        with contextlib.suppress(RuntimeError):  # the process that held the store is gone
            while not self.store.check(["failure"]):
                if self.ended.wait(1):
                    return
        if not self.ended.wait(5):  # by then the wait has ended with an error of its own, most often
            self.fail("lost the process that the others meet at")
            os._exit(1)

    def leave(self):
        """Part from the other processes, when all went well."""
        if self.store:
            dist.barrier()  # rank 0 may have a picture to finish; whoever left before would look lost to it
            self.ended.set()
            self.watcher.join()
            dist.destroy_process_group()


def join_world(s):
    """The World of this process: torchrun's environment if there is one, else alone. Raises UserError on the device."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size, size_here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available() and size == 1
    name = s.device if s.device != "auto" else "cuda" if size_here <= gpus else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and size > 1 or name == "cuda":
            device = torch.device("cuda", local)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not one that train.py knows")
        torch.zeros(1, device=device)  # the surest test that it is there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = "no such device" if "Expected one of" in str(error) else str(error).splitlines()[0][:100]
        fewer = f", or start at most {gpus} processes" * (0 < gpus < size_here)
        raise UserError(f"device={name} cannot be used here ({reason}; {gpus} CUDA devices are seen): use "
                        f"--device=auto, which takes what there is of cuda, mps and cpu{fewer}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where float32 is asked for
    world = World(rank, size, device)
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts, in which the dead processes' addresses still stand
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        world.store = store
        world.watcher = threading.Thread(target=world.watch, daemon=True)
        world.watcher.start()
    return world


def choose_dtype(s, device):
    """The torch dtype of matrix products: what the settings ask for, or the fastest the hardware has natively."""
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private: absent means no
    if device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in native):
        return torch.bfloat16
    return torch.float32


def peak_flops(device, dtype):
    """The device's dense 16-bit operations a second, from its maker's data sheet, or None where it is not known."""
    peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in peaks.items() if key in name), None)


def compile_pays(model, s, world):
    """Whether to use torch.compile: by the settings and never a clock, so that a resumed run decides as before."""
    if s.compile != "auto":
        return s.compile == "True"
    flops = model.flops_per_token() * s.batch_size * s.gradient_accumulation_steps * s.block_size / world.size
    # operations a second and seconds a step beside them, uncompiled; seconds to compile; share of a step saved
    rate, overhead, cost, saved = (1e11, 0.005, 60, 0.35) if world.device.type == "cpu" else (1e14, 0.01, 60, 0.4)
    return world.device.type != "mps" and s.max_iters * (flops / rate + overhead) * saved > cost


def compile_model(model, s):
    """`model` compiled and tried once forward and backward, or `model` itself, with a note, when that fails."""
    try:
        fast = torch.compile(model, dynamic=False)
        tokens = torch.zeros(s.batch_size, s.block_size + 1, dtype=torch.long, device=model.wte.weight.device)
        fast(tokens[:, :-1], tokens[:, 1:])[1].backward()  # strides as in training, or it would be compiled again
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler can do wrong, training works without it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        tell(f"note: torch.compile failed, going on without it: {reason}", "stderr")
        fast = model
    model.zero_grad(set_to_none=True)
    return fast


def shard_model(model, world):
    """Let each process hold only its part of every tensor (FSDP2); they are gathered block by block where used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is changed in place here
    dtype = None if model.compute_dtype == torch.float32 else model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def synchronizing(model, now):
    """Synchronize the gradients of a backward pass over the processes now, or leave that to a later one."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(now)
    with nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync():  # DDP
        yield


def is_out_of_memory(error):
    """Whether an exception says that memory ran out: torch has no one class for it."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or re.search("allocate|ALLOC_FAILED", str(error)) is not None


def out_of_memory(s):
    """What to say of settings that did not fit into the memory."""
    with torch.device("meta"):  # counts without allocating
        model = GPT(s)
    freeze(model, s.train_last)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total, matrices = (sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model, model.blocks))
    states = 2 * total - (matrices if s.optimizer == "muon" else 0)  # AdamW keeps two numbers a parameter, Muon one
    return (f"out of memory: parameters, gradients and optimizer state take "
            f"{4 * (frozen + 2 * total + states) / 2**30:.2f} GiB in this run; the rest grows with "
            f"batch_size={s.batch_size} (halve it and double gradient_accumulation_steps: the curve stays), "
            f"block_size={s.block_size}, n_layer={s.n_layer} and n_embd={s.n_embd}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint: a plain dict of tensors and plain values, written whole or not at all, read without running code.

RUN_FILES = ("ckpt.pt", "ckpt-previous.pt", "best.pt", "log.jsonl")
PICKLED = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage")  # all a checkpoint needs


@dataclass
class Progress:
    """Where a run is: all that changes in it but the weights and the optimizer."""
    step: int = 0  # updates done
    sequences: int = 0  # training sequences seen, so that none is seen twice when batch_size changes on resume
    best_val_loss: float = math.inf
    best_step: int = 0
    loss_sum: float = 0.0  # training loss since the last log line: its sum and the number of steps
    loss_count: int = 0
    elapsed: float = 0.0  # seconds since launch, earlier parts of the run included


def save_checkpoint(path, checkpoint, keep=None):
    """Write a dict so that at every moment the old file or the new is there, whole; the old one is kept as `keep`.

    Raises OSError or RuntimeError when it cannot be written; the old file is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # x: never through a link that somebody put there
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_zip(path):
    """Raise ValueError for a zip file that is damaged, or not such as torch.save writes.

    torch would read it, but it could take all the memory, or look different to torch's reader than to zipfile's.
    """
    with zipfile.ZipFile(plain(path)) as archive:
        parts, file = archive.infolist(), archive.fp
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 98))
        # three records, as torch.save writes them: where the list of parts begins, where that is said, the old end
        end, begin, locator, there, old_end = struct.unpack("<4s44xQ4s4xQ4x4s18x", file.read())
        if ((end, locator, old_end, there, begin) != (b"PK\6\6", b"PK\6\7", b"PK\5\6", size - 98, archive.start_dir)
                or min(e.header_offset for e in parts) != 0):
            raise ValueError("two readings")
        # compressed they could swell, as they could one over the other; what claims to be a folder torch does not read
        if (any(e.compress_type != zipfile.ZIP_STORED or e.external_attr for e in parts)
                or sum(e.file_size for e in parts) > size or len({e.filename.lower() for e in parts}) < len(parts)):
            raise ValueError("not as stored")
        if archive.testzip() is not None:
            raise ValueError("wrong checksum")


def check_pickle(path):
    """Raise ValueError for a checkpoint whose pickle has what no run writes, though torch would read it."""
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.lower().endswith("data.pkl")]
    for pickle in pickles:
        before, made = "", {}  # the kind of each value that may come again: of lists in lists there could be no end
        for op, value, _ in pickletools.genops(pickle):
            if "GLOBAL" in op.name and value not in PICKLED or op.name.endswith("BINGET") and made.get(value) not in (
                    "GLOBAL", "BINUNICODE"):
                raise ValueError(f"no run writes {op.name} {value}")
            if op.name.endswith("BINPUT"):
                made[value] = before
            else:
                before = op.name


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. Runs no code from the file. Raises UserError."""
    path = Path(path)
    try:
        check_zip(path)
        check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what no run writes; it is refused below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if type(checkpoint) is not dict:
            raise ValueError("no checkpoint")
        # dict.items: an OrderedDict from a file may bring methods of its own
        checkpoint["model"] = weights = dict(dict.items(checkpoint["model"]))
        held = sum(weight.nbytes for weight in weights.values())  # views can claim more than there is
        if (checkpoint["format"] != 1 or type(checkpoint["step"]) is not int or held > 2 * path.stat().st_size
                or type(checkpoint["config"]) is not dict or type(checkpoint["tokenizer"]) is not dict):
            raise ValueError("not what a run writes")
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: run `python train.py` first, or name its --out_dir") from None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:  # zipfile and torch.load raise many kinds for a damaged or a hostile file
        raise UserError(f"{path} is damaged, or not a checkpoint of this version of train.py (nothing in it was run): "
                        "name another, or train anew") from None


def model_from_checkpoint(checkpoint, path="checkpoint"):
    """The GPT that a checkpoint holds, on the CPU, in evaluation mode. Raises UserError where they do not fit."""
    try:
        config = GPTConfig(**{f.name: convert(f, checkpoint["config"][f.name], path) for f in fields(GPTConfig)})
        check(config)
        if config.n_layer > len(checkpoint["model"]) or any(weight.is_meta for weight in checkpoint["model"].values()):
            raise ValueError("fewer weights than layers")
        with torch.device("meta"):  # takes no memory before it is known to fit
            model = GPT(config)
        model.load_state_dict(dict(checkpoint["model"]), assign=True)  # a copy, in which torch notes that it assigns
        if config.tied_head:
            model.head.weight = model.wte.weight
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path}: its weights and its settings do not fit together: {reason}") from None
    return model.float().eval()


class Run:
    """Everything that a checkpoint holds: the raw model, its optimizers and how far they have come."""

    def __init__(self, s, meta, world, checkpoint=None):
        """A new run, or the one that `checkpoint` holds. Raises UserError where it does not fit."""
        torch.manual_seed(s.seed)
        self.settings, self.meta = s, meta
        self.tokens_per_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
        self.bits_per_byte = meta["tokens"]["val"] / meta["bytes"]["val"] / math.log(2)  # of a loss in nats a token
        self.progress = Progress()
        self.lock = None  # the open lock file of the folder that this process writes to
        self.keeps = not (checkpoint or {}).get("fell_back")  # the ckpt.pt that is there, as ckpt-previous.pt
        self.model = GPT(s)
        self.model.compute_dtype = choose_dtype(s, world.device)
        try:
            if checkpoint:
                self.model.load_state_dict(checkpoint.pop("model"))  # popped, so that its memory is free for training
            freeze(self.model, s.train_last)
            if s.parallel == "fsdp" and world.size > 1:
                shard_model(self.model, world)
            self.model.to(world.device)
            self.optimizers = make_optimizers(self.model, s)
            self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.model.compute_dtype == torch.float16)
            if "optimizer" in (checkpoint or {}):  # a run to go on with, and not GPT-2's weights alone
                self.restore(checkpoint)
        except Exception as error:
            if not checkpoint or is_out_of_memory(error):
                raise
            raise UserError(f"{Path(s.out_dir) / 'ckpt.pt'}: cannot go on from it ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:100]}): train anew") from None

    def restore(self, checkpoint):
        """Take the optimizers' state and the progress of a checkpoint."""
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            kinds = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            wanted = optimizer.state_dict()  # its groups stay: learning rate, decay and the like are this run's
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                state = dict(dict.items(checkpoint["optimizer"][names[p]]))
                # a view of something smaller would have a fused step write past its memory
                fits = all(v.is_contiguous() and v.shape in ((), p.shape) for v in state.values())
                if state.keys() != kinds or not fits:
                    raise ValueError("optimizer state of another kind")
                wanted["state"][i] = {k: laid_out_like(p, v) for k, v in state.items()}
            optimizer.load_state_dict(wanted)
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = p = Progress(**{f.name: f.type(checkpoint[f.name]) for f in fields(Progress)})
        if not all(0 <= x < 2**53 for x in (p.step, p.sequences, p.loss_count, p.elapsed)):
            raise ValueError("no such progress")

    def check_lock(self):
        """Raise RunFailed where another folder has the name of ours and a run of its own, which we would overwrite."""
        path = Path(self.settings.out_dir) / ".lock"
        if self.lock and os.name == "posix" and path.exists() and not os.path.samestat(
                os.fstat(self.lock.fileno()), path.stat()):
            raise RunFailed(f"{path.parent} is another run's now: the folder that this run began in was moved or "
                            "deleted. What it had saved lies where it was moved to")

    def state(self):
        """The checkpoint: a dict of tensors and plain values. Sharded tensors come whole, in process 0 alone."""
        if is_sharded(self.model.wte.weight):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, optimizer = get_state_dict(self.model, self.optimizers, options=options)
            optimizer = optimizer.get("state")
        else:
            names = {p: name for name, p in self.model.named_parameters()}
            weights = self.model.state_dict()
            optimizer = {names[p]: dict(state) for o in self.optimizers for p, state in o.state.items()}
        return dict(format=1, model=weights, optimizer=optimizer, scaler=self.scaler.state_dict(),
                    config=asdict(self.settings), tokenizer=self.meta["tokenizer"], corpus=self.meta["corpus"],
                    data=text_of(self.meta), **asdict(self.progress))

    def save(self, out, val_loss, best, world, final):
        """Write out/ckpt.pt, keeping the one before it, and out/best.pt where val_loss is the `best` so far.

        A failure is a note, because the next save may succeed; of the final save it is a RunFailed.
        """
        progress, best_before = self.progress, (self.progress.best_val_loss, self.progress.best_step)
        if best:
            progress.best_val_loss, progress.best_step = val_loss, progress.step
        sharded = is_sharded(self.model.wte.weight)  # then all processes take part in gathering it
        state = self.state() if sharded or world.rank == 0 else None
        if world.rank:
            return
        try:
            if best:
                save_checkpoint(out / "best.pt", state)
                best_before = progress.best_val_loss, progress.best_step
            save_checkpoint(out / "ckpt.pt", state, keep=self.keeps and out / "ckpt-previous.pt")
            self.keeps = True
        except (OSError, RuntimeError) as error:
            progress.best_val_loss, progress.best_step = best_before
            text = f"step {progress.step} could not be saved in {out} ({' '.join(str(error).split())[:100]})"
            if final:
                raise RunFailed(f"{text}; what was saved before is whole. Make room, then --init_from=resume") from None
            tell(f"note: {text}; what was saved before is whole, and the next save tries again", "stderr")


def check_continued(s, checkpoint):
    """Refuse what cannot be changed when going on from a checkpoint. Raises UserError."""
    if read_meta(s)[1]["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"dataset={s.dataset} has another tokenizer than the checkpoint: resume with the data it was "
                        "trained on, or train anew with another --out_dir")
    free = ("dropout", "ngram_dropout", "recompute")
    for key in [f.name for f in fields(GPTConfig) if f.name not in free] + ["optimizer", "train_last"]:
        if getattr(s, key) != (before := checkpoint["config"].get(key, getattr(Settings, key))):
            raise UserError(f"{key}={getattr(s, key)} cannot be changed on resume: the checkpoint has {before}. "
                            "Leave it out, or train anew with another --out_dir")


def resume(s, argv):
    """The settings and the newest checkpoint in out_dir that is whole and fits the data and the command line."""
    refused = None
    for path in (Path(s.out_dir) / name for name in RUN_FILES[:2]):
        try:
            checkpoint = load_checkpoint(path)
            model_from_checkpoint(checkpoint, path)
            if "optimizer" not in checkpoint:
                raise UserError(f"{path} has no optimizer state to go on from: train anew")
            known = {f.name: convert(f, checkpoint["config"].get(f.name, f.default), path) for f in fields(Settings)}
            # the run's own settings, but for where it lies now, and over them what is asked for now
            settings = override(Settings(**known | dict(out_dir=s.out_dir)), argv)
            check(settings)
            check_continued(settings, checkpoint)
        except UserError as error:
            refused = error if os.path.exists(path) or refused is None else refused
            continue
        if refused:
            tell(f"note: {refused}; going on from {path.name}, step {checkpoint['step']}", "stderr")
        checkpoint["fell_back"] = refused is not None
        return settings, checkpoint
    raise refused


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder: one run at a time writes to it, and what an earlier one left there is kept.


def write_text(path, text):
    """Write a text file whole or not at all, and never through a link that somebody put there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


@contextlib.contextmanager
def claim(out, anew):
    """Hold folder `out` for this process, which a crash ends too. A new run sets an earlier one's files aside.

    Raises UserError when another run holds it, or when it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = out / ".lock"
        if lock.is_symlink() or lock.exists() and not lock.is_file():  # somebody put there, to be written through
            lock.unlink()
        file = open(lock, "ab")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot write to out_dir={str(out)!r} ({reason}): choose another with --out_dir") from None
    with file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # any other: a file system without locks, on which the user is trusted
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(f"out_dir={out} is in use by another run: wait for it, or choose another") from None
        if anew:
            set_aside(out)
        if this_job():
            with contextlib.suppress(OSError):  # a full disk: a restart then takes the run for another's
                write_text(out / ".job", this_job())
        yield file


def set_aside(out):
    """Move an earlier run's files to out/previous, or the next free name like it, so that nothing is overwritten."""
    old = [out / name for name in (*RUN_FILES, "loss.png", "tensorboard", "wandb-id.txt") if (out / name).exists()]
    if not old:
        return
    target, n = out / "previous", 1
    while os.path.lexists(target):
        n += 1
        target = out / f"previous-{n}"
    target.mkdir(parents=True)
    for path in old:
        os.replace(path, target / path.name)
    tell(f"an earlier run in {out} was moved to {target}")


def this_job():
    """What tells this launch of torchrun from others, over all its restarts; without torchrun nothing."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"child of {os.getppid()}" if job == "none" else job  # where it was given no --rdzv-id


def belongs_to_this_job(out):
    """Whether the run in folder `out` was begun by this launch of torchrun, which has restarted its processes since."""
    if os.environ.get("TORCHELASTIC_RUN_ID") == "none" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False  # the number of its parent process may be that of an earlier launch's
    with contextlib.suppress(OSError, ValueError):
        job = plain(out / ".job").read_text("utf-8")
        return job == this_job() != "" and any((out / name).exists() for name in RUN_FILES[:2])
    return False


# ----------------------------------------------------------------------------------------------------------------------
# What a run shows and logs: the header, the table, log.jsonl, trackers, loss.png.

DIM, BOLD = "2", "1"  # of ECMA-48, which every terminal knows


def paint(text, style):
    """`text` in a style, on a terminal whose user has not set NO_COLOR (https://no-color.org)."""
    plain_text = not style or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain_text else f"\x1b[{style}m{text}\x1b[0m"


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def announce(s, world, meta, model):
    """The run in a few lines, before it begins."""
    parts, tokens = model.parameters_by_part(), s.batch_size * s.gradient_accumulation_steps * s.block_size
    counted = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count)
    train_tokens, val_tokens = meta["tokens"]["train"], meta["tokens"]["val"]
    epochs, dtype = round(s.max_iters * tokens / train_tokens, 1), str(model.compute_dtype).removeprefix("torch.")
    usual = asdict(Settings(vocab_size=meta["vocab_size"]))
    changed = " ".join(f"{key}={value}" for key, value in asdict(s).items() if value != usual[key])
    for line in (
        f"corpus     {meta['corpus']}: {train_tokens:,} training and {val_tokens:,} validation tokens",
        *([f"           {meta['note']}"] if "note" in meta else []),
        f"settings   {changed}",
        f"model      {sum(parts.values()):,} parameters: {counted}",
        f"hardware   {world.device}, {dtype}, {world.size} process{'es' * (world.size > 1)}",
        f"work       {s.max_iters:,} steps of {tokens:,} tokens, {epochs or 'under 0.1'} epochs",
    ):
        world.say(textwrap.fill(line, 80, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False))


class Log:
    """The console's table, out_dir/log.jsonl and the trackers asked for: one line each time, by rank 0 alone."""

    def __init__(self, s, world, progress, peak_tokens_per_second):
        self.path = Path(s.out_dir) / "log.jsonl" if world.rank == 0 else None
        self.max_iters, self.peak = s.max_iters, peak_tokens_per_second
        self.launched, self.titled = LAUNCHED - progress.elapsed, False  # as if a resumed run had never stopped
        self.first_step, self.began = progress.step, time.monotonic()
        if self.path is None:
            return
        lines = self.path.read_text("utf-8", "replace").splitlines() if progress.step and self.path.is_file() else []
        found = [re.match(r'{"step": (\d{1,16}),.*}$', line) for line in lines]
        kept = [match[0] for match in found if match and int(match[1]) <= progress.step]
        write_text(self.path, "".join(line + "\n" for line in kept))  # a resumed run goes on after its checkpoint
        self.trackers = open_trackers(s, progress.step)

    def elapsed(self):
        """Seconds since the run was launched, its earlier parts included."""
        return time.monotonic() - self.launched

    def line(self, step, val_loss=None, best=False, **numbers):
        """Write what is known at a step; `best` marks the lowest val_loss so far. Step 0 has a val_loss alone."""
        if self.path is None:
            return
        record = dict(step=step, val_loss=val_loss, **numbers, elapsed=round(self.elapsed(), 3))
        append_line(self.path, json.dumps(record))
        for track in self.trackers:
            track(step, {key: value for key, value in record.items() if key != "step" and value is not None})
        val = " " * 8 if val_loss is None else paint(f"{val_loss:8.4f}", BOLD if best else "")
        pace = (time.monotonic() - self.began) / max(1, step - self.first_step)  # seconds a step, all included
        left = pace * (self.max_iters - step)
        if not self.titled:
            self.titled = True
            if step > self.first_step:
                done_at = time.strftime("%H:%M" if left < 43200 else "%A, %H:%M", time.localtime(time.time() + left))
                tell(f"time       about {clock(self.elapsed() + left)} in all, done at {done_at}")
            titles = "    step    loss     val       lr   norm   tokens/s  elapsed     left"
            tell(paint(titles + "    MFU" * bool(self.peak), DIM))
        if "loss" not in numbers:
            return tell(f"{step:8d}{'':8}{val}")
        mfu = f"{numbers['tokens_per_second'] / self.peak:7.1%}" if self.peak else ""
        tell(f"{step:8d}{numbers['loss']:8.4f}{val}{numbers['lr']:9.1e}{numbers['grad_norm']:7.3f}"
             f"{numbers['tokens_per_second']:11,d}{clock(self.elapsed()):>9}{clock(left):>9}{mfu}")


def append_line(path, text):
    """Append a whole line to a file or, with a note, none of it: a full disk neither stops a run nor cuts a line."""
    data = (text + "\n").encode("utf-8")
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                file.truncate(end)
                raise OSError("the disk is full")
    except OSError as error:
        tell(f"note: a line of {path} could not be written ({error.strerror or error})", "stderr")


def open_trackers(s, step):
    """The trackers that the settings ask for, each a function of (step, numbers by name). UserError."""
    trackers, out, shown = [], Path(s.out_dir), asdict(s)
    if s.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)  # what came after the checkpoint comes again
        writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in shown.items()), step)
        trackers.append(lambda step, numbers: [writer.add_scalar(*number, step) for number in numbers.items()])
    if s.wandb:
        import wandb
        name = out / "wandb-id.txt"
        known = name.read_text("utf-8") if step and name.is_file() else None
        try:
            run = wandb.init(project="gpt", name=s.out_dir, id=known, resume="allow" if known else None, dir=out,
                             config=shown, settings=wandb.Settings(silent=True))
            write_text(name, run.id)
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(f"wandb=True: {error}: run `wandb login`, or set WANDB_MODE=offline") from None
        tell(f"wandb      {run.dir if run.offline else run.url}")
        trackers.append(lambda step, numbers: run.log(numbers, step=step))
    return trackers


def draw_losses(out, world):
    """Keep out_dir/loss.png current, where matplotlib is installed; sample.py --plot, which compares runs, draws it."""
    if world.rank == 0 and importlib.util.find_spec("matplotlib"):
        try:
            if (out / "log.jsonl").stat().st_size:  # a run may stop before its first line
                import sample
                sample.plot_losses([out], out / "loss.png")
        except Exception as error:  # a picture is never worth a run
            tell(f"note: {out / 'loss.png'} could not be drawn: {' '.join(str(error).split())[:100]}", "stderr")


def show_progress(world, what, done, total, began):
    """A bar on a terminal for what takes longer than two seconds, wiped out when it is done."""
    if world.rank == 0 and sys.stdout.isatty() and time.monotonic() - began > 2:
        bar = "#" * (30 * done // total)
        sys.stdout.write(f"\r{what} [{bar:<30}] {done / total:4.0%}" if done < total else "\r" + " " * 60 + "\r")
        sys.stdout.flush()


def farewell(s, world, run, stop, stopping):
    """The run in a line or two, after its end. Returns the exit status."""
    progress, best = run.progress, run.progress.best_val_loss
    folder = "" if s.out_dir == "out" else f" --out_dir={shlex.quote(s.out_dir)}"
    if stopping:
        world.say(f"stopped at step {progress.step}, all is saved; go on: python train.py --init_from=resume{folder}")
        return 128 + (stop.number or signal.SIGTERM)  # if another process got the signal
    world.say(f"best validation loss {best:.4f} ({best * run.bits_per_byte:.4f} bits per byte) at step "
              f"{progress.best_step}, in {Path(s.out_dir) / 'best.pt'}\nto hear it: python sample.py{folder}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and evaluation.


def learning_rate(step, s):
    """The learning rate of update number `step` (from 0): warm-up, then constant and linear, or a cosine."""
    end = s.lr_decay_iters or s.max_iters
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    if step >= end:
        return s.min_lr
    if s.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (step - s.warmup_iters) / (end - s.warmup_iters)))
    else:
        left = min(1.0, (end - step) / (s.decay_share * (end - s.warmup_iters)))
    return s.min_lr + left * (s.learning_rate - s.min_lr)


@torch.no_grad()
def evaluate(model, split, s, world):
    """Mean cross-entropy in nats over a split, every token but the first predicted once, in windows of block_size.

    The same number for every process count and batch size, up to float rounding; draws nothing at random.
    """
    T = s.block_size
    windows = -(-(split.count - 1) // T)  # the last may be short
    if s.eval_iters:
        windows = min(windows, s.eval_iters * s.batch_size)
    mine = world.share(0, windows)
    passes = -(-windows // (world.size * s.batch_size))  # as many in each process: FSDP works in step
    losses, counts = torch.zeros(passes, device=world.device), torch.zeros(passes, dtype=torch.float64)
    began = time.monotonic()
    model.eval()
    for i in range(passes):
        rows = mine.start + i * s.batch_size + np.arange(s.batch_size)  # always a full batch: one shape, compiled once
        tokens = split.read(rows * T, T + 1)
        x, y = tokens[:, :-1], tokens[:, 1:].clone()
        past = rows[:, None] * T + np.arange(1, T + 1) >= split.count
        y[torch.from_numpy(past | (rows >= mine.stop)[:, None])] = -1
        losses[i] = model(x.to(world.device), y.to(world.device))[1]  # stays on the device: nothing waits here
        counts[i] = (y >= 0).sum()
        show_progress(world, "evaluating", i + 1, passes, began)
    if hasattr(model, "reshard"):
        model.reshard()  # FSDP keeps the outermost tensors whole for a backward pass, which does not come here
    losses = torch.where(counts > 0, losses.cpu().double(), 0.0)  # the mean of nothing is not a number
    model.train()
    total, count = world.total(torch.stack([losses @ counts, counts.sum()])).tolist()
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# The loop.


class StopSignal:
    """Remembers a SIGINT or SIGTERM, for the loop to stop after the step; a second SIGINT interrupts at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def accumulate_gradients(model, scaler, split, s, world, sequences):
    """Forward and backward over this process's share of the global batch, in passes of at most batch_size.

    Returns this process's part of the batch's mean loss, a scalar tensor. The gradients, once averaged over the
    processes, are those of the mean over the whole batch, however it was cut.
    """
    sequences_in_all = s.batch_size * s.gradient_accumulation_steps
    share = world.share(sequences, sequences_in_all)
    passes = -(-sequences_in_all // (world.size * s.batch_size))  # as many in each process: FSDP works in step
    total = torch.zeros((), device=world.device)
    for i in range(passes):
        rows = share[i * s.batch_size:(i + 1) * s.batch_size]  # may be none: a sequence of weight 0 keeps pace
        x, y = training_batch(split, s, rows.start, max(1, len(rows)), world.device)
        with synchronizing(model, i == passes - 1):
            loss = model(x, y)[1] * (len(rows) / sequences_in_all)
            scaler.scale(loss * world.size).backward()  # DDP and FSDP divide by the number of processes
        total += loss.detach()
    return total


def update(model, optimizers, scaler, lr, grad_clip):
    """Clip the gradients and take one optimizer step at learning rate lr. Returns the norm before clipping."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return grad_norm


def check_finite(s, first_step, **columns):
    """Raise RunFailed for the first step with a number that is not finite, before anything of it is saved."""
    for step, numbers in enumerate(zip(*columns.values(), strict=True), first_step):
        bad = [f"{name} {x:.4g}" for name, x in zip(columns, numbers, strict=True) if not math.isfinite(x)]
        if bad:
            kept = Path(s.out_dir) / "ckpt.pt"
            saved = f"{kept} is from before it" if kept.exists() else "no checkpoint was written yet"
            raise RunFailed(f"step {step}: {', '.join(bad).replace('_', ' ')} is not finite; {saved}. "
                            f"Usual causes: learning_rate={s.learning_rate:g} too high, warmup_iters={s.warmup_iters} "
                            f"too few, dtype={s.dtype} too coarse (try --dtype=float32)")


def fit(run, splits, s, world):
    """The training loop: update, evaluate, log, save, until max_iters or a signal. Returns the exit status."""
    model, progress, out = run.model, run.progress, Path(s.out_dir)
    # Three names for one set of weights: the raw model, which is saved; compiled; and synchronized over processes.
    compiled = synchronized = compile_model(model, s) if compile_pays(model, s, world) else model
    if world.size > 1 and s.parallel == "ddp":
        synchronized = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
    peak = peak_flops(world.device, model.compute_dtype)
    log = Log(s, world, progress, peak and peak * world.size / model.flops_per_token())
    stop, stopping = StopSignal(), False
    if progress.step == 0 and s.init_from not in ("scratch", "resume"):
        val_loss = evaluate(compiled, splits["val"], s, world)
        log.line(0, val_loss, bits_per_byte=val_loss * run.bits_per_byte)
    recent = []  # loss and gradient norm of the latest steps, still on the device
    began = saved = time.monotonic()
    while progress.step < s.max_iters and not stopping:
        # One update. Dropout is a function of (seed, step, rank), so that there is no random state to save.
        torch.manual_seed(((s.seed * 1_000_003 + progress.step) * 65_537 + world.rank) % 2**63)
        lr = learning_rate(progress.step, s)
        loss = accumulate_gradients(synchronized, run.scaler, splits["train"], s, world, progress.sequences)
        grad_norm = update(model, run.optimizers, run.scaler, lr, s.grad_clip)
        recent.append(torch.stack([loss, grad_norm]))
        progress.step += 1
        progress.sequences += s.batch_size * s.gradient_accumulation_steps
        evaluating = progress.step % s.eval_interval == 0 or progress.step == s.max_iters
        logging = evaluating or progress.step % s.log_interval == 0
        stopping, saving = world.any(stop.number, 0 < 60 * s.checkpoint_minutes < time.monotonic() - saved)
        if not (logging or stopping or saving):
            continue  # without waiting for the device
        run.check_lock()

        losses, grad_norms = torch.stack(recent).T.contiguous()
        losses, grad_norms = world.total(losses).tolist(), grad_norms.tolist()
        scaled = run.scaler.is_enabled()  # then steps with an infinite gradient are skipped by design
        check_finite(s, progress.step - len(recent) + 1, loss=losses, **{} if scaled else {"gradient_norm": grad_norms})
        tokens_per_second = len(recent) * run.tokens_per_step / (time.monotonic() - began)
        for each in losses:  # one by one: sum() rounds otherwise, and a resumed run's log would show it
            progress.loss_sum += each
        progress.loss_count += len(recent)
        val_loss = evaluate(compiled, splits["val"], s, world) if evaluating else None
        best = evaluating and val_loss < progress.best_val_loss
        if evaluating or stopping or saving:
            norm = whole(nn.utils.get_total_norm(model.parameters())).item()
            check_finite(s, progress.step, validation_loss=[val_loss if evaluating else 0.0], norm_of_weights=[norm])
        if logging:
            log.line(progress.step, val_loss, best, bits_per_byte=val_loss and val_loss * run.bits_per_byte,
                     loss=progress.loss_sum / progress.loss_count, lr=lr, grad_norm=grad_norms[-1],
                     tokens=progress.sequences * s.block_size, tokens_per_second=round(tokens_per_second))
            progress.loss_sum, progress.loss_count = 0.0, 0
        if evaluating or stopping or saving:
            progress.elapsed = log.elapsed()
            run.save(out, val_loss, best, world, final=stopping or progress.step == s.max_iters)
            draw_losses(out, world)
            saved = time.monotonic()
        recent.clear()
        began = time.monotonic()
    return farewell(s, world, run, stop, stopping)


def train(s, world, checkpoint=None):
    """Train as the settings say, from a checkpoint's state if one is given. Returns the exit status."""
    folder, meta = read_meta(s)
    splits = {name: Split(folder, name, meta) for name in ("train", "val")}
    if checkpoint and meta["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"dataset={s.dataset} was replaced a moment ago, by one of another tokenizer: resume again")
    if checkpoint and checkpoint.get("data", text_of(meta)) != text_of(meta) and world.rank == 0:
        tell(f"note: dataset={s.dataset} is not the text, or not the split of it, that the checkpoint was trained on",
             "stderr")
    s.vocab_size = s.vocab_size or meta["vocab_size"]
    check_data(s, splits, meta)
    writes = world.rank == 0 and not s.eval_only
    with claim(Path(s.out_dir), anew="optimizer" not in (checkpoint or {})) if writes else nullcontext() as lock:
        run = Run(s, meta, world, checkpoint)
        run.lock = lock
        steps = world.total(torch.tensor(run.progress.step, dtype=torch.float64)).item()
        if steps != run.progress.step * world.size:  # by the sum at least one of them sees it
            raise RunFailed(f"the processes read different checkpoints in out_dir={s.out_dir}: it must be on storage "
                            "that all machines share")
        if run.progress.step >= s.max_iters and not s.eval_only:
            world.say(f"nothing to do: step {run.progress.step} of {s.max_iters} is done; for more, "
                      f"--max_iters={2 * run.progress.step}")
            return 0
        announce(s, world, meta, run.model)
        if not s.eval_only:
            return fit(run, splits, s, world)
        val_loss = evaluate(run.model, splits["val"], s, world)
        world.say(f"validation loss {val_loss:.4f} ({val_loss * run.bits_per_byte:.4f} bits per byte)")
        return 0


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def configure(argv):
    """The settings and, when resuming, the checkpoint that the command line asks for. Raises UserError."""
    s = override(Settings(), argv)
    check(s)
    if s.init_from == "resume" or belongs_to_this_job(Path(s.out_dir)):
        return resume(s, argv)
    if s.init_from == "scratch":
        return s, None
    try:
        import sample  # which knows the layout of GPT-2's files; training needs no more of it
    except ImportError as error:
        raise UserError(f"init_from={s.init_from} needs sample.py and prepare.py beside train.py ({error})") from None
    checkpoint = sample.read_gpt2(s.init_from)
    s = override(Settings(**checkpoint["config"]), argv)
    check(s)
    sample.fit_gpt2(s, checkpoint)
    return s, checkpoint


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 1 failed, 2 a user's mistake, 128 + n stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__ + "\nSettings, each with its default:\n" + describe(Settings))
        return 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name of a file is worth a UnicodeEncodeError
    s = world = None
    try:
        s, checkpoint = configure(argv)
        world = join_world(s)
        status = train(s, world, checkpoint)
        world.leave()
        return status
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error, s)
        together = world is not None and world.store is not None
        if together:
            world.fail(message)
        elif status and os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine speaks for all
            tell(f"train.py: {message}", "stderr")
        if not status:
            raise  # a bug shows where it is
        if together:
            os._exit(status)  # the other processes are not waited for
        return status


def explain(error, s):
    """What to say of an exception that ended the program, in one line, and the exit status: None for a bug's."""
    text, status = str(error), None
    if isinstance(error, (UserError, RunFailed)):
        status = 2 if isinstance(error, UserError) else 1
    elif isinstance(error, KeyboardInterrupt):
        text, status = "interrupted; the last checkpoint is whole", 130
    elif is_out_of_memory(error):
        text, status = out_of_memory(s) if s else "out of memory", 1
    elif isinstance(error, OSError):
        text, status = f"{error.filename or (s and s.out_dir)}: {error.strerror or error}; what was saved is whole", 1
    elif isinstance(error, RuntimeError) and re.search("gloo|NCCL", text):
        text, status = "another process was lost: it failed, or was killed", 1
    else:
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split()), status


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # sample.py imports train: it gets this one, not a second copy
    sys.exit(main())
