"""Tokens per second and peak memory of a training step, of train.py and of nanoGPT with the same shape.

    python tests/bench/step.py --nanogpt=../nanoGPT                             10.8M parameters, 64 x 256 tokens
    python tests/bench/step.py --nanogpt=../nanoGPT --size=0.8M --steps=300     the CPU example's shape, 12 x 64
    python tests/bench/step.py --nanogpt=../nanoGPT --size=124M --batch=32      GPT-2's shape, on a GPU
    python tests/bench/step.py --size=2x2x64x32x65 --batch=4                    layers x heads x C x T x V, ours alone

A step is forward, backward, clipping and the optimizer, without reading the data. Every turn is a process of its own,
which warms up, compiles if asked to, and then times --steps steps, so that peak memory is that of one side: on a GPU
what torch allocated, on a CPU the whole process, torch included, and in brackets what the step added. nanoGPT has its
own settings: AdamW, fused on a GPU, autocast on a GPU only. train.py has its defaults (Muon, and tied weights at 124M
only, as in config/train_gpt2.py) without n-grams; arguments that are not flags of this script are those of train.py,
for example --optimizer=adamw --gradient_checkpointing=True.

MFU counts per token 6 operations for each weight in the matrix products and 12 L C T for attention, the same number for
both sides, relative to --peak_tflops or the known peak of the GPU. If that is unknown, the step is compared with large
matrix products of the same dtype, measured in the same process.
"""
import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, fact_line, facts, flops_per_token, nanogpt_model, peak_flops, spread, summary, table, write

SIZES = {  # n_layer, n_head, n_embd, block_size, vocab_size; batch and steps on a CPU; batch and steps on a GPU
    "0.8M": ((4, 4, 128, 64, 65), (12, 200), (12, 200)),
    "10.8M": ((6, 6, 384, 256, 65), (64, 3), (64, 50)),
    "124M": ((12, 12, 768, 1024, 50304), (4, 1), (32, 20)),
}
NAMES = "n_layer", "n_head", "n_embd", "block_size", "vocab_size"


