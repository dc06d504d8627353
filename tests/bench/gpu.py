"""What may break on a GPU, and the README's GPU figures, in three parts of under nine minutes each on an H100 or H200.

    python tests/bench/gpu.py --nanogpt=../nanoGPT --text=input.txt    all parts; offline, --text is tiny Shakespeare
    python tests/bench/gpu.py --part=speed --tiny                      a part, with tiny shapes on a CPU as a test

correctness: losses by dtype, compiled, under torchrun and with two processes (NCCL needs two GPUs, gloo one); resume,
SIGTERM, --deterministic; sampling, scoring; a random GPT-2. speed: training steps and decoding, see step.py, sample.py.
character: --n seeds of config/train_char.py, seconds from launch to a validation loss of 1.4697, and nanoGPT's own run
of a model of this size, with its own estimates of the loss.

Each run is a child process. A row fails if a run fails, lasts too long or writes a warning to stderr; the others go on.
The JSON file keeps the parts that other calls measured. Exit status 1 if a row failed.
"""
import functools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from char_cpu import copy_nanogpt, passing
from common import ROOT, facts, launch, log_of, parser, prepared, run_train, table

TRAIN, SAMPLE, BENCH = ROOT / "train.py", ROOT / "sample.py", ROOT / "tests" / "bench"
CHAR = ROOT / "config" / "train_char.py"
SECONDS = 520  # of a part; a run that lasts longer is killed
TARGET = 1.4697  # validation loss in the README of nanoGPT, of its model of this size
MODEL = "--device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 "
TINY = {  # arguments that --tiny adds to these scripts; "train.py" is nanoGPT's
    TRAIN: MODEL + "--batch_size=4 --gradient_accumulation_steps=1 --eval_iters=20", SAMPLE: "--device=cpu",
    BENCH / "step.py": "--device=cpu --size=tiny --batch=2 --accumulate=2 --steps=2",
    BENCH / "sample.py": "--device=cpu --size=tiny --batch=2 --tokens=40",
    "train.py": MODEL + "--eval_iters=2 --max_iters=4 --eval_interval=2"}
WARNING = re.compile(r"^.*(?:warn|error|note:).*|^W\d{4} .*", re.IGNORECASE | re.MULTILINE)
GLOO = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import torch.distributed as dist
import train
init = dist.init_process_group
dist.init_process_group = lambda *args, **kwargs: init(**kwargs | dict(backend="gloo"))
sys.exit(train.main(sys.argv[2:]))
"""  # NCCL refuses two processes on one GPU


class Part:
    """The rows of a part, and the folder and the time limit of its runs."""

    def __init__(self, args, folder):
        self.args, self.folder, self.end = args, folder, time.monotonic() + SECONDS
        self.rows, self.warnings, self.failed, self.meta = {}, [], {}, prepared(folder, args.text)

    def row(self, group, name, measure, *args, **options):
        """Add a row, the figures (a dict) that a call returns, or why it failed. Returns them."""
        if self.args.tiny and "compiled" in name:  # half a minute each
            return {}
        self.warnings, figures, began = [], {}, time.monotonic()
        try:
            figures = measure(*args, **options)
            reason = "; ".join(self.warnings)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            self.failed[f"{group}, {name}"] = reason
        self.rows.setdefault(group, {})[name + " (FAILED)" * bool(reason)] = [figures]
        print(f"{group}, {name}: {reason or 'passed'}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return figures

    def run(self, command, folder=None, *args, **options):
        """launch() within the time that is left. Notes warnings but nanoGPT's."""
        left = self.end - time.monotonic()
        assert left > 0, f"{SECONDS} s have passed"
        tiny = [flag for script in TINY if script in command for flag in TINY[script].split()]
        done = launch([*command, *tiny * self.args.tiny], folder or self.folder, *args, timeout=left, **options)
        if "train.py" not in command and "--side=nanoGPT" not in command:
            self.warnings += [match[0][-200:] for match in WARNING.finditer(done.errors)]
        return done

    def train(self, out, *argv, **options):
        """run_train() in the folder."""
        return run_train(argv, self.folder, self.folder / out, launch=self.run, **options)

    def checkpoint(self, out, name="ckpt.pt"):
        """A checkpoint of a run."""
        return torch.load(self.folder / out / name, map_location="cpu", weights_only=True)


# Correctness --------------

