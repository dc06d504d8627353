"""Tokens per second and peak GPU memory of a training step, of train.py and of nanoGPT with the same shape.

    python tests/bench/step.py --nanogpt=../nanoGPT                             10.8M parameters, 64 x 256 tokens
    python tests/bench/step.py --nanogpt=../nanoGPT --size=0.8M --steps=300     the CPU example's shape, 12 x 64
    python tests/bench/step.py --nanogpt=../nanoGPT --size=124M --accumulate=16 GPT-2's shape, on a GPU

A step is the forward and backward passes of --accumulate batches, clipping and the optimizer, without reading the data.
--steps are timed after a warm-up; its parts are medians of at most five more. nanoGPT has its own settings: fused AdamW
and autocast on a GPU. train.py has its defaults (Muon, tied weights at 124M only) without n-grams; other arguments are
those of train.py, for example --optimizer=adamw.
"""
import statistics
import time

from common import NAMES, SIZES, compare, mfu, nanogpt_model, parser

DEFAULTS = {"tiny": (2, 2, 2, 2), "0.8M": (12, 200, 12, 200), "10.8M": (64, 3, 64, 50), "124M": (4, 1, 32, 20)}


def ours(shape, batch, device, dtype, scaler, argv):
    """The model of train.py and its update."""
    import train
    same = dict(ngram=1, tie_weights=shape["vocab_size"] > 10_000)  # an untied head would be a quarter more
    s = train.Settings(**same | shape | dict(batch_size=batch) | train.parse_args(train.Settings, argv)[0])
    model = train.GPT(s)
    model.compute_dtype = dtype
    model.to(device)
    optimizers = train.configure_optimizers(model, s)

    def update():
        train.optimizer_step(model, optimizers, scaler, s.learning_rate, s.grad_clip)

    return model, update


def nanogpt(checkout, shape, device, scaler):
    """The same of nanoGPT, with the defaults of its train.py."""
    import torch
    model = nanogpt_model(checkout, **shape, dropout=0.0, bias=False).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)

    def update():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return model, update


def heaviest(step, on_gpu):
    """{kernel: milliseconds} of the 25 kernels that take the most time in a step."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as profiler:
        step()
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.key)
             for event in profiler.key_averages()]
    return {key[:100]: time / 1000 for time, key in sorted(times, reverse=True)[:25]}


def measure(args, argv):
    """One turn of one side. Returns its figures."""
    import torch

    import train
    device, shape = train.get_device(args.device), dict(zip(NAMES, SIZES[args.size], strict=True))
    dtype, on_gpu, is_ours = train.get_compute_dtype(args, device), device.type == "cuda", args.side == "ours"
    if args.attention == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    batch, steps = DEFAULTS[args.size][2:] if on_gpu else DEFAULTS[args.size][:2]  # the first two are for CPUs
    batch, steps = args.batch or batch, args.steps or steps
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model, update = (ours(shape, batch, device, dtype, scaler, argv) if is_ours else
                     nanogpt(args.nanogpt, shape, device, scaler))
    compiled = args.compile == "True" or args.compile == "auto" and on_gpu
    forward = torch.compile(model, dynamic=False) if compiled else model
    # with the strides of training, or torch.compile would compile again; nanoGPT's are contiguous
    tokens = [torch.randint(shape["vocab_size"], (batch, shape["block_size"] + 1), device=device) for _ in range(8)]
    pairs = [(t[:, :-1], t[:, 1:]) if is_ours else (t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]

    def passes():
        for i in range(args.accumulate):
            with torch.autocast(device.type, dtype, enabled=on_gpu and not is_ours):
                loss = forward(*pairs[i % 8])[1] / args.accumulate
            scaler.scale(loss).backward()

    def step():
        passes()
        update()

    def seconds(function, count=1):
        wait = torch.cuda.synchronize if on_gpu else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(count):
            function()
        wait()
        return time.perf_counter() - began

    seconds(step, args.warm)
    speed = steps * args.accumulate * batch * shape["block_size"] / seconds(step, steps)
    parts = [(seconds(passes), seconds(update)) for _ in range(min(steps, 5))]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(dtype if is_ours or on_gpu else torch.float32).removeprefix("torch."), "tokens/s": speed,
            "MFU, %": mfu(speed, torch.cuda.get_device_name(device) if on_gpu else "", **shape),
            "passes, ms": 1000 * statistics.median(first for first, _ in parts),
            "update, ms": 1000 * statistics.median(second for _, second in parts),
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "kernels": heaviest(step, on_gpu) if args.profile else {}}


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "step", text=False)
    options.add_argument("--accumulate", type=int, default=1, help="passes in a step")
    options.add_argument("--steps", type=int, default=0, help="in a turn; 0 depends on the size")
    options.add_argument("--warm", type=int, default=2, help="warm-up steps")
    options.add_argument("--compile", default="auto", choices=("auto", "True", "False"), help="auto: on a GPU")
    options.add_argument("--attention", default="auto", choices=("auto", "flash"), help="flash: without cuDNN's")
    options.add_argument("--profile", action="store_true", help="the heaviest kernels, in the JSON file")
    compare(__file__, options, measure, argv)


if __name__ == "__main__":
    main()
