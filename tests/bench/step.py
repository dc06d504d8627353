"""Tokens per second and peak memory of a training step, of train.py and of nanoGPT with the same shape.

    python tests/bench/step.py --nanogpt=../nanoGPT                             10.8M parameters, 64 x 256 tokens
    python tests/bench/step.py --nanogpt=../nanoGPT --size=0.8M --steps=300     the CPU example's shape, 12 x 64
    python tests/bench/step.py --nanogpt=../nanoGPT --size=124M --batch=32      GPT-2's shape, on a GPU

A step is forward, backward, clipping and the optimizer, without reading the data. The sides alternate, each turn in a
process of its own, which warms up before it times --steps steps. nanoGPT has its own settings: AdamW, fused on a GPU,
autocast on a GPU only. train.py has its defaults (Muon, tied weights at 124M only) without n-grams; other arguments are
those of train.py, for example --optimizer=adamw. On a known GPU, MFU counts 6 operations per token for each weight in
the matrix products and 12 L C T for attention.
"""
import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time

from common import NAMES, ROOT, SIZES, facts, flops_per_token, nanogpt_model, peak_flops, report, spread

DEFAULTS = {"0.8M": (12, 200, 12, 200), "10.8M": (64, 3, 64, 50), "124M": (4, 1, 32, 20)}  # batch, steps; on a GPU


def ours(shape, batch, device, dtype, compiled, argv):
    """A function that takes one step on (x, y), and the number of parameters."""
    import torch

    import train

    same = dict(ngram=1, tie_weights=shape[-1] > 10_000)  # of the same size: an untied head would be a quarter more
    same |= dict(zip(NAMES, shape, strict=True), batch_size=batch)
    s = train.Settings(**same | train.parse_args(train.Settings, argv)[0])
    model = train.GPT(s)
    model.compute_dtype = dtype
    model.to(device)
    optimizers = train.configure_optimizers(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(x, y):
        scaler.scale(forward(x, y)[1]).backward()
        train.optimizer_step(model, optimizers, scaler, s.learning_rate, s.grad_clip)

    return step, sum(p.numel() for p in model.parameters())


def nanogpt(checkout, shape, device, dtype, compiled):
    """The same for nanoGPT's model.py, with the defaults of its train.py."""
    import torch

    module, on_gpu = nanogpt_model(checkout), device.type == "cuda"
    config = module.GPTConfig(**dict(zip(NAMES, shape, strict=True)), dropout=0.0, bias=False)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and dtype == torch.float16)
    forward = torch.compile(model) if compiled else model

    def step(x, y):
        with torch.autocast("cuda", dtype) if on_gpu else contextlib.nullcontext():
            loss = forward(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


def worker(side, args, argv):
    """One turn of one side: prints a JSON line with its measurements."""
    import torch

    import train

    device = train.get_device(args.device)
    dtype, gpu, shape = train.get_compute_dtype(args, device), device.type == "cuda", SIZES[args.size]
    compiled = gpu if args.compile == "auto" else args.compile == "True"
    batch, steps = DEFAULTS[args.size][2:] if gpu else DEFAULTS[args.size][:2]
    batch, steps = args.batch or batch, args.steps or steps
    torch.manual_seed(0)
    if side == "train.py":
        step, parameters = ours(shape, batch, device, dtype, compiled, argv)
    else:
        step, parameters = nanogpt(args.nanogpt, shape, device, dtype, compiled)
        dtype = dtype if gpu else torch.float32
    wait = torch.cuda.synchronize if gpu else lambda: None
    data = torch.randint(shape[-1], (8, 2, batch, shape[3]), device=device)
    for i in range(args.warm):
        step(*data[i % 8])
    wait()
    began = time.perf_counter()
    for i in range(steps):
        step(*data[i % 8])
    wait()
    speed = steps * batch * shape[3] / (time.perf_counter() - began)
    peak = peak_flops(torch.cuda.get_device_name(device)) if gpu else None
    print(json.dumps(dict(
        tokens_per_second=speed, mfu=peak and 100 * speed * flops_per_token(*shape) / peak, parameters=parameters,
        peak_mb=train.peak_memory(device) / 1e6, dtype=str(dtype).removeprefix("torch."), batch=batch, steps=steps,
        device=torch.cuda.get_device_name(device) if gpu else str(device), compiled=compiled)))


def turn(side, words):
    """One turn, in a process of its own. Returns its measurements."""
    done = subprocess.run([sys.executable, __file__, f"--worker={side}", *words], capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        sys.exit(f"{side} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--size", default="10.8M", choices=SIZES, help="default: 10.8M")
    parser.add_argument("--batch", type=int, default=0, help="sequences in a step (default: 12, 64, 4; on a GPU 32)")
    parser.add_argument("--steps", type=int, default=0, help="in a turn (default: 200, 3, 1; on a GPU 200, 50, 20)")
    parser.add_argument("--warm", type=int, default=2, help="warm-up steps (default: %(default)s)")
    parser.add_argument("--n", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as in train.py (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in train.py; for nanoGPT on a GPU only")
    parser.add_argument("--compile", default="auto", choices=("auto", "True", "False"),
                        help="torch.compile on both sides; auto: on a GPU (default: %(default)s)")
    parser.add_argument("--json", default="bench-step.json", help="file to write (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    words = sys.argv[1:] if argv is None else argv
    args, extra = parser.parse_known_args(words)
    sys.path.insert(0, str(ROOT))
    if args.worker:
        worker(args.worker, args, extra)
        return 0
    known, found = facts(size=args.size, n=args.n), {"nanoGPT": [], "train.py": []}
    if not args.nanogpt:
        del found["nanoGPT"]
    for _ in range(args.n):
        for side, turns in found.items():
            turns.append(turn(side, words))
    known |= {key: found["train.py"][0][key] for key in ("device", "batch", "steps", "compiled")}
    rows, base = [["", "parameters", "dtype", "tokens/s", "ratio", "MFU, %", "peak MB"]], None
    for side, turns in found.items():
        column = {key: [turn[key] for turn in turns] for key in turns[0]}
        speed = statistics.median(column["tokens_per_second"])
        rows.append([side, f"{turns[0]['parameters']:,}", turns[0]["dtype"], spread(column["tokens_per_second"], 0),
                     f"{speed / base:.2f}x" if base else "-", spread(column["mfu"]), spread(column["peak_mb"], 0)])
        base = speed
    report(args.json, known | dict(settings=" ".join(extra)), rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