def correctness(part):
    """Rows of short runs of config/train_char.py, of sample.py with the first of them, and of GPT-2."""
    losses, steps, gloo = {}, 20 if part.args.tiny else 200, part.folder / "gloo.py"
    gloo.write_text(GLOO, encoding="utf-8")

    def char(out, *flags, **options):
        log = part.train(out, CHAR, f"--max_iters={steps}", f"--eval_interval={steps}", *flags, **options)
        loss = losses[out] = log[-1]["val_loss"]
        assert abs(loss - losses["eager"]) < 0.02, f"loss {loss:.4f}, not that of the first row"
        return {"loss": loss}

    def resume(out, end, *flags):
        last = part.train(out, "--init_from=resume", f"--max_iters={end}", *flags)[-1]
        assert last["step"] == end and last["val_loss"] < losses.get(out, 5) + 0.05, "not all steps, or worse"
        return {"loss": last["val_loss"]}

    def stop():
        command = [TRAIN, CHAR, "--max_iters=1000000", "--eval_interval=1000000", "--out_dir=stopped"]
        part.run(command, enough=lambda: log_of(part.folder / "stopped"), statuses=(143,))
        return resume("stopped", part.checkpoint("stopped")["progress"]["step"] + 10)

    def deterministic(*flags):
        flags = CHAR, "--deterministic", "--lr_decay_iters=60", "--eval_interval=30", *flags
        part.train("whole", *flags, "--max_iters=60")
        part.train("halves", *flags, "--max_iters=30")
        figures = resume("halves", 60)
        a, b = part.checkpoint("whole")["model"], part.checkpoint("halves")["model"]
        assert all(torch.equal(a[name], b[name]) for name in a), "the weights differ"
        return figures

    row = functools.partial(part.row, "correctness")
    row(f"train_char, {steps} steps", char, "eager", "--compile=False")
    row("compiled", char, "compiled", "--compile=True")
    row("float16", char, "float16", "--dtype=float16")
    row("float32", char, "float32", "--dtype=float32")
    row("torchrun, one process", char, "one", processes=1)
    if torch.cuda.device_count() > 1:
        row("torchrun, two processes", char, "two", processes=2)
    row("two processes on one GPU, gloo", char, "gloo", "--device=cuda:0", processes=2, script=[gloo, TRAIN])
    row("the first, resumed in float16", resume, "eager", steps + 10, "--dtype=float16")
    row("float32, resumed in float16", resume, "float32", steps + 10, "--dtype=float16")
    row("SIGTERM (status 143), resumed", stop)
    row("deterministic: 60 steps are 30 + 30", deterministic, "--compile=False")
    row("deterministic, compiled", deterministic, "--compile=True")
    row("sampling: one text, four, greedy as on the CPU, score", sampling, part)
    row("a random GPT-2: sampled, finetuned for 5 steps", random_gpt2, part)


def sampling(part):
    """Figures of sample.py with the model of the first row."""
    chars, val = part.meta["tokenizer"]["chars"], part.folder / "val.txt"
    text = "".join(chars[i] for i in np.fromfile(part.folder / "data" / "char" / "val.bin", part.meta["dtype"]))
    val.write_bytes(text.encode())

    def printed(*flags):
        command = [SAMPLE, "--out_dir=eager", f"--start={text[:8]}", "--max_new_tokens=200", *flags]
        return "\n".join(line for _, line in part.run(command).lines)

    assert len(printed()) > 200 and printed("--num_samples=4").count("-" * 15) == 4, "not one text and four"
    loss = float(re.search(r"loss ([\d.]+) nats", printed(f"--score={val}"))[1])
    best = part.checkpoint("eager", "best.pt")["progress"]["best_val_loss"]
    assert abs(loss - best) < 0.2, f"score: loss {loss}, {best:.4f} in train.py"
    greedy = "--temperature=0", "--dtype=float32"
    same = len(os.path.commonprefix([printed(*greedy), printed(*greedy, "--device=cpu")])) - 8
    assert same >= 32, f"greedy: another text on the CPU after {same} characters"
    return {"loss": loss, "equal characters": same}


