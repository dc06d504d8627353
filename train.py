"""Train a GPT. Model, optimizer and training loop in one file.

    python prepare.py                                   # download tiny Shakespeare into data/char/
    python train.py                                     # defaults on the available hardware
    python train.py config/train_char_cpu.py            # two CPU cores, a minute
    python train.py config/train_char.py --device=cuda  # 10.8M parameters, one GPU
    torchrun --nproc_per_node=4 train.py                # DDP: the same loss curve in less time
    python train.py --init_from=resume                  # resume from out/ckpt.pt

Config files of `key = value` lines and --key=value flags override the settings, from left to right. Writes to out_dir
ckpt.pt (latest), best.pt (lowest validation loss), config.py, log.jsonl and, with matplotlib, loss.png.
Shapes in comments: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""
import ast
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from prepare import LiteralUnpickler, UserError, did_you_mean, download_gpt2

# Settings ----

@dataclass
class GPTConfig:
    """Settings of the model. config/gpt2.py is GPT-2."""
    vocab_size: int = 0  # vocabulary size (V); 0 takes the dataset's
    vocab_multiple: int = 1  # pad the vocabulary to a multiple; 64 is faster on GPUs
    block_size: int = 64  # T, context length in tokens
    n_layer: int = 4  # transformer blocks; 0 makes a bigram model
    n_head: int = 4  # attention heads; must divide n_embd
    n_embd: int = 128  # embedding dimension (C)
    ngram: int = 7  # longest n-gram to count; 1 is off, as with more than 1024 kinds of token
    ngram_entries: int = 0  # different n-grams, set from the training text
    dropout: float = 0.0  # on embeddings and residual branches
    bias: bool = False  # biases in the linear layers and LayerNorms
    position: Literal["rope", "learned", "none"] = "rope"  # position embedding
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"  # before each branch and lm_head
    norm_affine: bool = False  # learned gain of the norms
    qk_norm: bool = True  # RMSNorm of queries and keys
    mlp: bool = True  # an MLP after each attention
    activation: Literal["relu2", "relu", "gelu", "gelu_tanh"] = "relu2"  # nonlinearity of the MLP
    residual: bool = True  # residual connections
    tie_weights: bool = False  # lm_head shares the weight of the token embedding
    zero_init: bool = True  # residual projections and lm_head start at zero
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time


@dataclass
class Settings(GPTConfig):
    """All settings of a run. Names are nanoGPT's where the meaning is the same."""
    # files
    dataset: str = "char"  # folder in data/, or a path
    out_dir: str = "out"  # checkpoints and logs
    init_from: str = "scratch"  # or resume, auto (resume if possible), gpt2, gpt2-medium, ..., a path
    # batch and optimizer
    batch_size: int = 12  # sequences in a forward pass
    gradient_accumulation_steps: int = 1  # times batch_size is the global batch, split across ranks
    optimizer: Literal["muon", "adamw"] = "muon"  # Muon is for matrices in the blocks, AdamW for the rest
    learning_rate: float = 5e-3  # peak, for AdamW and Muon
    max_iters: int = 2000  # optimizer steps
    weight_decay: float = 0.1  # decoupled, on matrices and embeddings
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # of AdamW
    momentum: float = 0.95  # of Muon
    grad_clip: float = 1.0  # maximum gradient norm; 0 is off
    # schedule
    decay_lr: bool = True  # False: constant, without warmup
    schedule: Literal["wsd", "cosine"] = "wsd"  # warmup, stable, linear decay; or cosine
    warmup_iters: int = 10  # steps of linear warmup
    cooldown_frac: float = 1.0  # wsd: fraction of steps in the final linear decay
    lr_decay_iters: int = 0  # step at which the decay ends; 0 is max_iters
    min_lr: float = 0.0  # at the end of the decay
    # evaluation and log
    eval_interval: int = 250  # steps between evaluations and checkpoints
    save_interval_minutes: float = 10.0  # between two saves at most; 0 is off
    eval_iters: int = 0  # batches in an evaluation; 0 is the whole split
    eval_only: bool = False  # evaluate once and exit
    log_interval: int = 10  # steps between log lines
    tensorboard: bool = False  # log to out_dir/tensorboard
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "gpt"  # W&B project
    wandb_run_name: str = ""  # default: out_dir
    # hardware
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is bfloat16 where the hardware supports it
    compile: Literal["auto", "True", "False"] = "auto"  # auto compiles on CUDA
    deterministic: bool = False  # bit-exact on GPUs, but slower
    seed: int = 1337  # random seed


