"""Seconds from launch to a validation loss, and the loss after nanoGPT's time: train.py and nanoGPT on one CPU.

    python tests/bench/char_cpu.py --nanogpt=../nanoGPT                 tiny Shakespeare, downloaded by prepare.py
    python tests/bench/char_cpu.py --nanogpt=../nanoGPT --text=input.txt --sprint=config/my_short_run.py --n=5

nanoGPT runs the CPU command of its README in a copy of its checkout, on data that its own script prepared from the same
text. Its time is measured from launch to each "iter" line, imports included. Its validation losses come from another,
untimed run with the same seed, which copies the weights every --resolution steps; train.evaluate evaluates them on the
whole validation split, so that nanoGPT's time has no such evaluations. If the losses that the two runs print differ, a
note says so. The time of train.py is from launch to the first logged evaluation below the target, all included.

Three kinds of run alternate, n times: nanoGPT; --sprint with an evaluation every --eval_interval steps, stopped at the
target; and --config unchanged, whose last validation loss before the end of nanoGPT's run is compared with nanoGPT's.
"""
import argparse
import contextlib
import io
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from common import ROOT, config_file, facts, launch, log_of, nanogpt_model, prepared, report, run_train, spread

COMMAND = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
           "--dropout=0.0").split()
# Runs nanoGPT's train.py unchanged and saves the weights to a folder every so many updates and at the end.
COPYING = """
import dataclasses, runpy, sys, torch, model
from torch.optim.optimizer import register_optimizer_step_post_hook
folder, every, *sys.argv = sys.argv[1:]
made, updates, init = [], 0, model.GPT.__init__

def remember(self, *args, **kwargs):
    init(self, *args, **kwargs)
    made.append(self)

def copy():
    torch.save(dict(args=dataclasses.asdict(made[0].config), model=made[0].state_dict()), f"{folder}/{updates}.pt")

def count(*_):
    global updates
    updates += 1
    if updates % int(every) == 0:
        copy()

model.GPT.__init__ = remember
register_optimizer_step_post_hook(count)
runpy.run_path(sys.argv[0], run_name="__main__")
copy()
"""


def their_seconds(lines):
    """{updates done: seconds since launch} from nanoGPT's lines: "iter 0" is the first update."""
    found = ((seconds, re.match(r"iter (\d+):", line)) for seconds, line in lines)
    return {int(match[1]) + 1: seconds for seconds, match in found if match}