def random_gpt2(part):
    """Figures of a random GPT-2 in Hugging Face's layout, with 50,257 characters as tokens, on random text."""
    from safetensors.torch import save_file
    L, H, C, T, V = (1, 2, 32, 16, 300) if part.args.tiny else (12, 12, 768, 1024, 50257)
    chars, folder = "".join(map(chr, range(256, 256 + V))), part.folder / "gpt2"
    text = "".join(chars[i % V] for i in torch.randperm(7 * V).tolist())
    (part.folder / "random.txt").write_text(text, encoding="utf-8")
    part.run([ROOT / "prepare.py", "random.txt", "--name=random"])
    shapes = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
              "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    shapes = {f"h.{i}.{name}": shape for i in range(L) for name, shape in shapes.items()} | {"ln_f": (C,)}
    tensors = {"wte.weight": 0.02 * torch.randn(V, C), "wpe.weight": 0.02 * torch.randn(T, C)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = 0.02 * torch.randn(shape) + (len(shape) == 1)
        tensors[f"{name}.bias"] = torch.zeros(shape[-1])
    config = dict(n_layer=L, n_head=H, n_embd=C, n_positions=T, vocab_size=V,
                  tokenizer_spec=dict(kind="char", chars=chars))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    part.run([SAMPLE, "--init_from=./gpt2", f"--start={text[:8]}", "--max_new_tokens=100"])
    loss = part.train("finetuned", ROOT / "config" / "finetune_gpt2.py", "--init_from=./gpt2", "--dataset=random",
                      "--max_iters=5", "--eval_interval=5")[-1]["val_loss"]
    assert abs(loss - np.log(V)) < 0.5, f"loss {loss:.4f}, but {np.log(V):.4f} is that of random tokens"
    return {"loss": loss}


# Speed --------------------

def speed(part):
    """Rows of step.py and sample.py in this folder."""
    both = ["ours", "nanoGPT"] if part.args.nanogpt else ["ours"]
    large = "--size=124M", "--batch=32", "--accumulate=16", "--steps=8", "--warm=1"

    def figures(script, side, flags):
        command = [BENCH / script, f"--side={side}", f"--nanogpt={part.args.nanogpt}", *flags]
        return json.loads(part.run(command).lines[-1][1])

    def step(name, *flags, sides=("ours",)):
        for side in sides:
            part.row("training step", f"{name}, {side}", figures, "step.py", side, flags)

    step("124M, 32 x 1024 x 16", *large, "--profile", sides=both)
    for size, batch in (("124M", 1), ("124M", 64), ("10.8M", 1), ("10.8M", 64)):
        for side in both:
            flags = f"--size={size}", f"--batch={batch}"
            part.row("decoding", f"{size}, batch {batch}, {side}", figures, "sample.py", side, flags)
    step("10.8M, 64 x 256", "--size=10.8M", "--steps=200", sides=both)
    step("10.8M, eager", "--size=10.8M", "--steps=200", "--compile=False")
    step("124M, 64 x 1024 x 8", *large, "--batch=64", "--accumulate=8")
    step("124M, flash instead of cuDNN attention", *large, "--attention=flash")
    step("124M, 6 heads of 128", *large, "--n_head=6")


# Character model ----------

def character(part):
    """Rows of config/train_char.py and of nanoGPT's config for a model of its size."""
    short, target = (["--max_iters=20", "--eval_interval=10"], 9.0) if part.args.tiny else ([], TARGET)

    def figures(curve, seconds):
        curve = [point for point in curve if point["val_loss"] is not None]
        return {"best loss": min(point["val_loss"] for point in curve), "seconds": seconds,
                f"seconds to {target}": passing(curve, target), "curve": curve}

    def ours(*flags, **options):
        log = part.train("character", CHAR, *flags, *short, **options)
        return figures(log, log[-1]["seconds"])

    def theirs():
        copy = copy_nanogpt(part.folder, part.args.nanogpt, part.meta)
        done = part.run(["train.py", "config/train_shakespeare_char.py"], copy)
        found = ((seconds, re.match(r"step \d+: .* val loss ([\d.]+)", line)) for seconds, line in done.lines)
        return figures([dict(seconds=at, val_loss=float(match[1])) for at, match in found if match], done.seconds)

    row = functools.partial(part.row, "character model")
    seeds = [row(f"train_char, seed {1337 + i}", ours, f"--seed={1337 + i}") for i in range(part.args.n)]
    row("the mean", lambda: {"best loss": statistics.mean(run["best loss"] for run in seeds)})
    row("train_char, stopped at the target", ours, "--eval_interval=100", target=target)
    if part.args.nanogpt:
        row("nanoGPT, train_shakespeare_char", theirs)


# Command line -------------

def main(argv=None):
    """The command line. Returns the exit status."""
    parts, failed = dict(correctness=correctness, speed=speed, character=character), {}
    options = parser(__doc__, "gpu", n=5)
    options.add_argument("--part", choices=parts, help="only this part")
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    options.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    args = options.parse_args(argv)
    args.nanogpt = args.nanogpt and args.nanogpt.resolve()
    gpu = dict(gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
               cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    found = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    for name in [args.part] if args.part else parts:
        with tempfile.TemporaryDirectory() as folder:
            part = Part(args, Path(folder))
            known = facts(**gpu, corpus=part.meta["corpus"], tokens=part.meta["tokens"]["train"])
            parts[name](part)
        found[name] = dict(facts=known, rows=part.rows, failed=part.failed)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(*(f"{key} {value}" for key, value in known.items()), sep=", ")
        print(*(f"\n{table(rows)}" for rows in part.rows.values()), sep="\n")
        failed |= part.failed
    print(*(f"\nFAILED {name}: {reason}" for name, reason in failed.items()), f"\nwritten to {args.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