def literal(node):
    """The value of a syntax tree that is a literal or a product of numbers."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return float(literal(node.left)) * float(literal(node.right))
    return ast.literal_eval(node)


def read_config(path):
    """Parse, not execute, `key = value` lines into a list of (key, value, "file:line")."""
    line, found = 1, []
    try:
        for node in ast.parse(Path(path).read_text(encoding="utf-8-sig")).body:
            line = node.lineno
            if ast.dump(node).startswith(("Import", "Expr(value=Constant(")):  # imports and docstrings
                continue
            [target] = node.targets
            if target.id in ("wandb_project", "wandb_run_name") and type(node.value) is not ast.Constant:
                continue  # computed, as in nanoGPT
            found.append((target.id, literal(node.value), f"{path}:{line}"))
        return found
    except OSError as error:
        near = did_you_mean(str(path), [p.as_posix() for p in Path("config").rglob("*.py")])
        raise UserError(f"cannot read config {path} ({error.strerror}){near or '; flags are --key=value'}") from None
    except (SyntaxError, AttributeError, TypeError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", line)
        raise UserError(f"{path}:{line}: expected `key = value`, a literal; config files are not executed") from None


def parse_value(key, kind, value, where):
    """Convert a value from a config or flag to `kind`: int, float, bool, str or a Literal of strings."""
    choices = {"true": True, "false": False} if kind is bool else {word.lower(): word for word in get_args(kind)}
    try:
        if choices:
            return choices[str(value).lower()]
        if kind is int and float(value) % 1:  # 5e3 is an integer too
            raise ValueError
        return str(value) if kind is str else kind(float(value))
    except (KeyError, TypeError, ValueError, OverflowError):
        expected = ", ".join(map(str, choices.values())) or kind.__name__
        raise UserError(f"{where}: {key}={str(value)[:40]}: expected {expected}") from None


def parse_args(settings, argv):
    """Values for a dataclass from config files and flags, and the keys set by flags. Raises UserError."""
    if "--help" in argv or "-h" in argv:
        source = "".join(inspect.getsource(cls) for cls in reversed(settings.__mro__[:-1]))
        print(inspect.getmodule(settings).__doc__, *re.findall(r"^    (\w+: .+ = .+)$", source, re.MULTILINE), sep="\n")
        sys.exit()
    kinds, words, values, flags = {f.name: f.type for f in fields(settings)}, list(argv), {}, set()
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            is_switch = kinds.get(key) is bool or "True" in get_args(kinds.get(key))
            if not words and not is_switch and key in kinds:
                raise UserError(f"command line: --{key} needs a value, as --{key}=VALUE")
            value = words.pop(0) if words and (not is_switch or words[0].lower() in ("true", "false")) else "True"
        found = [(key, value, "command line")] if word.startswith("--") else read_config(word)
        for key, value, where in found:
            if key in kinds:
                values[key] = parse_value(key, kinds[key], value, where)
                flags = flags | {key} if where == "command line" else flags - {key}
            elif key not in ("always_save_checkpoint", "backend"):  # nanoGPT's, without use here
                near = did_you_mean(key, kinds) or "; --help lists all settings"
                raise UserError(f"{where}: unknown setting {key}{near}")
    return values, flags


def check(s):
    """Raise UserError for settings out of range."""
    counts = "block_size n_head n_embd ngram vocab_multiple batch_size gradient_accumulation_steps " \
             "max_iters eval_interval log_interval"
    least_0 = "seed learning_rate grad_clip eval_iters n_layer warmup_iters min_lr weight_decay"
    for names, least, below in ((counts, 1, 2**53), (least_0, 0, 2**53),
                                ("dropout beta1 beta2 momentum", 0, 1), ("cooldown_frac", 0.01, 1.01)):
        for name in names.split():
            if not least <= getattr(s, name, least) < below:
                raise UserError(f"{name}={getattr(s, name)} must be at least {least} and below {below}")
    if s.n_embd % s.n_head or s.position == "rope" and s.n_embd // s.n_head % 2:
        raise UserError(f"n_embd={s.n_embd} must be an even multiple of n_head={s.n_head}, as --n_embd={32 * s.n_head}")


# Model ----

class Linear(nn.Linear):
    """Casts its weight to the input's dtype, at half the cost of autocast in a small model."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019), LayerNorm or identity, with an optional gain."""

    def __init__(self, config):
        super().__init__()
        self.norm, affine = config.norm, config.norm_affine and config.norm != "none"
        has_bias = affine and config.norm == "layernorm" and config.bias
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if affine else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, x):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if self.norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], weight, bias)
        return F.rms_norm(x, x.shape[-1:], weight) if self.norm == "rmsnorm" else x


def rotary(positions, head_size):
    """Cosines and signed sines (T, 1, 1, D) of rotary embedding (Su et al. 2021, arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angle = positions[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None, None], torch.cat([-sin, sin], -1)[:, None, None]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotation, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if x.device.type == "cpu":
            qkv = qkv.float()  # the bfloat16 backward pass is slow on CPUs
        qk, v = qkv[:, :, :2], qkv[:, :, 2]  # q and k together (B, T, 2, H, D): half the kernels
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rotation:
            cos, sin = rotation
            qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # a single query attends to all of the cache
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(x.dtype))


ACTIVATIONS = {
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2
}


class MLP(nn.Module):
    """Two linear layers with a nonlinearity and a hidden size of 4C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block on x (B, T, C). Dropout on attention weights would disable the fused kernels."""

    def __init__(self, config, layer):
        super().__init__()
        self.dropout, self.residual = config.dropout, config.residual
        self.ln_1, self.attn = Norm(config), Attention(config, layer)
        self.ln_2, self.mlp = (Norm(config), MLP(config)) if config.mlp else (None, None)

    def forward(self, x, rotation, cache):
        y = F.dropout(self.attn(self.ln_1(x), rotation, cache), self.dropout, self.training)
        x = x + y if self.residual else y
        if self.mlp is None:
            return x
        y = F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)
        return x + y if self.residual else y


class NGrams(nn.Module):
    """Next-token probabilities by the n-gram counts of the training text, for contexts of 1 to n - 1 tokens.

    Interpolated Kneser-Ney smoothing (Chen and Goodman 1999). In training, counts exclude the token to be predicted
    (leave-one-out), as if the text were unseen. The network learns the residual (Li et al. 2022, arXiv 2210.14431).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.n = config, config.ngram
        self.embed = Linear((self.n - 1) * config.vocab_size, config.n_embd, bias=False)
        self.gate = Linear(config.n_embd, self.n - 1)
        self.register_buffer("grams", torch.zeros(config.ngram_entries, dtype=torch.long))  # sorted: context, token
        self.register_buffer("sums", torch.zeros(config.ngram_entries + 1, dtype=torch.long))  # cumulative counts

    def contexts(self, tokens, T):
        """Hashes (B * T,) of the last 1, 2, ..., n - 1 tokens at each of the last T positions, as a list."""
        tokens, key, keys = F.pad(tokens, (self.n - 2, 0), value=-1), 0, []
        for end in range(tokens.shape[1], tokens.shape[1] - self.n + 1, -1):
            key = (key + tokens[:, end - T:end] + 1) * -7046029254386353131  # Knuth, TAOCP 6.4
            key = key ^ (key >> 32)
            keys.append((key & -1024).flatten())  # the low bits are for the next token
        return keys

    def count(self, tokens):
        """Count the n-grams of the text `tokens` (N,)."""
        found, starts = [], np.arange(len(tokens) - 1)
        for key in reversed(self.contexts(tokens[None, :-1], len(tokens) - 1)):
            grams, first, counts = np.unique((key | tokens[1:]).numpy()[starts], return_index=True, return_counts=True)
            found.append(torch.from_numpy(np.stack([grams, counts])))
            starts = starts[first]  # a shorter n-gram counts once for each different token before it
        grams, counts = torch.cat(found, 1)
        self.grams, order = grams.sort()
        self.sums = F.pad(counts[order].cumsum(0), (1, 0))
        self.config.ngram_entries = len(grams)

    @torch.no_grad()
    def forward(self, tokens, T, left_out=None):
        """Probabilities (B, T, n - 1, V) after the last T of tokens, by counts without the ids left_out (B, T)."""
        B, V, device, found = len(tokens), self.config.vocab_size, tokens.device, []
        removed = torch.ones(B * T, dtype=torch.long, device=device)
        for key in reversed(self.contexts(tokens, T)):
            first, end = torch.searchsorted(self.grams, key), torch.searchsorted(self.grams, key + 1024)
            total, distinct = self.sums[end] - self.sums[first], end - first
            row = torch.arange(B * T, device=device).repeat_interleave(distinct)
            entry = torch.arange(len(row), device=device) + (end - distinct.cumsum(0))[row]
            token, count = self.grams[entry] & 1023, self.sums[entry + 1] - self.sums[entry]
            if left_out is not None:
                own = (token == left_out.flatten()[row]).nonzero()[:, 0]
                hit = row[own]
                count[own] -= removed[hit]
                total[hit] -= removed[hit]
                removed[hit] *= count[own] == 0  # then one token less precedes the shorter n-gram
                distinct[hit] -= removed[hit]
            total = total.clamp(min=1)
            backoff = torch.where(distinct > 0, 0.75 * distinct / total, 1.0)[:, None]
            found.append((row * V + token, (count - 0.75).clamp(min=0) / total[row], backoff))
        p, orders = torch.full((B * T, V), 1 / V, device=device), []
        for index, share, backoff in reversed(found):
            p = p * backoff
            p.view(-1)[index] += share
            orders.append(p)
        return torch.stack(orders, 1).view(B, T, -1, V)


