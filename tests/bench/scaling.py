"""What more processes bring and what their messages cost: measured on CPUs here, on paper for GPUs and networks.

    python tests/bench/scaling.py                      1, 2 and 4 processes with a thread each, three runs, alternating
    python tests/bench/scaling.py --processes=1,2 --n=1 config/train_char.py --batch_size=8
    python tests/bench/scaling.py --paper              only the table on paper; --mfu and --ms change its step time

The global batch stays the same, as it does in train.py, so this is strong scaling. A step's time without messages is
that of the same processes with gradients left unsynchronized and Muon's results not gathered, measured in turns with
whole steps; the rest of a whole step is the time in communication that computing does not hide. Words that are not
flags of this script are train.py's.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, facts

sys.path.insert(0, str(ROOT))
SHAPE = ["--ngram=1", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=24",
         "--vocab_size=65", "--device=cpu", "--dtype=float32", "--compile=False"]


def worker(argv, steps, rounds):
    """One of the processes. Rank 0 writes a JSON line: the seconds of a step, whole and without messages."""
    import torch
    import torch.distributed as dist

    import train

    torch.set_num_threads(1)
    s = train.override(train.Settings(), argv)
    world = train.join_world(s)
    meta = dict(tokens=dict(train=10**6, val=10**5), bytes=dict(train=10**6, val=10**5), tokenizer={}, corpus="")
    run = train.Run(s, meta, world)
    synchronized = run.model
    if world.size > 1:
        synchronized = torch.nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    generator = torch.Generator().manual_seed(world.rank)
    train.training_batch = lambda split, s, first, count, device: torch.randint(
        s.vocab_size, (2, count, s.block_size), generator=generator).to(device)
    gather, synchronizing = dist.all_gather, train.synchronizing
    seconds = {True: [], False: []}
    for _ in range(rounds):
        for messages in (True, False):
            dist.all_gather = gather if messages else lambda parts, own: [part.copy_(own) for part in parts]
            train.synchronizing = synchronizing if messages else silent
            for step in range(-2, steps):  # two to warm up
                world.total(torch.zeros(1))  # begin together
                began = time.perf_counter()
                train.accumulate_gradients(synchronized, run.scaler, None, s, world, step * s.batch_size)
                train.update(run.model, run.optimizers, run.scaler, 1e-6, 1.0)
                if step >= 0:
                    seconds[messages].append(time.perf_counter() - began)
    world.say(json.dumps([statistics.median(seconds[True]), statistics.median(seconds[False]),
                          s.batch_size * s.gradient_accumulation_steps * s.block_size]))
    world.leave()


@contextlib.contextmanager
def silent(model, now):
    """train.synchronizing with no process ever waiting for another."""
    with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
        yield


def measure(processes, argv, steps, rounds):
    """The worker's three numbers, of so many processes."""
    words = [__file__, "--worker", f"--steps={steps}", f"--rounds={rounds}", *argv]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8",
                              env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(processes, argv, n, steps, rounds):
    """Rows (processes, tokens/s, efficiency, communication): medians of n runs in turns, with the least and most."""
    found = {count: [] for count in processes}
    for _ in range(n):
        for count in processes:
            found[count].append(measure(count, argv, steps, rounds))
    rows, alone = [], None
    for count in processes:
        speeds = sorted(tokens / whole for whole, _, tokens in found[count])
        hidden = statistics.median((whole - silent) / whole for whole, silent, _ in found[count])
        alone = alone or statistics.median(speeds) / count
        rows.append(dict(processes=count, tokens_per_second=statistics.median(speeds), least=speeds[0],
                         most=speeds[-1], efficiency=statistics.median(speeds) / count / alone,
                         communication=max(0.0, hidden)))
    return rows


def on_paper(mfu, milliseconds):
    """Rows for the 124M model of config/train_gpt2.py: what its messages take, and how much the backward pass hides."""
    import torch

    import train

    s = train.override(train.Settings(vocab_size=50257), [str(ROOT / "config" / "train_gpt2.py")])
    with torch.device("meta"):
        model = train.GPT(s)
    batch = s.batch_size * s.gradient_accumulation_steps * s.block_size
    gradients = 4 * sum(p.numel() for p in model.parameters())  # bytes, float32
    updates = 2 * sum(p.numel() for p in model.blocks.parameters())  # Muon's, bfloat16
    alone = milliseconds / 1e3 if milliseconds else model.flops_per_token() * batch / (mfu * 989e12)
    rows = []
    # GB/s that the slowest link of a ring carries: NVLink's 450 each way less a tenth, a network card for the machine
    for name, gpus, machines, speed in (("1 GPU", 1, 1, 1), ("8 GPUs, NVLink", 8, 1, 400),
                                        ("8 x 8, 400 Gb/s", 64, 8, 50), ("8 x 8, 100 Gb/s", 64, 8, 12.5)):
        ring = (machines - 1) / machines if machines > 1 else (gpus - 1) / gpus
        reduce, gather = 2 * ring * gradients / (speed * 1e9), ring * updates / (speed * 1e9)
        compute = alone / gpus
        step = compute + max(0.0, reduce - compute * 2 / 3) + gather  # the backward pass, two thirds, hides the first
        rows.append(dict(name=name, compute_ms=1e3 * compute, gradients_ms=1e3 * reduce, muon_ms=1e3 * gather,
                         step_ms=1e3 * step, efficiency=alone / gpus / step,
                         tokens_per_second=batch / step))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="how many, as 1,2,4")
    parser.add_argument("--n", type=int, default=3, help="runs of each, alternating (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed in a turn (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns in a run (default 3)")
    parser.add_argument("--paper", action="store_true", help="measure nothing")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of an H100's peak that a step reaches alone: an "
                        "assumption (default 0.4)")
    parser.add_argument("--ms", type=float, default=0, help="or its time on one GPU, measured, in milliseconds")
    parser.add_argument("--json", default="bench-scaling.json", help="where the figures go as JSON too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments, argv = parser.parse_known_args()
    argv = [*SHAPE, *(str(Path(word).resolve()) if word.endswith(".py") else word for word in argv)]
    if arguments.worker:
        return worker(argv, arguments.steps, arguments.rounds)
    figures = facts(n=arguments.n, words=argv) | dict(on_paper=on_paper(arguments.mfu, arguments.ms))
    if not arguments.paper:
        counts = [int(word) for word in arguments.processes.split(",")]
        figures["measured"] = measured(counts, argv, arguments.n, arguments.steps, arguments.rounds)
        print(f"| processes, a thread each, {os.cpu_count()} cores | tokens/s (least to most) | efficiency | "
              "time in communication |\n|---|---|---|---|")
        for row in figures["measured"]:
            print(f"| {row['processes']} | {row['tokens_per_second']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f}) "
                  f"| {row['efficiency']:.0%} | {row['communication']:.0%} |")
        print()
    print("| on paper | computing, ms | gradients, ms | Muon's, ms | step, ms | efficiency | tokens/s |")
    print("|---" * 7 + "|")
    for row in figures["on_paper"]:
        print(f"| {row['name']} | {row['compute_ms']:.0f} | {row['gradients_ms']:.1f} | {row['muon_ms']:.1f} | "
              f"{row['step_ms']:.0f} | {row['efficiency']:.0%} | {row['tokens_per_second'] / 1e6:.2f} million |")
    Path(arguments.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
