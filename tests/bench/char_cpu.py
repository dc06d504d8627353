"""Seconds from launch to a validation loss, and the loss after nanoGPT's time: train.py and nanoGPT on one CPU.

    python tests/bench/char_cpu.py --nanogpt=../nanoGPT                 tiny Shakespeare, downloaded by prepare.py
    python tests/bench/char_cpu.py --nanogpt=../nanoGPT --text=input.txt --sprint=config/my_short_run.py --n=5

nanoGPT runs the CPU command of its README in a copy of its checkout, on data that its own script prepared from the same
text. Its time is measured from launch to each "iter" line, imports included, without hooks. Its validation losses come
from another run, which is not timed: same seed and steps, and a copy of the weights every --resolution steps, which
train.evaluate evaluates on the whole validation split. If the estimates that the two runs print differ, a note says so.
So nanoGPT's time does not include whole-split evaluations, only those on random batches that its command asks for, and
the time at which it passes the target is interpolated between two copies.

The time of train.py includes everything from launch: it has passed the target when the first evaluation of the whole
split below it is logged. Three kinds of run alternate, n times: nanoGPT; --sprint with an evaluation every
--eval_interval steps, stopped once it has passed; and --config unchanged, whose last validation loss before the end of
nanoGPT's run of the same turn is compared with nanoGPT's last. Models are evaluated in windows of their own context.
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

from common import (
    ROOT,
    config_file,
    curve_of,
    fact_line,
    facts,
    launch,
    log_of,
    nanogpt_model,
    prepared,
    run_train,
    size_of,
    spread,
    summary,
    table,
    write,
)

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


def their_estimates(lines):
    """The lines in which nanoGPT prints its estimates of the losses."""
    return [line for _, line in lines if re.match(r"step \d+:", line)]


def passing(curve, target, interpolate=False):
    """(seconds, step) of the first point of a curve below the target, or interpolated; None if there is none.

    >>> passing([dict(step=0, seconds=0, val_loss=3), dict(step=10, seconds=4, val_loss=1)], 2, interpolate=True)
    (2.0, 5.0)
    """
    before = None
    for point in curve:
        if point["val_loss"] < target:
            if not interpolate or before is None:
                return point["seconds"], point["step"]
            share = (before["val_loss"] - target) / (before["val_loss"] - point["val_loss"])
            return tuple(before[key] + share * (point[key] - before[key]) for key in ("seconds", "step"))
        before = point
    return None


def at(curve, seconds):
    """The last point of a curve up to then, or None."""
    return next((point for point in reversed(curve) if point["seconds"] <= seconds), None)


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


class Bench:
    """The folders that both sides run in."""

    def __init__(self, folder, args):
        self.folder, self.args, self.theirs = folder, args, folder / "nanogpt"
        self.meta = prepared(folder, args.text)
        data = self.theirs / "data" / "shakespeare_char"
        shutil.copytree(args.nanogpt, self.theirs, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*"))
        (data / "input.txt").write_bytes(self.text().encode("utf-8"))
        launch(["prepare.py"], data)
        sizes = {name: (data / f"{name}.bin").stat().st_size // 2 for name in ("train", "val")}
        if sizes != self.meta["tokens"]:
            sys.exit(f"nanoGPT splits the text into {sizes}, prepare.py into {self.meta['tokens']}: nothing to compare")

    def text(self):
        """The text, from the tokens that prepare.py made of it."""
        import numpy as np

        folder, chars = self.folder / "data" / "char", self.meta["tokenizer"]["chars"]
        ids = (np.fromfile(folder / f"{name}.bin", self.meta["dtype"]) for name in ("train", "val"))
        return "".join(chars[i] for part in ids for i in part)

    def nanogpt(self):
        """One timed run of nanoGPT. Returns its lines and its seconds."""
        return launch([*COMMAND, *self.args.their_flags.split()], self.theirs)

    def nanogpt_losses(self):
        """One run of nanoGPT that is not timed. Returns its lines, its losses by step and its parameters."""
        copies = self.folder / "copies"
        copies.mkdir()
        lines, _ = launch(["-c", COPYING, copies, self.args.resolution, *COMMAND, *self.args.their_flags.split()],
                          self.theirs)
        return lines, *evaluated(copies, self.theirs, self.folder / "data" / "char", self.meta["vocab_size"])

    def ours(self, argv, target=None):
        """One run of train.py, stopped when it passes a target. Returns the curve of its evaluations."""
        out = Path(tempfile.mkdtemp(prefix="out-", dir=self.folder))

        def passed():
            return any(r["val_loss"] is not None and r["val_loss"] < target for r in log_of(out)[-1:])

        records = run_train(argv, self.folder, out, target and passed)
        return curve_of(records, size_of(argv, self.meta["vocab_size"])[1])


def measured(bench, args, config, sprint):
    """All runs, alternating. Returns the results of both sides."""
    losses_lines, losses, parameters = bench.nanogpt_losses()
    said = next(match for _, line in losses_lines if (match := re.search(r"per iteration will be: ([\d,]+)", line)))
    tokens = int(said[1].replace(",", ""))
    theirs = dict(side="nanoGPT", parameters=parameters, curves=[], seconds=[], passed=[], end=[])
    ours = dict(side="train.py", parameters=size_of(config, bench.meta["vocab_size"])[2], curves=[], sprints=[],
                passed=[], end=[], sprint_parameters=size_of(sprint, bench.meta["vocab_size"])[2])
    same = True
    for turn in range(args.n):
        lines, wall = bench.nanogpt()
        same = same and their_estimates(lines) == their_estimates(losses_lines)
        seconds = their_seconds(lines)
        curve = [dict(step=step, seconds=seconds[step], tokens=step * tokens, val_loss=loss)
                 for step, loss in losses.items()]
        theirs["curves"].append(curve)
        theirs["seconds"].append(wall)
        theirs["passed"].append(passing(curve, args.target, interpolate=True))
        theirs["end"].append(curve[-1]["val_loss"])
        ours["sprints"].append(bench.ours(sprint, args.target))
        ours["passed"].append(passing(ours["sprints"][-1], args.target))
        ours["curves"].append(bench.ours(config))
        point = at(ours["curves"][-1], wall)
        ours["end"].append(point and point["val_loss"])
        print(f"turn {turn + 1} of {args.n}: nanoGPT {wall:.1f} s", file=sys.stderr, flush=True)
    return theirs, ours, same


def shown(theirs, ours, target):
    """The rows of the table."""
    rows = [["", "parameters", f"seconds to {target:g}", "at step", "ratio", "val loss at nanoGPT's end"]]
    end = statistics.median(theirs["seconds"])
    for side in (theirs, ours):
        passed = [point for point in side["passed"] if point]
        cells = [spread([point[0] for point in passed]), spread([point[1] for point in passed], 0)]
        if not passed:
            cells = ["never", "-"]
        elif len(passed) < len(side["passed"]):
            cells[0] += f", {len(passed)} of {len(side['passed'])} runs"
        ratio = "-"
        if passed and side is ours:
            mine = statistics.median(point[0] for point in passed)
            other = [point[0] for point in theirs["passed"] if point]
            # a run that never passed would take longer than it did
            ratio = f"{statistics.median(other) / mine:.2f} x" if other else f"more than {end / mine:.2f} x"
        count = f"{side['parameters']:,}"
        if side.get("sprint_parameters", side["parameters"]) != side["parameters"]:
            count = f"{side['sprint_parameters']:,} then {count}"
        rows.append([side["side"], count, *cells, ratio, f"{spread(side['end'], 4)}"])
    rows[0][-1] += f" ({end:.1f} s)"
    return rows


def picture(theirs, ours, target, known, path):
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

    million = [f"{side['parameters'] / 1e6:.1f} million parameters" for side in (theirs, ours)]
    draw(theirs["curves"], color="#D55E00", linestyle="--", marker="o", markersize=4, markevery=5,
         label=f"nanoGPT, the CPU command of its README, {million[0]}")
    draw(ours["curves"], color="#0072B2", marker="s", markersize=5, label=f"train.py {ours['config']}, {million[1]}")
    draw(ours["sprints"], color="#009E73", marker="^", markersize=8, linestyle="none",
         label=f"train.py {ours['sprint']}, {ours['sprint_parameters'] / 1e6:.1f} million")
    axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"{target:g}", (0, target), (-4, 0), textcoords="offset points", ha="right", va="center",
                  color="grey", annotation_clip=False)
    axes.set(xlabel=f"seconds since launch, on {known['cores']} CPU cores", xlim=(0, None),
             ylabel="validation loss, nats a character")
    axes.set_ylim(top=min(2.6, axes.get_ylim()[1]))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


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
    sys.path.insert(0, str(ROOT))
    known = facts(n=args.n)
    import torch

    extra = ["--device=cpu", *args.our_flags.split()]
    config = [config_file(args.config), *extra]
    sprint = [config_file(args.sprint or args.config), f"--eval_interval={args.eval_interval}", *extra]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args)
        known |= dict(threads=torch.get_num_threads(), corpus=bench.meta["corpus"])
        theirs, ours, same = measured(bench, args, config, sprint)
    print(fact_line(known))
    print(table(shown(theirs, ours, args.target)))
    ours |= dict(config=args.config, sprint=args.sprint or args.config)
    if args.picture:
        picture(theirs, ours, args.target, known, args.picture)
    if not same:
        print("note: nanoGPT's timed runs printed other losses than the run whose weights were evaluated")
    for side in (theirs, ours):
        points = [point for point in side["passed"] if point]
        side |= dict(seconds_to_target=summary([point[0] for point in points]),
                     step=summary([point[1] for point in points]), loss_at_nanogpts_end=summary(side["end"]))
    write(args.json, dict(facts=known, target=args.target, their_command=[*COMMAND, *args.their_flags.split()],
                          our_config=args.config, our_sprint=args.sprint or args.config, same_losses=same,
                          eval_interval=args.eval_interval, sides=[theirs, ours]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
