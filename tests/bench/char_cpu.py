"""Seconds from launch to a validation loss, and the loss after nanoGPT's time: train.py and nanoGPT on one CPU.

    python tests/bench/char_cpu.py --nanogpt=../nanoGPT                 tiny Shakespeare, downloaded by prepare.py
    python tests/bench/char_cpu.py --nanogpt=../nanoGPT --sprint=config/train_char_sprint.py --eval_interval=8

nanoGPT runs the CPU command of its README in a copy of its checkout, on data that its own script prepared from the same
text. Its time is from launch to each "iter" line, imports included; its losses are those of another, untimed run with
the same seed, whose weights are copied every --resolution steps and evaluated on the whole validation split by
train.evaluate. The time of train.py is from launch to the first logged evaluation below the target, all included;
"exit" is the time from launch to the end of the process.

Three kinds of run alternate, n times: nanoGPT; --sprint with an evaluation every --eval_interval steps, stopped at the
target; and --config unchanged, whose last validation loss before the end of nanoGPT's run is compared with nanoGPT's.
"""
import re
import shutil
import sys
import tempfile
from pathlib import Path

from common import ROOT, facts, launch, nanogpt_model, parser, prepared, report, run_train

COMMAND = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
           "--dropout=0.0").split()
# Runs nanoGPT's train.py unchanged and saves the weights to a folder every so many updates.
COPYING = """
import runpy, sys, torch, model
folder, every, *sys.argv = sys.argv[1:]

class GPT(model.GPT):
    updates = 0

    def configure_optimizers(self, *args):
        optimizer = super().configure_optimizers(*args)
        optimizer.register_step_post_hook(self.copy)
        return optimizer

    def copy(self, *_):
        self.updates += 1
        if self.updates % int(every) == 0:
            torch.save(dict(args=vars(self.config), model=self.state_dict()), f"{folder}/{self.updates}.pt")

model.GPT = GPT
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def passing(curve, target, interpolate=False):
    """Seconds at the first point of a curve below the target, or interpolated; None if there is none.

    >>> passing([dict(seconds=0, val_loss=3), dict(seconds=4, val_loss=1)], 2, interpolate=True)
    2.0
    """
    for before, point in zip([None, *curve], curve, strict=False):
        if point["val_loss"] < target:
            if not interpolate or before is None:
                return point["seconds"]
            part = (before["val_loss"] - target) / (before["val_loss"] - point["val_loss"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
    return None


def evaluated(folder, checkout, data, vocab):
    """{updates: loss over the whole validation split} of the copies in a folder."""
    import train
    s = train.Settings(dataset=str(data), vocab_size=vocab, batch_size=64, ngram=1)
    data, meta = train.read_meta(s.dataset)
    split, model, found = train.TokenDataset(data, "val", meta), None, {}
    for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem)):
        copy = train.torch.load(path, weights_only=True)
        model = model or nanogpt_model(checkout, **copy["args"])
        model.load_state_dict(copy["model"])
        s.block_size = model.config.block_size
        found[int(path.stem)] = train.evaluate(model, split, s, train.World())
    return found


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
    assert sizes == meta["tokens"], f"nanoGPT splits the text into {sizes}, prepare.py into {meta['tokens']}"
    return copy


def measured(folder, args, meta, theirs):
    """All runs, alternating: {side: [figures]}, with curves of validation losses over seconds."""
    copies, found, seconds_to = folder / "copies", {"nanoGPT": [], "ours": []}, f"seconds to {args.target:g}"
    copies.mkdir()
    launch(["-c", COPYING, copies, args.resolution, *COMMAND], theirs)
    losses = evaluated(copies, theirs, folder / "data" / "char", meta["vocab_size"])

    def ours(config, *flags, **options):
        out = Path(tempfile.mkdtemp(prefix="out-", dir=folder))
        log = run_train([ROOT / config, "--device=cpu", *args.our_flags.split(), *flags], folder, out, **options)
        return [record for record in log if record["val_loss"] is not None]

    for _ in range(args.n):
        run = launch(COMMAND, theirs)
        matches = ((at, re.match(r"iter (\d+):", line)) for at, line in run.lines)
        seconds = {int(match[1]) + 1: at for at, match in matches if match}  # "iter 0" is the first update
        curve = [dict(seconds=seconds[step], val_loss=loss) for step, loss in losses.items()]
        found["nanoGPT"].append({seconds_to: passing(curve, args.target, interpolate=True), "exit": run.seconds,
                                 "loss at nanoGPT's end": curve[-1]["val_loss"], "curve": curve})
        sprint = ours(args.sprint or args.config, f"--eval_interval={args.eval_interval}", target=args.target)
        curve = ours(args.config)
        end = next((r["val_loss"] for r in reversed(curve) if r["seconds"] <= run.seconds), None)
        found["ours"].append({seconds_to: passing(sprint, args.target), "exit": sprint[-1]["exit"],
                              "loss at nanoGPT's end": end, "curve": curve, "sprint": sprint})
    return found


def picture(found, args, cores):
    """Plot the curve of each side whose end is the median, over seconds since launch."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for side, key, label, color, marker, style in (
            ("nanoGPT", "curve", "nanoGPT, the CPU command of its README, 0.8M parameters", "#D55E00", ".", "--"),
            ("ours", "curve", f"train.py {args.config}", "#0072B2", "s", "-"),
            ("ours", "sprint", f"train.py {args.sprint or args.config}", "#009E73", "^", "none")):
        curve = sorted((run[key] for run in found[side]), key=lambda curve: curve[-1]["seconds"])[args.n // 2]
        x, y = [point["seconds"] for point in curve], [point["val_loss"] for point in curve]
        axes.plot(x, y, label=label, color=color, marker=marker, linestyle=style)
        axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), (0, 7), ha="center", textcoords="offset points", color=color)
    axes.axhline(args.target, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"{args.target:g}", (0, args.target), (-4, 0), textcoords="offset points", ha="right", va="center",
                  color="grey", annotation_clip=False)
    axes.set(xlabel=f"seconds since launch, on {cores} CPU cores", xlim=(0, None), ylim=(None, 2.6),
             ylabel="validation loss, nats per character")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(args.picture, dpi=120)


def main(argv=None):
    """The command line."""
    options = parser(__doc__, "char-cpu")
    options.add_argument("--nanogpt", required=True, type=Path, help="a checkout of nanoGPT; it is copied, not changed")
    options.add_argument("--config", default="config/train_char_cpu.py", help="for the loss at nanoGPT's end")
    options.add_argument("--sprint", help="for the time to the target; without it --config")
    options.add_argument("--eval_interval", type=int, default=50, help="of the sprint, in steps")
    options.add_argument("--target", type=float, default=1.88, help="validation loss in nats")
    options.add_argument("--resolution", type=int, default=50, help="steps between two copies of nanoGPT's weights")
    options.add_argument("--our_flags", default="", help="more arguments of train.py, for a short trial")
    options.add_argument("--picture", help="plot the curves to this PNG file; needs matplotlib")
    args = options.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    known = facts(n=args.n)
    with tempfile.TemporaryDirectory() as name:
        meta = prepared(Path(name), args.text)
        found = measured(Path(name), args, meta, copy_nanogpt(Path(name), args.nanogpt, meta))
    if args.picture:
        picture(found, args, known["cores"])
    report(args.json, known, found)


if __name__ == "__main__":
    main()