class GPT(nn.Module):
    """A decoder-only transformer language model: GPT(GPTConfig(vocab_size=65))."""

    def __init__(self, config):
        super().__init__()
        assert config.vocab_size > 0, "GPTConfig.vocab_size must be set"
        self.config = config
        self.compute_dtype = torch.float32  # of activations; parameters stay float32
        rows = -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ngrams = NGrams(config) if config.ngram > 1 else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config)
        self.lm_head = Linear(config.n_embd, rows, bias=False)
        self.init_weights()
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def init_weights(self):
        """Normal with standard deviation 0.02, less or 0 for projections into the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith("c_proj"):  # GPT-2: variance does not grow with depth
                    std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                elif name == "ngrams.gate" or name == "lm_head" and self.config.zero_init:
                    std = 0.0
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.ngrams is not None:
            self.ngrams.gate.bias.data[-1] = 1.0  # the longest n-grams

    def forward(self, idx, targets=None, cache=None, leave_one_out=False):
        """Logits (B, T, V) of ids idx (B, T), and the mean cross-entropy in nats of targets (B, T) that are not -1.

        With a cache (sample.py), idx continues its tokens and only the last logits (B, 1, V) are computed.
        Under torch.compile, the logits are None if there are targets.
        """
        tokens = idx if cache is None else cache.append(idx)  # with n-gram context
        T = (idx if targets is None else targets).shape[1]
        p = None if self.ngrams is None else self.ngrams(tokens, T, targets if leave_one_out else None)
        idx = idx[:, -T:]
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        if p is not None:
            x = x + self.ngrams.embed(p.flatten(2))
        x = F.dropout(x.to(self.compute_dtype), self.config.dropout, self.training)
        cos_sin = rotary(positions, self.config.n_embd // self.config.n_head) if self.config.position == "rope" else ()
        rotation = [t.to(x.dtype) for t in cos_sin]
        for block in self.h:
            if self.config.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rotation, cache, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        x = self.ln_f(x if cache is None else x[:, -1:])
        logits = self.lm_head(x).float()[..., :self.config.vocab_size]  # without the padding
        if p is not None:
            logits = logits + (self.ngrams.gate(x)[..., None] * p[:, -x.shape[1]:].log()).sum(2)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if targets is not None and torch.compiler.is_compiling():
            logits = None  # else the graph keeps them, and a gradient of zeros
        return logits, loss


# Optimizer ----

def newton_schulz(G, dtype):
    """Move the singular values of matrices G (N, rows, columns), rows <= columns, to about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    X = G.to(dtype)
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def orthogonalize(updates, dtype):
    """Orthogonalize a list of matrices, equal in shape or transposed, with the work split across ranks."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    chunks = 3 if updates[0].shape[0] == 3 * updates[0].shape[1] else 1  # c_attn: queries, keys and values
    stacks = [u.view(chunks, -1, u.shape[1]) for u in updates]
    stacks = [s.mT if s.shape[1] > s.shape[2] else s for s in stacks]
    per_rank = -(-len(stacks) // size)
    local = stacks[rank * per_rank:(rank + 1) * per_rank]
    local += [torch.zeros_like(stacks[0])] * (per_rank - len(local))  # all_gather needs equal sizes
    done = newton_schulz(torch.cat(local), dtype)
    if size > 1:
        parts = [torch.empty_like(done) for _ in range(size)]
        dist.all_gather(parts, done.contiguous())
        done = torch.cat(parts)
    done = done.to(updates[0].dtype)
    return [(d if u.shape[0] // chunks == d.shape[1] else d.mT).reshape(u.shape)
            for u, d in zip(updates, done.split(chunks), strict=False)]  # without the zeros


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized, scaled to the RMS of an AdamW update.

    The scale 0.2 * sqrt(max(rows, columns)) is from Liu et al. 2025, arXiv 2502.16982. torch.optim.Muon is slow on
    CPUs and does not split queries, keys and values.
    """

    def __init__(self, params, lr=1e-2, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters and overwrite their gradients."""
        for group in self.param_groups:
            params, same_shape = [p for p in group["params"] if p.grad is not None], {}
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                same_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            grads, means = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, means, group["momentum"])
            for (shorter, longer), params in same_shape.items():
                scale = 0.2 * math.sqrt(shorter if longer == 3 * shorter else longer)  # of c_attn's three matrices
                updates = orthogonalize([p.grad for p in params], self.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def configure_optimizers(model, s):
    """AdamW and, for the matrices in the blocks, Muon, as a list."""
    matrices = [p for p in model.h.parameters() if p.ndim == 2 and s.optimizer == "muon"]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [dict(params=[p for p in rest if p.ndim >= 2], weight_decay=s.weight_decay),
              dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)]
    if matrices:
        dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, s.learning_rate, s.momentum, s.weight_decay, dtype))
    return optimizers


# Data ----

def read_nanogpt_meta(folder):
    """The contents of meta.json for nanoGPT's uint16 bins: GPT-2's tokens, or the characters in meta.pkl."""
    tokenizer, vocab_size = dict(kind="tiktoken", encoding="gpt2"), 50257
    if (folder / "meta.pkl").exists():
        with open(folder / "meta.pkl", "rb") as file:
            itos = LiteralUnpickler(file).load()["itos"]
        tokenizer, vocab_size = dict(kind="char", chars="".join(itos[i] for i in range(len(itos)))), len(itos)
    tokens = {split: (folder / f"{split}.bin").stat().st_size // 2 for split in ("train", "val")}
    return dict(corpus=folder.name, tokenizer=tokenizer, vocab_size=vocab_size, dtype="uint16", tokens=tokens,
                bytes=dict(val=math.nan))


def read_meta(dataset):
    """The folder of a dataset and its meta.json, a dict. Raises UserError."""
    folder = Path(dataset) if "/" in dataset or os.sep in dataset else Path("data", dataset)
    try:
        if not (folder / "meta.json").exists() and (folder / "val.bin").exists():
            return folder, read_nanogpt_meta(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["corpus"], meta["tokenizer"], meta["vocab_size"], meta["bytes"]["val"], meta["tokens"]["val"]
        ("uint8", "uint16", "uint32").index(meta["dtype"])  # or ValueError
        return folder, meta
    except OSError:
        near = did_you_mean(folder.name, [path.parent.name for path in folder.parent.glob("*/meta.json")])
        hint = dict(char="", gpt2=" --tokenizer=gpt2", fineweb=" fineweb").get(dataset, f" TEXT --name={folder.name}")
        raise UserError(f"no dataset in {folder}{near}; to create it: python prepare.py{hint}") from None
    except Exception:  # a bad pickle raises many
        raise UserError(f"meta.json or meta.pkl in {folder} is damaged: run prepare.py again") from None


class TokenDataset:
    """Token ids of one split, "train" or "val": a memory-mapped file, or shards read as one."""

    def __init__(self, folder, split, meta):
        self.vocab_size, self.dtype, self.files = meta["vocab_size"], np.dtype(meta["dtype"]), []
        single = dict(name=f"{split}.bin", offset=0, tokens=meta["tokens"][split])
        shards = meta["files"][split] if "files" in meta else [single]
        self.offsets, self.counts = [shard["offset"] for shard in shards], [shard["tokens"] for shard in shards]
        self.ends, self.size = np.cumsum(self.counts), sum(self.counts)
        for shard in shards:
            path = folder / Path(shard["name"]).name
            size = shard["offset"] + shard["tokens"] * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path} is missing or not {size:,} bytes long: run prepare.py again")
            self.files.append(open(path, "rb"))  # a running job keeps it

    def read(self, starts, length):
        """Token ids (len(starts), length), int64; the first and last token are repeated past the ends."""
        index = np.clip(starts[:, None] + np.arange(length), 0, self.size - 1)
        shard = np.searchsorted(self.ends, index, side="right")
        tokens = np.empty(index.shape, np.int64)
        for i in np.unique(shard):
            ids = np.memmap(self.files[i], self.dtype, "r", self.offsets[i], self.counts[i])  # frees memory
            tokens[shard == i] = ids[index[shard == i] - (self.ends[i] - len(ids))]
            if tokens[shard == i].max() >= self.vocab_size:
                raise UserError(f"{self.files[i].name} has tokens beyond the vocabulary: rerun prepare.py")
        return torch.from_numpy(tokens)


@lru_cache(maxsize=2)
def permutation(seed, number, n):
    """A random permutation of range(n), at most 8 MB."""
    return np.random.default_rng([seed, number]).permutation(n)


def window_starts(seed, first, count, n_tokens, block_size):
    """Start positions (count,) of the training sequences from number `first`. An epoch takes each window once.

    A long text is shuffled in parts of at most 2**20 windows, each spread over the whole text.
    """
    windows = max(1, n_tokens // block_size - 1)  # one fewer than fit: they begin at a random offset
    parts = -(-windows // 2**20)
    number, index = np.divmod(np.arange(first, first + count), windows // parts)
    starts = np.empty(count, dtype=np.int64)
    for n in np.unique(number):
        epoch, part = divmod(n, parts)
        offset = np.random.default_rng([seed, epoch]).integers(n_tokens - windows * block_size)
        window = part + parts * permutation(seed, n, windows // parts)[index[number == n]]
        starts[number == n] = offset + block_size * window
    return starts


def get_batch(dataset, s, first, count, device):
    """Inputs and targets, each (count, T), of the training sequences starting at number `first`."""
    context = max(0, s.ngram - 2)
    starts = window_starts(s.seed, first, count, dataset.size, s.block_size)
    tokens = dataset.read(starts - context, context + s.block_size + 1)
    if device.type == "cuda":
        tokens = tokens.pin_memory()  # the copy overlaps the current step
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1 + context:]


# Schedule and evaluation ----

def get_lr(step, s):
    """Learning rate of step `step`, from 0: warmup, then constant and linear decay, or cosine decay."""
    end = s.lr_decay_iters or s.max_iters
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= end:
        return s.min_lr
    if s.schedule == "cosine":
        coeff = 0.5 * (1 + math.cos(math.pi * (step - s.warmup_iters) / (end - s.warmup_iters)))
    else:
        coeff = min(1.0, (end - step) / (s.cooldown_frac * (end - s.warmup_iters)))
    return s.min_lr + coeff * (s.learning_rate - s.min_lr)


@torch.no_grad()
def evaluate(model, dataset, s, world, windows=0):
    """Mean loss of a split: all, its first eval_iters batches or `windows` of the training split."""
    T, context, options = s.block_size, max(0, s.ngram - 2), dict(leave_one_out=True) if windows else {}
    available = -(-(dataset.size - 1) // T)  # the last may be short
    stride = max(1, available // windows) if windows else 1
    windows = min(available, windows or s.eval_iters * s.batch_size or available)
    local = world.local_range(0, windows)
    starts = range(local.start, local.stop, s.batch_size)
    losses, counts = torch.zeros(len(starts), device=world.device), torch.zeros(len(starts), dtype=torch.float64)
    model.eval()
    for i, first in enumerate(starts):
        rows = np.arange(first, first + s.batch_size)  # a full batch: compiled once
        tokens = dataset.read(rows * stride * T - context, context + T + 1)
        x, y = tokens[:, :-1], tokens[:, 1 + context:].clone()
        past_end = rows[:, None] * stride * T + np.arange(1, T + 1) >= dataset.size
        y[torch.from_numpy(past_end | (rows >= local.stop)[:, None])] = -1
        losses[i] = model(x.to(world.device), y.to(world.device), **options)[1]  # no .item(), which waits
        counts[i] = (y >= 0).sum()
    model.train()
    total, count = world.all_reduce(torch.stack([losses.cpu().double() @ counts, counts.sum()])).tolist()
    return total / count


# Processes and hardware ----

@dataclass
class World:
    """This process's rank, the number of ranks and the device."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def local_range(self, first, count):
        """This rank's part of `count` items from `first`."""
        return range(first + count * self.rank // self.size, first + count * (self.rank + 1) // self.size)

    def all_reduce(self, x):
        """Sum tensor x over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def print0(text, file=None):
    """Print on rank 0. A full disk does not end the training."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(text, file=file, flush=True)


def get_device(name, local_rank=0, local_size=1):
    """The torch.device for the setting `device`. Raises UserError."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "mps" if torch.backends.mps.is_available() and local_size == 1 else "cpu"
    if name == "cuda" and local_size > gpus:
        raise UserError(f"device=cuda: {local_size} processes on {gpus} GPUs: start fewer, or use --device=cpu")
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not available ({str(error).splitlines()[0]}): try --device=auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "Please use the new API")  # with which torch 2.9 and 2.10 cannot compile
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cuda.enable_cudnn_sdp((torch.backends.cudnn.version() or 0) > 91500)  # NaN in older ones
    return device


def init_distributed(device):
    """The World of this process, with a process group if torchrun started it."""
    if "RANK" not in os.environ:
        return World(device=device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps the store, with old addresses, across restarts
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    import torch.distributed.nn  # noqa: F401  imported later, it makes the process abort at exit
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device)


def get_compute_dtype(s, device):
    """The torch dtype of matrix products."""
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


# Checkpoints and pretrained weights ----

def atomic_write(path, write):
    """Write a temporary file by write(file) and rename it: path is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(out, checkpoint, is_best):
    """Write config.py and ckpt.pt, keep ckpt-previous.pt and link best.pt if is_best. Raises OSError."""
    new, latest, link = out / "ckpt-new.pt", out / "ckpt.pt", out / "link.tmp"
    links = [("best.pt", new)] * is_best + [("ckpt-previous.pt", latest)] * latest.exists()
    config = "".join(f"{key} = {value!r}\n" for key, value in checkpoint["config"].items())
    try:
        atomic_write(out / "config.py", lambda file: file.write(config.encode()))
        atomic_write(new, lambda file: torch.save(checkpoint, file))
        for name, source in links:
            link.unlink(missing_ok=True)
            try:
                os.link(source, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, link)
            os.replace(link, out / name)
        os.replace(new, latest)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot save a checkpoint in {out} ({error}); the previous one is intact") from None
    finally:
        for path in (new, link):
            path.unlink(missing_ok=True)


def load_checkpoint(path):
    """Load a checkpoint, a dict, to the CPU. Executes no code from the file. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch checks no CRCs, and reads no weights where an entry is marked as a folder
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = convert_nanogpt(checkpoint) if "model_args" in checkpoint else checkpoint
        version = checkpoint.get("format")
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: run `python train.py` first, or set --out_dir") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if version != 3:
        raise UserError(f"{path} has checkpoint format {version}, expected 3: train again")
    return checkpoint


def model_from_checkpoint(checkpoint, path="checkpoint"):
    """The GPT in a checkpoint, float32, on the CPU, in evaluation mode. Raises UserError."""
    try:
        config = GPTConfig(**{f.name: checkpoint["config"].get(f.name, f.default) for f in fields(GPTConfig)})
        with torch.device("meta"):  # allocates nothing
            model = GPT(config)
        model.load_state_dict(checkpoint["model"], assign=True)
    except Exception as error:
        raise UserError(f"{path}: weights and settings do not match: {str(error)[:150]}") from None
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    return model.float().eval()


GPT2 = dict(position="learned", norm="layernorm", norm_affine=True, qk_norm=False, ngram=1, zero_init=False)


def convert_nanogpt(source):
    """A checkpoint of nanoGPT without optimizer state; the tokenizer is None if it is in a meta.pkl."""
    args, is_gpt2 = source["model_args"], source["model_args"]["vocab_size"] in (50257, 50304)  # 50304 rows are padded
    config = {key: args[key] for key in ("n_layer", "n_head", "n_embd", "block_size")} | GPT2 | dict(
        vocab_size=50257 if is_gpt2 else args["vocab_size"], vocab_multiple=64 if args["vocab_size"] == 50304 else 1,
        activation="gelu", tie_weights=True, bias=args.get("bias", True), dropout=args.get("dropout", 0.0),
        dataset=source.get("config", {}).get("dataset", ""))
    weights = {re.sub(r"^(_orig_mod\.)?(transformer\.)?", "", key): tensor.float()
               for key, tensor in source["model"].items() if not key.endswith(".attn.bias")}  # a mask, in old files
    tokenizer = dict(kind="tiktoken", encoding="gpt2") if is_gpt2 else None
    return dict(format=3, config=config, tokenizer=tokenizer, model=weights)


def load_gpt2(name):
    """GPT-2 as a checkpoint, from the hub or local files in Hugging Face's layout."""
    path = Path(name) if os.path.exists(name) else Path("data/hub", name, "model.safetensors")
    while os.environ.get("LOCAL_RANK", "0") != "0" and not path.exists():
        time.sleep(0.2)  # local rank 0 downloads it; torchrun ends this if it fails
    if not path.exists():
        path = download_gpt2(name)
    if path.is_dir():
        path /= "model.safetensors" if (path / "model.safetensors").exists() else "pytorch_model.bin"
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
    try:
        source = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        config = {key: source[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")} | GPT2 | dict(
            block_size=source["n_positions"], tie_weights=source.get("tie_word_embeddings", True), bias=True,
            activation=dict(gelu="gelu", gelu_new="gelu_tanh")[source.get("activation_function", "gelu_new")])
        is_pickle, weights = path.suffix != ".safetensors", {}
        tensors = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
        for key, tensor in tensors.items():
            if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks in old files
                transposed = re.search(r"\.c_\w+\.weight$", key)  # Conv1D stores (in, out)
                weights[key.removeprefix("transformer.")] = (tensor.T if transposed else tensor).float().contiguous()
        if config["tie_weights"]:
            weights["lm_head.weight"] = weights["wte.weight"]
    except Exception as error:
        raise UserError(f"init_from={name}: {path} is not GPT-2 in Hugging Face's layout ({error!r:.100})") from None
    tokenizer = source.get("tokenizer_spec", dict(kind="tiktoken", encoding="gpt2"))  # of sample.py --export
    return dict(config=config, tokenizer=tokenizer, model=weights)


# Output directory and log ----

def open_out_dir(s, new_run):
    """Create and lock out_dir and move an earlier run to previous-N. Returns the lock file."""
    out = Path(s.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
    except OSError as error:
        raise UserError(f"cannot write to out_dir={out} ({error.strerror}): set another --out_dir") from None
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir={out} is in use by another run: set another --out_dir") from None
    except (ImportError, OSError):
        pass  # Windows, and file systems without locks
    names = ("ckpt.pt", "ckpt-previous.pt", "best.pt", "log.jsonl", "loss.png", "tensorboard", "config.py")
    files = [out / name for name in names if (out / name).exists()]
    if new_run and files:
        target = next(path for n in range(1, 10**6) if not (path := out / f"previous-{n}").exists())
        target.mkdir()
        for path in files:
            os.replace(path, target / path.name)
        print0(f"moved the previous run to {target}")
    return lock


def read_log(folder):
    """The records of a log.jsonl, without lines cut by a full disk."""
    for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)


class Log:
    """Prints the table and writes log.jsonl and the trackers."""

    def __init__(self, s, progress):
        self.max_iters, self.start = s.max_iters, time.monotonic() - progress.elapsed
        self.path, self.trackers = Path(s.out_dir, "log.jsonl"), []
        if self.path.exists():  # a resumed run repeats what came after the checkpoint
            kept = "".join(json.dumps(r) + "\n" for r in read_log(s.out_dir) if r["step"] <= progress.step)
            atomic_write(self.path, lambda file: file.write(kept.encode()))
        if s.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(Path(s.out_dir, "tensorboard"), purge_step=progress.step + 1)
            self.trackers.append(lambda step, values: [writer.add_scalar(*value, step) for value in values.items()])
            self.trackers.append(lambda step, values: writer.flush())
        if s.wandb_log:
            import wandb
            run = wandb.init(project=s.wandb_project, name=s.wandb_run_name or s.out_dir, config=asdict(s),
                             dir=s.out_dir, id=progress.wandb_id, resume="allow")
            progress.wandb_id = run.id
            self.trackers.append(lambda step, values: run.log(values, step=step))
        print0("    step    loss   train     val       lr   norm   tokens/s  elapsed     left")

    def write(self, step, **values):
        """Log the values of a step; step 0 has an evaluation only."""
        elapsed = time.monotonic() - self.start
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
        record = dict(step=step, **finite, elapsed=round(elapsed, 3))  # JSON has no infinity
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print0(f"note: {error}", sys.stderr)
        for track in self.trackers:
            track(step, {key: value for key, value in finite.items() if value is not None})
        evaluated = "" if values["val_loss"] is None else f"{values['train_loss']:8.4f}{values['val_loss']:8.4f}"
        if step == 0:
            return print0(f"{0:8d}{'':8}{evaluated}")
        left = timedelta(seconds=round(elapsed / step * (self.max_iters - step)))
        elapsed = timedelta(seconds=round(elapsed))
        print0(f"{step:8d}{values['loss']:8.4f}{evaluated:16}{values['lr']:9.1e}{values['grad_norm']:7.3f}"
               f"{values['tokens_per_second']:11,d}{elapsed!s:>9}{left!s:>9}")


def plot_losses(folders):
    """Plot runs into loss.png of a single folder, or compare.png. Returns the path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, folder in enumerate(folders):
        for key, name, style, alpha in (("loss", "training batches", "-", 0.4), ("train_loss", "training", "x--", 1),
                                        ("val_loss", "validation", ".-", 1)):
            records = [r for r in read_log(folder) if r.get(key) is not None]
            axes.plot([r.get("tokens", 0) for r in records], [r[key] for r in records], style, color=f"C{i}",
                      alpha=alpha, label=f"{folder}: {name}")
    axes.set(xlabel="training tokens", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folders[0], "loss.png") if len(folders) == 1 else Path("compare.png")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


# Training loop ----

def forward_backward(model, scaler, dataset, s, world, sequences):
    """Accumulate gradients over this rank's part of the global batch. Returns its part of the loss."""
    global_batch = s.batch_size * s.gradient_accumulation_steps
    local = world.local_range(sequences, global_batch)
    starts = range(0, max(1, len(local)), s.batch_size)
    total = torch.zeros((), device=world.device)
    for i in starts:
        rows = local[i:i + s.batch_size]  # may be empty: then one sequence with weight 0
        x, y = get_batch(dataset, s, rows.start, max(1, len(rows)), world.device)
        with nullcontext() if world.size == 1 or i == starts[-1] else model.no_sync():  # all-reduce once
            loss = model(x, y, leave_one_out=True)[1] * (len(rows) / global_batch)
            scaler.scale(loss * world.size).backward()  # DDP divides by world.size
        total += loss.detach()
    return total


def optimizer_step(model, optimizers, scaler, lr, grad_clip):
    """Clip the gradients and update the parameters. Returns the gradient norm before clipping."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if not scaler.is_enabled() or grad_norm.isfinite():  # else float16 has overflowed
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return grad_norm


def init_run(s, world, dataset, checkpoint):
    """Model, optimizers, gradient scaler and progress, new or from the checkpoint."""
    torch.manual_seed(s.seed)
    model = GPT(s)
    progress = SimpleNamespace(step=0, sequences=0, best_val_loss=math.inf, best_step=0, elapsed=0.0, wandb_id=None)
    model.compute_dtype = get_compute_dtype(s, world.device)
    if checkpoint:
        model.load_state_dict(checkpoint.pop("model"))  # pop frees its memory
    if model.ngrams is not None and "optimizers" not in checkpoint and not (checkpoint and s.eval_only):
        model.ngrams.count(dataset.read(np.zeros(1, np.int64), dataset.size)[0])
    model.to(world.device)
    optimizers = configure_optimizers(model, s)
    scaler = torch.amp.GradScaler(world.device.type, enabled=model.compute_dtype == torch.float16)
    if "optimizers" in checkpoint:
        for optimizer, saved in zip(optimizers, checkpoint.pop("optimizers"), strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, state in saved.items():
                if any(key != "step" and value.shape != params[i].shape for key, value in state.items()):
                    raise UserError("the optimizer state in the checkpoint does not fit the model")
                saved[i] = {key: value.contiguous() for key, value in state.items()}
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved))  # s has the hyperparameters
        progress = SimpleNamespace(**checkpoint["progress"])
        if checkpoint["scaler"]:  # empty if the run was not in float16
            scaler.load_state_dict(checkpoint["scaler"])
    if world.all_reduce(torch.tensor(progress.step)) != progress.step * world.size:
        raise UserError(f"ranks read different checkpoints: all nodes must share out_dir={s.out_dir}")
    return model, optimizers, scaler, progress


def train(s, world, datasets, meta, checkpoint):
    """Train until max_iters or a signal. Returns the exit status."""
    raw_model, optimizers, scaler, progress = init_run(s, world, datasets["train"], checkpoint)
    print0(f"{meta['corpus']}: {datasets['train'].size:,} training tokens {meta.get('note', '')}")
    print0(f"{sum(p.numel() for p in raw_model.parameters()):,} parameters, {world.size} x {world.device}, "
           f"{raw_model.compute_dtype}")
    compiled = raw_model
    if s.compile == "True" or s.compile == "auto" and world.device.type == "cuda":
        try:
            if raw_model.ngrams is not None:
                raw_model.ngrams.forward = torch.compiler.disable(raw_model.ngrams.forward)  # its shapes vary
            compiled = torch.compile(raw_model, dynamic=False)
            compiled(*get_batch(datasets["train"], s, 0, s.batch_size, world.device))[1].backward()
        except Exception as error:  # e.g. no C++ compiler
            print0(f"note: torch.compile failed, training without it ({str(error).strip()[:90]!r})", sys.stderr)
            compiled = raw_model
        raw_model.zero_grad()
    bits_per_byte = meta["tokens"]["val"] / meta["bytes"]["val"] / math.log(2)  # per nat of loss

    def evaluate_both():
        loss = evaluate(compiled, datasets["val"], s, world)
        tenth = max(1, (s.eval_iters * s.batch_size or datasets["val"].size // s.block_size) // 10)
        return dict(train_loss=evaluate(compiled, datasets["train"], s, world, tenth), val_loss=loss,
                    bits_per_byte=loss * bits_per_byte)

    if s.eval_only:
        print0("training loss {train_loss:.4f}, validation loss {val_loss:.4f}".format(**evaluate_both()))
        return 0

    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.9 has no other name for it
    ddp = dict(gradient_as_bucket_view=True, broadcast_buffers=False)
    model = compiled if world.size == 1 else nn.parallel.DistributedDataParallel(compiled, **ddp)
    out, global_batch = Path(s.out_dir), s.batch_size * s.gradient_accumulation_steps
    log = Log(s, progress) if world.rank == 0 else None
    if checkpoint and progress.step == 0:  # pretrained weights
        evaluation = evaluate_both()
        if log:
            log.write(0, **evaluation)
    stopping, received = False, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    recent = []  # loss and gradient norm since the last log line, on the device
    logged = saved = plotted = time.monotonic()
    while progress.step < s.max_iters and not stopping:
        # dropout depends on (seed, step, rank): no generator state to save
        torch.manual_seed(((s.seed * 1_000_003 + progress.step) * 65_537 + world.rank) % 2**63)
        lr = get_lr(progress.step, s)
        loss = forward_backward(model, scaler, datasets["train"], s, world, progress.sequences)
        grad_norm = optimizer_step(raw_model, optimizers, scaler, lr, s.grad_clip)
        recent.append(torch.stack([loss, grad_norm]))
        progress.step += 1
        progress.sequences += global_batch

        done = progress.step >= s.max_iters
        evaluating = done or progress.step % s.eval_interval == 0
        due = evaluating or 0 < 60 * s.save_interval_minutes < time.monotonic() - saved
        flags = world.all_reduce(torch.tensor([bool(received), due], dtype=torch.float32)).tolist()
        stopping, saving = flags[0] > 0, sum(flags) > 0
        if not saving and progress.step % s.log_interval:
            continue  # without waiting

        losses, grad_norms = torch.stack(recent).T.contiguous()
        losses, grad_norms = world.all_reduce(losses).tolist(), grad_norms.tolist()
        speed = len(recent) * global_batch * s.block_size / (time.monotonic() - logged)
        evaluation = evaluate_both() if evaluating else dict.fromkeys(("train_loss", "val_loss", "bits_per_byte"))
        val_loss = evaluation["val_loss"]
        if not np.isfinite(losses + [val_loss or 0] + grad_norms * (not scaler.is_enabled())).all():
            raise FloatingPointError(f"the loss is not finite at step {progress.step}: lower learning_rate or use "
                                     "--dtype=float32")
        if log:
            log.write(progress.step, **evaluation, loss=sum(losses) / len(losses), lr=lr, grad_norm=grad_norms[-1],
                      tokens=progress.sequences * s.block_size, tokens_per_second=round(speed))
        if log and saving:
            is_best = evaluating and val_loss < progress.best_val_loss
            best = dict(best_val_loss=val_loss, best_step=progress.step) if is_best else {}
            updated = vars(progress) | best | dict(elapsed=time.monotonic() - log.start)
            state = dict(
                format=3, model=raw_model.state_dict(), optimizers=[o.state_dict()["state"] for o in optimizers],
                scaler=scaler.state_dict(), progress=updated, config=asdict(s), tokenizer=meta["tokenizer"],
                corpus_sha256=meta.get("corpus_sha256"))
            try:
                save_checkpoint(out, state, is_best)
                progress = SimpleNamespace(**updated)
                if importlib.util.find_spec("matplotlib") and (done or stopping or time.monotonic() > plotted + 10):
                    plot_losses([out])
                    plotted = time.monotonic()
            except OSError as error:  # a full disk
                if stopping or done:
                    raise
                print0(f"note: {error}", sys.stderr)
        saved = time.monotonic() if saving else saved
        recent.clear()
        logged = time.monotonic()

    if stopping:
        print0(f"stopped at step {progress.step}; resume: python train.py --init_from=resume --out_dir={out}")
        return 128 + (received or [signal.SIGTERM])[0]  # none if another rank received it
    print0(f"best validation loss {progress.best_val_loss:.4f} at step {progress.best_step}: {out / 'best.pt'}")
    return 0


# Command line ----

def configure(argv):
    """The Settings and the checkpoint to start from, {} for none."""
    values, flags = parse_args(Settings, argv)
    values.pop("ngram_entries", None)  # of out/config.py
    s = Settings(**values)
    latest, previous = Path(s.out_dir, "ckpt.pt"), Path(s.out_dir, "ckpt-previous.pt")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, after a failure
    resumable = latest.exists() or previous.exists()
    resuming = s.init_from == "resume" or resumable and (s.init_from == "auto" or restarted)
    if s.init_from in ("scratch", "auto") and not resuming:
        return s, {}
    try:
        path = latest if resuming else Path(s.init_from)
        checkpoint = load_checkpoint(path) if path.suffix == ".pt" else load_gpt2(s.init_from)
    except UserError as error:
        if not (resuming and previous.exists()):
            raise
        checkpoint = load_checkpoint(previous)
        print0(f"note: {error}; resuming from {previous}", sys.stderr)
    saved = {f.name: checkpoint["config"].get(f.name, f.default) for f in fields(Settings if resuming else GPTConfig)}
    fixed = saved.keys() & {*vars(GPTConfig()), "optimizer"} - {"dropout", "gradient_checkpointing"}
    if resuming and "progress" not in checkpoint:
        raise UserError(f"{latest} is from nanoGPT: use --init_from={latest} and another --out_dir")
    if resuming:
        values["init_from"] = saved["init_from"]
    else:
        model_from_checkpoint(checkpoint, path)  # raises UserError if it cannot be loaded
        checkpoint = {key: checkpoint[key] for key in ("config", "tokenizer", "model")}
        if values.get("block_size", math.inf) < saved["block_size"]:
            fixed.remove("block_size")
            if "wpe.weight" in checkpoint["model"]:
                checkpoint["model"]["wpe.weight"] = checkpoint["model"]["wpe.weight"][:s.block_size]
    if values["init_from"] not in ("scratch", "auto"):  # model settings in configs are for a new model
        values = {key: value for key, value in values.items() if key in flags or key not in fixed}
    s = Settings(**saved | dict(out_dir=s.out_dir) | values)
    for name in sorted(fixed):
        if getattr(s, name) != saved[name]:
            raise UserError(f"{name}={getattr(s, name)}, but the checkpoint has {name}={saved[name]}: remove it")
    return s, checkpoint


def run(argv):
    """Open the dataset and out_dir and train. Returns the exit status."""
    s, checkpoint = configure(argv)
    check(s)
    folder, meta = read_meta(s.dataset)
    datasets = {split: TokenDataset(folder, split, meta) for split in ("train", "val")}
    s.vocab_size = s.vocab_size if checkpoint else max(s.vocab_size, meta["vocab_size"])
    if not checkpoint and (s.vocab_size > 1024 or datasets["train"].size > 2**24):
        s.ngram = 1  # too much to count
    if min(datasets["train"].size, datasets["val"].size) <= s.block_size:
        raise UserError(f"block_size={s.block_size} is not below the number of tokens in {folder}: prepare more text")
    if checkpoint and checkpoint["tokenizer"] not in (meta["tokenizer"], None) or s.vocab_size < meta["vocab_size"]:
        raise UserError(f"dataset={s.dataset} has another tokenizer than the checkpoint")
    if checkpoint.get("corpus_sha256", meta.get("corpus_sha256")) != meta.get("corpus_sha256"):
        print0(f"note: dataset={s.dataset} is not the text of the checkpoint", sys.stderr)
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    for package in ["tensorboard"] * s.tensorboard + ["wandb"] * s.wandb_log:
        importlib.import_module(package)  # or ModuleNotFoundError, before an earlier run is moved
    device = get_device(s.device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    writes = os.environ.get("RANK", "0") == "0" and not s.eval_only
    with open_out_dir(s, new_run="optimizers" not in checkpoint) if writes else nullcontext():
        world = init_distributed(device)
        status = train(s, world, datasets, meta, checkpoint)
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be saving
        dist.destroy_process_group()
    return status


def main(argv=None):
    """Returns the exit status: 0 done, 1 failed, 2 a user's mistake, 128 + n stopped by signal n."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message, status = error, 2
    except ModuleNotFoundError as error:
        message, status = f"{error.name} is not installed: pip install {error.name}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except torch.OutOfMemoryError:
        message, status = "out of memory: halve batch_size and double gradient_accumulation_steps", 1
    except (FloatingPointError, OSError) as error:
        message, status = error, 1
    if os.environ.get("LOCAL_RANK", "0") == "0" or dist.is_initialized():
        print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        time.sleep(3)  # local rank 0 prints the error, before torchrun ends it because of this exit
    return status


if __name__ == "__main__":
    sys.exit(main())
