"""Generate text from a checkpoint, score a text, plot losses and attention, or export the model to transformers.

    python sample.py --start="ROMEO:"                        # continue a prompt
    python sample.py --start=FILE:prompts.txt --per_line     # each line of the file is a prompt; - is standard input
    python sample.py --num_samples=10 --temperature=0.9      # ten samples in one batch
    python sample.py --init_from=gpt2 --start="The sea"      # pretrained GPT-2, or a local path
    python sample.py --score=book.txt                        # loss and bits per byte of a text
    python sample.py --follow                                # a short sample of each new checkpoint of a run
    python sample.py --plot=out-a,out-b                      # losses of runs, as compare.png
    python sample.py --show=attention --start="To be"        # attention weights of every head, as out/attention.png
    python sample.py --show=probabilities --start="To be"    # next-token probabilities, as out/probabilities.png
    python sample.py --export=FOLDER                         # a folder that transformers loads

The model is out/best.pt or, if there is none, out/ckpt.pt.
Shapes in comments: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""
import codecs
import inspect
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import train
from prepare import UserError, documents_in, read_corpus, tokenizer_from_spec
from train import parse_args

# Settings -----------------------------------------------------

@dataclass
class Settings:
    """All settings of sample.py, overridden by config files and flags as in train.py."""
    out_dir: str = "out"  # output directory of train.py
    ckpt: str = ""  # path of a checkpoint, instead of the one in out_dir
    init_from: str = "resume"  # out_dir's checkpoint; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a path
    dataset: str = ""  # data folder with the meta.pkl of a checkpoint from nanoGPT, if it is not found
    start: str = ""  # prompt; FILE:path reads it from a file, - from standard input
    per_line: bool = False  # each line of start is a prompt
    interactive: bool = False  # read prompts from the keyboard
    num_samples: int = 1  # samples of each prompt; a single one is streamed
    max_new_tokens: int = 500  # tokens generated in each sample
    stop: str = ""  # end a sample before this string; \n is a line end
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 200  # sample from the k most likely tokens; 0 is off
    top_p: float = 1.0  # sample from the most likely tokens with this total probability; 1 is off
    min_p: float = 0.0  # minimum probability relative to the most likely token
    seed: int = 1337  # random seed
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is bfloat16 where the hardware supports it
    export: str = ""  # write the model to this new folder, for transformers
    score: str = ""  # loss, perplexity and bits per byte of this text file or folder
    plot: str = ""  # plot the losses of these output directories, separated by commas
    show: Literal["", "attention", "probabilities"] = ""  # plot the attention weights or next-token probabilities
    follow: bool = False  # print a short sample of each new checkpoint until the run ends


def check(s):
    """Raise UserError for settings that are out of range or contradict each other."""
    commands = [name for name in ("export", "score", "plot", "show", "follow", "interactive") if getattr(s, name)]
    if len(commands) > 1:
        raise UserError(f"--{' and --'.join(commands)} cannot be combined")
    for name, least, most in (
            ("num_samples", 1, 10**6), ("max_new_tokens", 0, 10**9), ("temperature", 0, 10**6), ("top_k", 0, 10**9),
            ("top_p", 0.001, 1), ("min_p", 0, 1), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(s, name) <= most:
            raise UserError(f"{name}={getattr(s, name)} must be at least {least} and at most {most}")


def find_tokenizer(s, checkpoint, path):
    """The tokenizer of --dataset or, for a checkpoint from nanoGPT, of the data folder it names. Raises UserError."""
    name, vocab_size = checkpoint["config"].get("dataset", ""), checkpoint["config"]["vocab_size"]
    for folder in [s.dataset] if s.dataset else [f"data/{name}", f"{path.resolve().parent.parent}/data/{name}"]:
        if s.dataset or Path(folder, "meta.pkl").exists():
            meta = train.read_meta(folder)[1]
            if meta["vocab_size"] == vocab_size:
                return meta["tokenizer"]
    raise UserError(f"no meta.pkl with {vocab_size} characters for {path} in {s.dataset or f'data/{name}'}: set "
                    "--dataset to its folder")


def load(s):
    """The model, on its device in evaluation mode, its tokenizer and the checkpoint. Raises UserError."""
    best = Path(s.out_dir, "best.pt")
    path = Path(s.ckpt) if s.ckpt else best if best.exists() else Path(s.out_dir, "ckpt.pt")
    path = path if s.init_from == "resume" else Path(s.init_from)
    is_file = s.init_from == "resume" or path.suffix == ".pt"
    try:
        checkpoint = train.load_checkpoint(path) if is_file else train.load_gpt2(s.init_from)
    except UserError as error:
        raise UserError(f"{error}; or try --ckpt={s.out_dir}/ckpt.pt" if path == best else error) from None
    if s.dataset or checkpoint["tokenizer"] is None:
        checkpoint["tokenizer"] = find_tokenizer(s, checkpoint, path)
    model, tokenizer = train.model_from_checkpoint(checkpoint, path), tokenizer_from_spec(checkpoint["tokenizer"])
    device = train.get_device(s.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it takes 30 ms to plan for each new length of the cache
    model.compute_dtype = train.get_compute_dtype(s, device)
    return model.to(device, model.compute_dtype), tokenizer, checkpoint


# Sampling -----------------------------------------------------

def keep_top_k(logits, k):
    """Set all but the k largest logits of each row to -inf, k >= 1. (B, V) -> (B, V)."""
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_top_p(logits, p):
    """Keep the fewest logits whose probabilities add up to p: nucleus sampling (Holtzman et al. 2019, 1904.09751)."""
    values, ids = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)


def keep_min_p(logits, p):
    """Keep the logits with at least p times the highest probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Sample token ids (B,) from logits (B, V) after temperature and filters."""
    if temperature < 1e-4:  # 0, or so small that the division would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# Generating with a cache of keys and values -------------------

class Cache:
    """Keys and values of the last `size` tokens, for each layer a ring buffer (B, H, size, D).

    The caller advances `length`, the number of tokens seen. Several tokens at once are for an empty cache only.
    """

    def __init__(self, model, batch_size, size):
        c, device = model.config, model.wte.weight.device
        dtype = torch.float32 if device.type == "cpu" else model.compute_dtype  # as in train.Attention
        shape = (2, c.n_layer, batch_size, c.n_head, size, c.n_embd // c.n_head)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.tokens = torch.empty(batch_size, 0, device=device, dtype=torch.long)  # the last ones, for the n-grams
        self.size, self.length, self.ngram = size, 0, c.ngram

    def extend(self, layer, k, v):
        """Store a layer's keys and values (B, H, T, D) over the oldest and return all, in the order of the ring."""
        slot, T = self.length % self.size, k.shape[2]
        keys, values = self.kv[:, layer]
        keys[:, :, slot:slot + T] = k
        values[:, :, slot:slot + T] = v
        held = min(self.length + T, self.size)
        return keys[:, :, :held], values[:, :, :held]

    def append(self, idx):
        """The new tokens idx (B, T) after those before them, as many as an n-gram has."""
        tokens = torch.cat([self.tokens, idx], 1) if self.length else idx
        self.tokens = tokens[:, -self.ngram:]
        return tokens

    def repeat(self, times):
        """Repeat each sequence, for several samples of one prompt."""
        self.kv, self.tokens = self.kv.repeat_interleave(times, 2), self.tokens.repeat_interleave(times, 0)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, num_samples=1, **sampling):
    """Yield max_new_tokens times the next token ids (B * num_samples,) of prompts idx (B, T), T >= 1.

    `sampling` is passed to sample_next. Tokens attend to the last block_size tokens. With learned positions, which end
    at block_size, a full window is recomputed from its later half; otherwise the oldest token is evicted.
    """
    size = model.config.block_size
    new = recent = idx[:, -size:]  # tokens not yet in the cache; tokens of the window
    cache = Cache(model, len(idx), min(size, new.shape[1] + max_new_tokens))
    for step in range(max_new_tokens):
        logits = model(new, cache=cache)[0][:, -1]  # (B, V)
        cache.length += new.shape[1]
        if step == 0:  # one forward pass over the prompt for all samples
            logits, recent = logits.repeat_interleave(num_samples, 0), recent.repeat_interleave(num_samples, 0)
            cache.repeat(num_samples)
        token = sample_next(logits, **sampling)
        yield token
        new = token[:, None]
        if model.wpe is not None:
            recent = torch.cat([recent, new], 1)
            if cache.length == size:
                new = recent = recent[:, -max(1, size // 2):]
                cache.length = 0


class StreamDecoder:
    """Text of a sample, token by token: complete characters only, until end-of-text or the stop string."""

    def __init__(self, tokenizer, stop=""):
        self.tokenizer, self.stop, self.held, self.ended = tokenizer, stop, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        """The text that a token adds, without what may be the beginning of the stop string."""
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
        """The rest of the text, with U+FFFD for an incomplete character."""
        if self.ended:
            return ""
        self.ended = True
        return self.held + self.decoder.decode(b"", final=True)


def encode_prompt(tokenizer, text, block_size):
    """Token ids of the last block_size tokens of text; of an empty one end-of-text, a line end or id 0."""
    if text:
        return tokenizer.encode(text)[-block_size:]
    try:
        return [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode("\n")
    except UserError:
        return [0]


def stream(model, tokenizer, ids, s, generator):
    """Yield, token by token, the text that each of s.num_samples samples gains after a prompt of token ids."""
    decoders = [StreamDecoder(tokenizer, s.stop.replace("\\n", "\n")) for _ in range(s.num_samples)]
    sampling = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, generator=generator)
    idx = torch.tensor([ids], device=model.wte.weight.device)
    for tokens in generate(model, idx, s.max_new_tokens, s.num_samples, **sampling):
        yield [decoder.push(token) for decoder, token in zip(decoders, tokens.tolist(), strict=True)]
        if all(decoder.ended for decoder in decoders):
            return
    yield [decoder.finish() for decoder in decoders]


def write_samples(model, tokenizer, prompt, s, generator, separator):
    """Print the samples of a prompt, a single one as it is generated. Raises UserError for an unknown character."""
    ids, single = encode_prompt(tokenizer, prompt, model.config.block_size), s.num_samples == 1
    texts = [prompt] * s.num_samples
    print(prompt if single else "", end="", flush=True)
    for pieces in stream(model, tokenizer, ids, s, generator):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print(pieces[0] if single else "", end="", flush=True)
    for text in texts:
        print("" if single else text, end="" if text.endswith("\n") else "\n")
        print(separator, end="", flush=True)


def read_start(start):
    """The prompt that --start names. Raises UserError if it cannot be read."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    try:
        data = sys.stdin.buffer.read() if start == "-" else Path(start.removeprefix("FILE:")).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"start={start} cannot be read as UTF-8 text ({error})") from None


def write_text(s):
    """Print samples of every prompt."""
    prompts = [read_start(s.start)]
    if s.per_line:
        prompts = [line for line in prompts[0].split("\n") if line.strip()]
    elif s.interactive:
        prompts = (line.rstrip("\n") for line in sys.stdin)
    model, tokenizer, _ = load(s)
    generator = torch.Generator(model.wte.weight.device).manual_seed(s.seed)
    if model.wte.weight.device.type == "cpu" and s.dtype == "auto" and s.num_samples < 16:
        model.float().compute_dtype = torch.float32  # bfloat16 saves no time for one token
    if s.num_samples * sum(p.numel() for p in model.h.parameters()) < 4e6:
        torch.set_num_threads(1)  # a second thread saves no time for such small matrix products
    separates = s.num_samples > 1 or s.per_line or s.interactive and not sys.stdin.isatty()
    for prompt in prompts:
        try:
            write_samples(model, tokenizer, prompt, s, generator, ("-" * 15 + "\n") * separates)
        except UserError as error:
            if not s.interactive:
                raise
            print(f"sample.py: {error}", file=sys.stderr, flush=True)  # the next prompt may be valid


def follow(s):
    """Print a short sample of each new checkpoint until the run has ended."""
    path, modified, start = Path(s.ckpt or Path(s.out_dir, "ckpt.pt")), None, read_start(s.start)
    s, step, last = replace(s, ckpt=str(path), max_new_tokens=min(s.max_new_tokens, 60), num_samples=1), 0, 1
    while step < last:
        if not path.exists() or path.stat().st_mtime_ns == modified:
            time.sleep(0.5)
            continue
        modified = path.stat().st_mtime_ns
        model, tokenizer, checkpoint = load(s)
        if "progress" not in checkpoint:
            raise UserError(f"follow: {path} is not from train.py")
        step, last = checkpoint["progress"]["step"], checkpoint["config"]["max_iters"]
        generator = torch.Generator(model.wte.weight.device).manual_seed(s.seed)
        ids = encode_prompt(tokenizer, start, model.config.block_size)
        text = "".join(piece for (piece,) in stream(model, tokenizer, ids, s, generator))
        print(f"step {step}, best val loss {checkpoint['progress']['best_val_loss']:.4f}: {text!r}", flush=True)


# Scoring ------------------------------------------------------

@torch.inference_mode()
def evaluate_text(model, ids):
    """The total loss in nats of token ids (N,), but the first, in windows of block_size that overlap by half."""
    T, N, total = model.config.block_size, len(ids), 0.0
    step, column = max(1, T // 2), np.arange(T + 1)
    starts = np.arange(0, max(1, N - 1 - T + step), step)
    most = 2**28 if model.wte.weight.is_cuda else 2**25  # logits, of 1 GB or 128 MB
    rows = max(1, min(64, most // (T * model.config.vocab_size)))
    for batch in np.split(starts, range(rows, len(starts), rows)):
        index = batch[:, None] + column
        tokens = ids[index.clip(max=N - 1)].astype(np.int64)
        counted = (index < N) & (column > np.where(batch > 0, T - step, 0)[:, None])  # once
        targets = np.where(counted, tokens, -1)[:, 1:]
        x, y = (torch.from_numpy(a).to(model.wte.weight.device) for a in (tokens[:, :-1], targets))
        total += model(x, y)[1].item() * (targets >= 0).sum()
    return total


def score(s):
    """Print the loss, perplexity and bits per byte of a text. Raises UserError."""
    model, tokenizer, _ = load(s)
    chunks = list(read_corpus(documents_in(Path(s.score)), tokenizer))
    ids = np.concatenate([np.zeros(0, np.uint8), *tokenizer.encode_stream(iter(chunks))])
    if len(ids) < 2:
        raise UserError(f"score={s.score} has fewer than two tokens")
    total, size = evaluate_text(model, ids), sum(map(len, chunks))
    loss = total / (len(ids) - 1)
    print(f"{s.score}: loss {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}, "
          f"{total / math.log(2) / size:.4f} bits per byte ({len(ids):,} tokens, {size:,} bytes)")


# Plots --------------------------------------------------------

class AttentionWeights(TorchFunctionMode):
    """While active, collects the weights (B, H, T, T) of each attention in `maps`; fused kernels do not return them."""

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


def token_labels(tokenizer, ids):
    """Printable text of each token."""
    texts = [tokenizer.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
    return [repr(text)[1:-1].replace(r"\\x", r"\x").replace(" ", "\u2423").replace("$", r"\$") for text in texts]


def plot_attention(maps, labels):
    """A Figure of attention weights (n_layer, H, T, T): a grid of layers and heads, tokens as `labels`."""
    from matplotlib.figure import Figure
    L, H, T, _ = maps.shape
    size = max(2, 0.16 * T)  # inches
    figure = Figure(figsize=(H * size + 1, L * size + 1), layout="constrained")
    grid = figure.subplots(L, H, sharex=True, sharey=True, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        axes.imshow(maps[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        axes.set_xticks(range(T), labels, fontsize=6, rotation=90)
        axes.set_yticks(range(T), labels, fontsize=6)
    figure.supxlabel("attends to this token")
    figure.supylabel("token")
    return figure


def plot_probabilities(p, ids, tokenizer):
    """A Figure of p (T, V), the probabilities after each of the ids (T,): of the prompt, and of the next token."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, height_ratios=[2, 4])
    above.bar(range(1, len(ids)), p[range(len(ids) - 1), ids[1:]].tolist())
    above.set_xticks(range(len(ids)), token_labels(tokenizer, ids), rotation=90)
    above.set(ylabel="probability", ylim=(0, 1), title="probability of each token of the prompt given those before it")
    values, likely = p[-1].topk(min(20, p.shape[1]))
    bars = below.barh(range(len(likely)), values.tolist())
    below.bar_label(bars, [f"{value:.1%}" for value in values.tolist()], padding=3)
    below.set_yticks(range(len(likely)), token_labels(tokenizer, likely.tolist()))
    below.margins(x=0.1)
    below.invert_yaxis()
    below.set(xlabel="probability", title="most likely next tokens")
    return figure


@torch.inference_mode()
def show(s):
    """Plot what --show names for the last 32 tokens of the prompt into the output directory. Raises UserError."""
    model, tokenizer, _ = load(s)
    ids = encode_prompt(tokenizer, read_start(s.start), model.config.block_size)[-32:]
    with AttentionWeights() as attention:
        logits = model(torch.tensor([ids], device=model.wte.weight.device))[0][0]
    if s.show == "probabilities":
        figure = plot_probabilities(logits.softmax(-1).cpu(), ids, tokenizer)
    elif attention.maps:
        figure = plot_attention(torch.cat(attention.maps).cpu(), token_labels(tokenizer, ids))
    else:
        raise UserError("show=attention: a model with n_layer=0 has no attention")
    target = (Path(s.ckpt).parent if s.ckpt else Path(s.out_dir)) / f"{s.show}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    train.atomic_write(target, lambda file: figure.savefig(file, format="png", dpi=120))
    print(target)


def plot(s):
    """Plot the losses of the runs in the output directories s.plot. Raises UserError."""
    for folder in s.plot.split(","):
        if not Path(folder, "log.jsonl").exists():
            raise UserError(f"plot={folder} has no log.jsonl: name output directories of train.py")
    print(train.plot_losses(s.plot.split(",")))


# Export -------------------------------------------------------

MODELING = '''import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

MODEL

class ExportedConfig(PretrainedConfig):
    """The settings of a GPT, also under the names of transformers."""
    model_type = "exported_gpt"
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                     "max_position_embeddings": "block_size"}


class ExportedGPT(PreTrainedModel, GenerationMixin):
    """A GPT for transformers, without padding and without a cache."""
    config_class = ExportedConfig
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def _init_weights(self, module):
        """GPT has initialized them."""

    def get_input_embeddings(self):
        return self.gpt.wte

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        size = self.config.block_size
        mask = None if attention_mask is None else attention_mask[:, -size:]
        return {"input_ids": input_ids[:, -size:], "attention_mask": mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        """Logits (B, T, V) and, with labels (B, T), the loss; labels of -100 are ignored."""
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError("this model does not support padding: use sequences of equal length")
        self.gpt.compute_dtype = self.gpt.wte.weight.dtype
        logits, loss = self.gpt(input_ids)
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)
'''


def model_files(model, tokenizer):
    """The exported model: the name of its class, its texts by file name and its tensors by name."""
    c, state, tensors, code = model.config, model.state_dict(), {}, {}
    config = dict(tie_word_embeddings=c.tie_weights, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot,
                  dtype="float32", tokenizer_spec=tokenizer.spec)
    is_gpt2 = (c.position == "learned" and c.norm == "layernorm" and c.norm_affine and c.bias and not c.qk_norm
               and c.mlp and c.residual and c.ngram == 1 and c.activation in ("gelu", "gelu_tanh"))
    if is_gpt2:
        config |= dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab_size, n_positions=c.block_size,
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
            attn_pdrop=0.0, activation_function="gelu_new" if c.activation == "gelu_tanh" else "gelu")
    else:
        config |= asdict(c) | dict(
            architectures=["ExportedGPT"], model_type="exported_gpt", use_cache=False,
            auto_map=dict(AutoConfig="modeling_gpt.ExportedConfig", AutoModelForCausalLM="modeling_gpt.ExportedGPT"))
        source = re.search(r"^# Model -+\n\n(.*?)\n# Optimizer -+$", inspect.getsource(train), re.M | re.S)[1]
        code["modeling_gpt.py"] = MODELING.replace("MODEL\n", source)
    for name, tensor in state.items():
        if name in ("wte.weight", "lm_head.weight") and is_gpt2:
            tensor = tensor[:c.vocab_size]  # without the padding
        if re.search(r"\.c_\w+\.weight$", name) and is_gpt2:
            tensor = tensor.T  # Conv1D stores (in, out)
        if not (name == "lm_head.weight" and c.tie_weights):
            prefix = "gpt." if not is_gpt2 else "" if name == "lm_head.weight" else "transformer."
            tensors[prefix + name] = tensor.contiguous()
    return config["architectures"][0], code | {"config.json": json.dumps(config, indent=1)}, tensors


def tokenizer_files(tokenizer, block_size):
    """The files of a char or byte tokenizer for transformers, a dict of texts by name; {} for other tokenizers."""
    if tokenizer.spec["kind"] == "char":
        split = dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False)
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        parts = dict(model=dict(type="WordLevel", vocab=vocab, unk_token=""), pre_tokenizer=split,
                     decoder=dict(type="Fuse"))
    elif tokenizer.spec["kind"] == "byte":
        printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
        vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}  # GPT-2's letters
        by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        parts = dict(model=dict(type="BPE", vocab=vocab, merges=[]), pre_tokenizer=by_byte, decoder=by_byte)
    else:
        return {}
    parts |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")) | dict(version="1.0")
    about = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=block_size,
                 clean_up_tokenization_spaces=False)
    return {"tokenizer.json": json.dumps(parts | dict(added_tokens=[])), "tokenizer_config.json": json.dumps(about)}