def passing(curve, target, interpolate=False):
    """Seconds at the first point of a curve below the target, or interpolated; None if there is none.

    >>> passing([dict(seconds=0, val_loss=3), dict(seconds=4, val_loss=1)], 2, interpolate=True)
    2.0
    """
    before = None
    for point in curve:
        if point["val_loss"] < target:
            if not interpolate or before is None:
                return point["seconds"]
            part = (before["val_loss"] - target) / (before["val_loss"] - point["val_loss"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    return None


def evaluated(folder, checkout, data, vocab):
    """{updates: loss over the whole validation split} of the copies in a folder, and their number of parameters."""
    import train

    module, found = nanogpt_model(checkout), {}
    s = train.Settings(dataset=str(data), vocab_size=vocab, batch_size=64)
    data, meta = train.read_meta(s.dataset)
    split = train.TokenDataset(data, "val", meta)
    for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem)):
        copy = train.torch.load(path, weights_only=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
            model = module.GPT(module.GPTConfig(**copy["args"]))
        model.load_state_dict(copy["model"])
        s.block_size = copy["args"]["block_size"]
        found[int(path.stem)] = train.evaluate(model, split, s, train.World())
    return found, sum(p.numel() for p in model.parameters())


def copy_nanogpt(folder, checkout, meta):
    """Copy a checkout of nanoGPT and prepare its data from the text in folder/data/char. Returns the copy."""
    import numpy as np

    copy, chars = folder / "nanogpt", meta["tokenizer"]["chars"]
    data = copy / "data" / "shakespeare_char"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*"))
    ids = [np.fromfile(folder / "data" / "char" / f"{name}.bin", meta["dtype"]) for name in ("train", "val")]
    (data / "input.txt").write_bytes("".join(chars[i] for i in np.concatenate(ids)).encode())
    launch(["prepare.py"], data)
    sizes = {name: (data / f"{name}.bin").stat().st_size // 2 for name in ("train", "val")}
    if sizes != meta["tokens"]:
        sys.exit(f"nanoGPT splits the text into {sizes}, prepare.py into {meta['tokens']}: nothing to compare")
    return copy


def run_ours(argv, folder, target=None):
    """One run of train.py, stopped when it passes a target. Returns the records of its evaluations."""
    out = Path(tempfile.mkdtemp(prefix="out-", dir=folder))

    def passed():
        return any(r["val_loss"] is not None and r["val_loss"] < target for r in log_of(out)[-1:])

    return [r for r in run_train(argv, folder, out, target and passed) if r["val_loss"] is not None]


def measured(folder, args, meta, theirs, config, sprint):
    """All runs, alternating. Returns {side: lists of curves, seconds and losses} and whether nanoGPT's losses agree."""
    copies = folder / "copies"
    copies.mkdir()
    command = [*COMMAND, *args.their_flags.split()]
    untimed, _ = launch(["-c", COPYING, copies, args.resolution, *command], theirs)
    losses, parameters = evaluated(copies, theirs, folder / "data" / "char", meta["vocab_size"])
    nanogpt = dict(parameters=parameters, curves=[], seconds=[], passed=[], end=[])
    ours, same = dict(curves=[], sprints=[], passed=[], end=[]), True
    estimates = [line for _, line in untimed if line.startswith("step ")]
    for turn in range(args.n):
        lines, wall = launch(command, theirs)
        same = same and estimates == [line for _, line in lines if line.startswith("step ")]
        seconds = their_seconds(lines)
        nanogpt["curves"].append([dict(seconds=seconds[step], val_loss=loss) for step, loss in losses.items()])
        nanogpt["seconds"].append(wall)
        nanogpt["passed"].append(passing(nanogpt["curves"][-1], args.target, interpolate=True))
        nanogpt["end"].append(nanogpt["curves"][-1][-1]["val_loss"])
        ours["sprints"].append(run_ours(sprint, folder, args.target))
        ours["passed"].append(passing(ours["sprints"][-1], args.target))
        ours["curves"].append(run_ours(config, folder))
        ours["end"].append(next((r["val_loss"] for r in reversed(ours["curves"][-1]) if r["seconds"] <= wall), None))
        print(f"turn {turn + 1} of {args.n}: nanoGPT {wall:.1f} s", file=sys.stderr, flush=True)
    return nanogpt, ours, same


def picture(nanogpt, ours, args, cores):
    """Plot the curve of each side whose end is the median, over seconds since launch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()

    def draw(curves, **style):
        curve = sorted((c for c in curves if c), key=lambda curve: curve[-1]["seconds"])[len(curves) // 2]
        axes.plot([p["seconds"] for p in curve], [p["val_loss"] for p in curve], **style)
        last = curve[-1]
        axes.annotate(f"{last['val_loss']:.2f}", (last["seconds"], last["val_loss"]), (0, 7), ha="center",
                      textcoords="offset points", color=style["color"])

    draw(nanogpt["curves"], color="#D55E00", linestyle="--", marker="o", markersize=4, markevery=5,
         label=f"nanoGPT, the CPU command of its README, {nanogpt['parameters'] / 1e6:.1f} million parameters")
    draw(ours["curves"], color="#0072B2", marker="s", markersize=5, label=f"train.py {args.config}")
    draw(ours["sprints"], color="#009E73", marker="^", markersize=8, linestyle="none", label=f"train.py {args.sprint}")
    axes.axhline(args.target, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"{args.target:g}", (0, args.target), (-4, 0), textcoords="offset points", ha="right", va="center",
                  color="grey", annotation_clip=False)
    axes.set(xlabel=f"seconds since launch, on {cores} CPU cores", xlim=(0, None),
             ylabel="validation loss, nats per character")
    axes.set_ylim(top=min(2.6, axes.get_ylim()[1]))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(args.picture, dpi=120)


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, type=Path, help="a checkout of nanoGPT; it is copied, not changed")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: prepare.py's)")
    parser.add_argument("--config", default="config/train_char_cpu.py",
                        help="of train.py, for the loss at nanoGPT's end (default: %(default)s)")
    parser.add_argument("--sprint", help="of train.py, for the time to the target (default: that of --config)")
    parser.add_argument("--eval_interval", type=int, default=50, help="of the sprint, in steps (default: %(default)s)")
    parser.add_argument("--target", type=float, default=1.88, help="validation loss in nats (default: %(default)s)")
    parser.add_argument("--n", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=50,
                        help="steps between two copies of nanoGPT's weights (default: %(default)s)")
    parser.add_argument("--their_flags", default="", help="more arguments of nanoGPT, for a short trial")
    parser.add_argument("--our_flags", default="", help="more arguments of train.py, likewise")
    parser.add_argument("--picture", help="plot the curves to this PNG file; needs matplotlib")
    parser.add_argument("--json", default="bench-char-cpu.json", help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    args.sprint = args.sprint or args.config
    sys.path.insert(0, str(ROOT))
    known = facts(n=args.n)
    extra = ["--device=cpu", *args.our_flags.split()]
    sprint = [config_file(args.sprint), f"--eval_interval={args.eval_interval}", *extra]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        meta = prepared(folder, args.text)
        theirs = copy_nanogpt(folder, args.nanogpt, meta)
        nanogpt, ours, same = measured(folder, args, meta, theirs, [config_file(args.config), *extra], sprint)
    end = statistics.median(nanogpt["seconds"])
    rows = [["", f"seconds to {args.target:g}", f"val loss at nanoGPT's end, {end:.1f} s"]]
    for side, found in (("nanoGPT", nanogpt), ("train.py", ours)):
        rows.append([side, spread(found["passed"]), spread(found["end"], 4)])
    if args.picture:
        picture(nanogpt, ours, args, known["cores"])
    report(args.json, known, rows, dict(nanogpt=nanogpt, ours=ours, same_losses=same))
    if not same:
        print("note: nanoGPT's timed runs printed other losses than the run whose weights were evaluated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
