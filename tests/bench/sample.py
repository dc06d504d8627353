"""How many tokens a second sample.py generates, within and past the context, beside nanoGPT where there is a checkout.

    python tests/bench/sample.py                                    10.8M parameters, batches of 1 and 64
    python tests/bench/sample.py --nanogpt=../nanoGPT               and nanoGPT's generate() at the same shapes
    python tests/bench/sample.py --size=124M --batch=1 --n=3        GPT-2's size

Both models have random weights, the same shapes and the same settings: temperature 0.8, top-k 200, nothing compiled.
"within" goes on from a prompt of one token until the context is full or all --tokens are there; "past" starts from a
full context and generates the rest, reading the prompt included; "both" is the one after the other. The two sides take
turns, after one turn that is not counted. sample.py takes a single CPU thread where more do not pay. Speeds are tokens
a second of all sequences of a batch together: the median of n turns, and in brackets the slowest to the fastest.
"""
import argparse
import contextlib
import io
import statistics
import sys
import time

from common import ROOT, fact_line, facts, nanogpt_model, spread, table, write

sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402

SIZES = {  # n_layer, n_head, n_embd, block_size, vocab_size
    "0.8M": (4, 4, 128, 64, 65), "10.8M": (6, 6, 384, 256, 65), "124M": (12, 12, 768, 1024, 50304),
}


def ours(size, device, dtype, threads):
    """A function of (batch, prompt length, tokens) that generates with a GPT of train.py and returns the seconds."""
    n_layer, n_head, n_embd, block_size, vocab_size = SIZES[size]
    model = train.GPT(train.GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head,
                                      n_embd=n_embd, zero_init=False, ngram=1)).eval()
    model.compute_dtype = dtype
    model.to(device, dtype)

    def run(batch, prompt, tokens):
        torch.set_num_threads(threads if sample.worth_threads(model, batch) else 1)  # as sample.py does
        idx = torch.zeros(batch, prompt, dtype=torch.long, device=device)
        return timed(device, lambda: list(sample.generate(model, idx, tokens, temperature=0.8, top_k=200)))

    return run


def nanogpt(checkout, size, device, dtype, threads):
    """The same for nanoGPT's model.py, under autocast as its sample.py has it."""
    module = nanogpt_model(checkout)
    n_layer, n_head, n_embd, block_size, vocab_size = SIZES[size]
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer,
                                            n_head=n_head, n_embd=n_embd, dropout=0.0, bias=False)).eval().to(device)
    cast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def run(batch, prompt, tokens):
        torch.set_num_threads(threads)
        idx = torch.zeros(batch, prompt, dtype=torch.long, device=device)
        with cast:
            return timed(device, lambda: model.generate(idx, tokens, temperature=0.8, top_k=200))

    return run


def timed(device, function):
    """Seconds that a call takes, until the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def measure(sides, batch, tokens, context, n):
    """Time every side n times, in turns. Returns {side: {"within": speeds, "past": speeds, "both": speeds}}."""
    within = min(tokens, context)
    past = tokens - within
    speeds = {name: dict(within=[], past=[], both=[]) for name in sides}
    for turn in range(n + 1):
        for name, run in sides.items():
            first, second = run(batch, 1, within), run(batch, context, past) if past else 0.0
            if turn:  # the first one warms up
                speeds[name]["within"].append(batch * within / first)
                speeds[name]["both"].append(batch * tokens / (first + second))
                if past:
                    speeds[name]["past"].append(batch * past / second)
    return speeds


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10.8M", choices=SIZES, help="of the model, in parameters (default: 10.8M)")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--batch", default="1,64", help="batch sizes, with commas between them (default: 1,64)")
    parser.add_argument("--tokens", type=int, default=500, help="new tokens in a run (default: 500)")
    parser.add_argument("--n", type=int, default=5, help="runs that are counted (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="auto", help="as in train.py (default: auto)")
    parser.add_argument("--dtype", default="auto", help="as in train.py (default: auto)")
    parser.add_argument("--json", default="bench-sample.json", help="file to write (default: bench-sample.json)")
    args = parser.parse_args(argv)

    known = facts(size=args.size, tokens=args.tokens, context=SIZES[args.size][3], n=args.n, threads=args.threads)
    torch.manual_seed(0)
    hardware = train.Settings(device=args.device, dtype=args.dtype)
    device = train.join_world(hardware).device
    dtype = train.choose_dtype(hardware, device)
    sides = {"sample.py": ours(args.size, device, dtype, args.threads)}
    if args.nanogpt:
        sides["nanoGPT"] = nanogpt(args.nanogpt, args.size, device, dtype, args.threads)
    chip = dict(chip=torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    known |= chip | dict(device=str(device), dtype=str(dtype).removeprefix("torch."))
    rows = [["", "batch", "tokens/s within context", "past it", "both"]]
    results = []
    for batch in map(int, args.batch.split(",")):
        found = measure(sides, batch, args.tokens, known["context"], args.n)
        for name, parts in found.items():
            rows.append([name, batch, *(spread(values, 0) for values in parts.values())])
        if args.nanogpt:
            rows.append(["ratio", batch, *(
                f"{statistics.median(v) / statistics.median(found['nanoGPT'][part]):.1f} x" if v else "-"
                for part, v in found["sample.py"].items())])
        results.append(dict(batch=batch, tokens_per_second=found))
        print(f"batch {batch} is measured", file=sys.stderr, flush=True)
    print(fact_line(known))
    print(table(rows))
    write(args.json, known | dict(results=results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