def export(s):
    """Write the model as a new folder that transformers loads. Raises UserError."""
    from safetensors.torch import save_file
    folder, temporary = Path(s.export), Path(f"{s.export}.tmp")
    if folder.exists():
        raise UserError(f"export={s.export} exists: name a new folder")
    model, tokenizer, _ = load(replace(s, device="cpu", dtype="float32"))
    name, texts, tensors = model_files(model, tokenizer)
    texts |= tokenizer_files(tokenizer, model.config.block_size)
    temporary.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (temporary / file).write_text(text, encoding="utf-8")
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    os.replace(temporary, folder)
    print(f"{s.export}: {name}; load it by AutoModelForCausalLM.from_pretrained, with trust_remote_code=True if it is "
          "ExportedGPT" + "; its tokenizer is not included, for gpt2 use that of gpt2" * (tokenizer.eot is not None))


# Command line -------------------------------------------------

def main(argv=None):
    """The command line. Returns the exit status: 0 done, 2 a user's mistake, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(encoding="utf-8", errors="replace")  # not the default on Windows
    commands = dict(export=export, score=score, show=show, follow=follow, plot=plot)
    try:
        s = Settings(**parse_args(Settings, argv)[0])
        check(s)
        next((command for name, command in commands.items() if getattr(s, name)), write_text)(s)
        return 0
    except BrokenPipeError:  # for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it at exit fails, too
        return 0
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install {error.name}"
    except (UserError, OSError) as error:
        message = error
    print(f"sample.py: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
