"""Speed and communication of several processes on CPUs.

    python tests/bench/scaling.py                      1, 2 and 4 processes with a thread each, three runs
    python tests/bench/scaling.py --processes=1,2 --n=1 config/train_char.py --batch_size=8

The global batch stays the same, so this is strong scaling. Steps alternate with steps of the same processes that
neither synchronize gradients nor gather Muon's updates; the difference is the time in communication that computation
does not hide. Arguments that are not flags of this script are those of train.py.
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

from common import ROOT, facts, write

sys.path.insert(0, str(ROOT))
SHAPE = ["--ngram=1", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=24",
         "--vocab_size=65", "--device=cpu", "--dtype=float32", "--compile=False"]


def worker(argv, steps, rounds):
    """One of the processes. Rank 0 prints a JSON line: seconds of a step, seconds without messages, tokens."""
    import torch
    import torch.distributed as dist

    import train

    torch.set_num_threads(1)
    s = train.Settings(**train.parse_args(train.Settings, argv)[0])
    world = train.init_distributed(train.get_device(s.device))
    raw_model, optimizers, scaler, _ = train.init_run(s, world, {})
    model = raw_model
    if world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(raw_model, gradient_as_bucket_view=True)
    generator = torch.Generator().manual_seed(world.rank)
    train.get_batch = lambda dataset, s, first, count, device: torch.randint(
        s.vocab_size, (2, count, s.block_size), generator=generator).to(device)
    gather, seconds = dist.all_gather, {True: [], False: []}
    for _ in range(rounds):
        for messages in (True, False):
            dist.all_gather = gather if messages else lambda parts, own: [part.copy_(own) for part in parts]
            silent = world.size > 1 and not messages
            for step in range(-2, steps):  # two to warm up
                world.all_reduce(torch.zeros(1))  # start together
                began = time.perf_counter()
                with model.no_sync() if silent else contextlib.nullcontext():
                    train.forward_backward(model, scaler, None, s, world, step * s.batch_size)
                train.optimizer_step(raw_model, optimizers, scaler, 1e-6, 1.0)
                if step >= 0:
                    seconds[messages].append(time.perf_counter() - began)
    train.print0(json.dumps([statistics.median(seconds[True]), statistics.median(seconds[False]),
                             s.batch_size * s.gradient_accumulation_steps * s.block_size]))
    dist.destroy_process_group()


def measure(processes, argv, steps, rounds):
    """The three numbers that the worker prints, of so many processes."""
    words = [__file__, "--worker", f"--steps={steps}", f"--rounds={rounds}", *argv]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8",
                              env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(processes, argv, n, steps, rounds):
    """Rows (processes, tokens/s, efficiency, communication): medians of n runs, alternating, with their range."""
    found = {count: [] for count in processes}
    for _ in range(n):
        for count in processes:
            found[count].append(measure(count, argv, steps, rounds))
    rows, alone = [], None
    for count in processes:
        speeds = sorted(tokens / whole for whole, _, tokens in found[count])
        messages = statistics.median((whole - silent) / whole for whole, silent, _ in found[count])
        alone = alone or statistics.median(speeds) / count
        rows.append(dict(processes=count, tokens_per_second=statistics.median(speeds), least=speeds[0],
                         most=speeds[-1], efficiency=statistics.median(speeds) / count / alone,
                         communication=max(0.0, messages)))
    return rows


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a round (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in a run (default: 3)")
    parser.add_argument("--json", default="bench-scaling.json", help="file to write (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments, argv = parser.parse_known_args(argv)
    argv = [*SHAPE, *(str(Path(word).resolve()) if word.endswith(".py") else word for word in argv)]
    if arguments.worker:
        worker(argv, arguments.steps, arguments.rounds)
        return 0
    known, counts = facts(n=arguments.n, words=argv), [int(word) for word in arguments.processes.split(",")]
    rows = measured(counts, argv, arguments.n, arguments.steps, arguments.rounds)
    print(f"| processes, a thread each, {known['cores']} cores | tokens/s (range) | efficiency | communication |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row['processes']} | {row['tokens_per_second']:,.0f} ({row['least']:,.0f} to {row['most']:,.0f}) "
              f"| {row['efficiency']:.0%} | {row['communication']:.0%} |")
    write(arguments.json, known | dict(measured=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