def shape_of(size):
    """(n_layer, n_head, n_embd, block_size, vocab_size) of a name in SIZES or of a word like 2x2x64x32x65."""
    if size in SIZES:
        return SIZES[size][0]
    try:
        n_layer, n_head, n_embd, block_size, vocab_size = shape = tuple(map(int, size.split("x")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{size}: one of {', '.join(SIZES)}, or layers x heads x C x T x V, "
                                         "as 2x2x64x32x65") from None
    if min(shape) < 1 or n_embd % (2 * n_head):
        raise argparse.ArgumentTypeError(f"{size}: every number at least 1, and C a multiple of twice the heads")
    return shape


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
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
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


def matmul_rate(device, dtype, wait):
    """Operations per second of large square matrix products, the fastest of several."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, rates = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(8):
        wait()
        began = time.perf_counter()
        a @ a
        wait()
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return max(rates)


def peak_of_process():
    """Peak resident memory of this process in bytes, None where unknown."""
    try:  # not getrusage, which on Linux includes the parent's
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(side, args, argv):
    """One turn of one side: prints a JSON line with its measurements."""
    import torch

    import train

    device = train.get_device(args.device)
    dtype = train.get_compute_dtype(args, device)
    gpu = device.type == "cuda"
    compiled = gpu if args.compile == "auto" else args.compile == "True"
    if args.threads:
        torch.set_num_threads(args.threads)
    batch, steps = SIZES.get(args.size, (None, (4, 20), (4, 20)))[2 if gpu else 1]
    batch, steps = args.batch or batch, args.steps or steps
    shape = shape_of(args.size)
    torch.manual_seed(0)
    before = peak_of_process()
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
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if gpu else peak_of_process()
    added = None if gpu or peak is None else peak - before
    known = peak_flops(torch.cuda.get_device_name(device)) if gpu and dtype != torch.float32 else None
    peak_rate = args.peak_tflops * 1e12 or known
    rate = peak_rate or matmul_rate(device, dtype, wait)
    speed = steps * batch * shape[3] / seconds
    print(json.dumps(dict(
        tokens_per_second=speed, share=speed * flops_per_token(*shape) / rate, of="peak" if peak_rate else "matmul",
        tflops=rate / 1e12, peak_mb=peak and peak / 1e6, added_mb=added and added / 1e6, parameters=parameters,
        device=torch.cuda.get_device_name(device) if gpu else str(device), dtype=str(dtype).removeprefix("torch."),
        compiled=compiled, batch=batch, steps=steps, context=shape[3], threads=torch.get_num_threads())))


def turn(side, words):
    """One turn, in a process of its own. Returns its measurements."""
    done = subprocess.run([sys.executable, __file__, f"--worker={side}", *words], capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        sys.exit(f"{side} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(found):
    """The rows of the table, of {side: turns}."""
    first = next(iter(found.values()))[0]
    rows = [["", "parameters", "dtype", "tokens/s", "ratio", "MFU, %" if first["of"] == "peak" else "of a matmul, %",
             "peak MB"]]
    middle = {side: statistics.median(t["tokens_per_second"] for t in turns) for side, turns in found.items()}
    for side, turns in found.items():
        peak, added = spread([t["peak_mb"] for t in turns], 0), [t["added_mb"] for t in turns if t["added_mb"]]
        other = [speed for name, speed in middle.items() if name != side and side == "train.py"]
        rows.append([side, f"{turns[0]['parameters']:,}", turns[0]["dtype"],
                     spread([t["tokens_per_second"] for t in turns], 0),
                     f"{middle[side] / other[0]:.2f} x" if other else "-", spread([100 * t["share"] for t in turns]),
                     peak + (f" [{statistics.median(added):,.0f}]" if added else "")])
    return rows


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--size", default="10.8M", help=f"{', '.join(SIZES)}, or a shape (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=0, help="sequences in a step (default: 12, 64; 4, on a GPU 32)")
    parser.add_argument("--steps", type=int, default=0, help="in a turn (default: 200, 3, 1; on a GPU 200, 50, 20)")
    parser.add_argument("--warm", type=int, default=2, help="warm-up steps (default: %(default)s)")
    parser.add_argument("--n", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="auto", help="as in train.py (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in train.py; for nanoGPT on a GPU only")
    parser.add_argument("--compile", default="auto", choices=("auto", "True", "False"),
                        help="torch.compile on both sides; auto: on a GPU (default: %(default)s)")
    parser.add_argument("--peak_tflops", type=float, default=0, help="for the MFU (default: by the name of the GPU)")
    parser.add_argument("--json", default="bench-step.json", help="file to write (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    words = sys.argv[1:] if argv is None else argv
    args, extra = parser.parse_known_args(words)
    try:
        shape = shape_of(args.size)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    sys.path.insert(0, str(ROOT))
    if args.worker:
        worker(args.worker, args, extra)
        return 0
    known = facts(size=args.size, n=args.n)
    found = {"nanoGPT": [], "train.py": []} if args.nanogpt else {"train.py": []}
    for _ in range(args.n):
        for side, turns in found.items():
            turns.append(turn(side, words))
    first = found["train.py"][0]
    known |= {key: first[key] for key in ("device", "threads", "batch", "context", "steps", "compiled")}
    if first["of"] == "matmul":
        known["matmul_tflops"] = round(statistics.median(t["tflops"] for t in found["train.py"]), 3)
    if extra:
        known["settings"] = " ".join(extra)
    print(fact_line(known))
    print(table(shown(found)))
    sides = {side: dict(turns=turns, tokens_per_second=summary([t["tokens_per_second"] for t in turns]),
                        share=summary([t["share"] for t in turns]), peak_mb=summary([t["peak_mb"] for t in turns]))
             for side, turns in found.items()}
    write(args.json, dict(facts=known, shape=dict(zip(NAMES, shape, strict=True)), sides=sides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
