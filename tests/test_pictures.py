"""sample.py's pictures show what the log and the model say; --every_step has one line for each checkpoint."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, ROOT, random_model
from test_sample import CHAR_SPEC, folder, save  # noqa: F401  a fixture

import prepare
import sample
import train

pytestmark = pytest.mark.usefixtures("torch_state")
IDS = [5, 9, 2, 7, 7, 0]


@pytest.fixture(autouse=True)
def no_warnings():
    """A glyph that the font lacks, and whatever else matplotlib has to say, would land on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of train.py, whose open data the process closes
        yield


@pytest.fixture
def command(folder, capsys):  # noqa: F811
    """Runs sample.py here with these flags and returns its (stdout, stderr)."""
    def run(*argv, status=0):
        capsys.readouterr()
        found = sample.main([*argv, "--device=cpu", "--dtype=float32"])
        out, err = capsys.readouterr()
        assert found == status, err
        assert not status or err.startswith("sample.py: ") and err.count("\n") == 1, err
        return out, err
    return run


def log(path, lines, tokens_per_step=None):
    """A run's folder with these lines, dicts or text, in its log.jsonl. Returns its name."""
    path.mkdir(exist_ok=True)
    if tokens_per_step:
        lines = [line | dict(tokens=line["step"] * tokens_per_step) for line in lines]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def run_of(final=1.5, steps=100):
    """The log lines of a run."""
    return [dict(step=step, loss=final + 10 / step, val_loss=final + 12 / step if step % 20 == 0 else None,
                 bits_per_byte=None, lr=1e-3 * (1 - step / steps), grad_norm=1.0, tokens_per_second=9, elapsed=step / 9)
            for step in range(10, steps + 1, 10)]


def is_picture(path):
    """Whether matplotlib reads the file as a picture of a reasonable size that is not of one colour."""
    from matplotlib import image
    pixels = image.imread(path)
    return min(pixels.shape[:2]) > 200 and max(pixels.shape[:2]) < 8000 and pixels.std() > 0.02


def texts(axes):
    """What is written in an axes, its annotations included."""
    return [text.get_text() for text in axes.texts]


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def test_the_curves_are_the_logs(tmp_path):
    lines = run_of()
    figure = sample.loss_figure([tmp_path / log(tmp_path / "a", lines, 64)])
    losses, rates = figure.axes
    drawn = [list(zip(*line.get_data(), strict=True)) for line in (*losses.lines, *rates.lines)]
    assert drawn == [[(line["step"] * 64, line[key]) for line in lines if line[key] is not None]
                     for key in ("loss", "val_loss", "lr")]
    assert "nats a token" in losses.get_ylabel() and rates.get_xlabel() == "tokens seen"
    assert rates.get_ylabel() == "learning rate" and losses.get_shared_x_axes().joined(losses, rates)
    assert [text.get_text().split(",")[0] for text in losses.get_legend().get_texts()] == ["validation", "training"]
    best = min(line["val_loss"] for line in lines if line["val_loss"])
    assert texts(losses)[0].startswith(f"{best:.4f}")


def test_a_log_without_tokens_is_drawn_by_steps_and_then_all_are(tmp_path):
    log(tmp_path / "old", run_of()), log(tmp_path / "new", run_of(), 64)
    figure = sample.loss_figure([tmp_path / "new", tmp_path / "old"])
    assert "steps" in figure.axes[1].get_xlabel()
    assert all(max(line.get_xdata()) == 100 for axes in figure.axes for line in axes.lines)


def test_damaged_lines_are_left_out_and_the_line_of_step_0_is_not(tmp_path):
    whole = run_of()
    damaged = ["", "{", '{"step": 10, "lo', "[1, 2]", "null", "\0\0", '"step"', '{"step": 15, "loss": NaN}', "[" * 9999,
               '{"step": 15, "loss": 1e999}', '{"step": 15, "loss": "3"}', '{"step": true, "loss": 3}', '{"loss": 3}',
               '{"step": 15, "loss": ' + "9" * 400 + "}", '{"step": 15, "loss": ' + "9" * 5000 + "}"]
    start = dict(step=0, val_loss=4.0, bits_per_byte=5.0)
    log(tmp_path / "a", [start, *whole[:3], *damaged, *whole[3:]])
    assert sample.read_log(tmp_path / "a") == [start, *({k: v for k, v in line.items() if v is not None}
                                                        for line in whole)]
    validation = sample.loss_figure([tmp_path / "a"]).axes[0].lines[1]
    assert validation.get_xydata()[0].tolist() == [0, 4.0]


@pytest.fixture
def no_chinese(monkeypatch):
    """Whatever fonts are installed, none has Chinese."""
    usual = sample.usual_font().family_name
    monkeypatch.setattr(sample, "font_of", lambda character: None if character == "中" else usual)


def test_runs_differ_in_more_than_colour_and_each_has_its_name_at_its_end(tmp_path, no_chinese):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    names = [log(tmp_path / f"_run $x_{i}$ 中😀", run_of(1 + i / 10)) for i in range(6)]
    figure = sample.loss_figure([tmp_path / name for name in names])
    losses = figure.axes[0]
    looks = {(line.get_marker(), line.get_linestyle()) for line in losses.lines[1::2]}
    assert len(looks) == len({line.get_color() for line in losses.lines}) == 6
    labels = losses.texts
    assert all(f"$x_{i}$" in label.get_text() and "U+4E2D" in label.get_text() for i, label in enumerate(labels))
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(label) for label in labels]  # an annotation's own includes its line
    assert all(a.y1 <= b.y0 + 1 for a, b in zip(boxes, boxes[1:], strict=False)), "labels lie over each other"
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes), "a label is cut off"


def test_runs_of_different_tokens_are_compared_in_bits_a_byte(tmp_path):
    runs = [[line | dict(bits_per_byte=line["val_loss"] and line["val_loss"] * scale) for line in run_of()]
            for scale in (1.5, 0.5)]
    figure = sample.loss_figure([tmp_path / log(tmp_path / f"out-{i}", lines) for i, lines in enumerate(runs)])
    axes, best = figure.axes[0], min(line["val_loss"] for line in run_of() if line["val_loss"])
    assert "bits a byte" in axes.get_ylabel()
    shown = sorted(float(label.get_text().split()[0]) for label in axes.texts)
    assert shown == pytest.approx([best * 0.5, best * 1.5], abs=1e-4)
    same = sample.loss_figure([tmp_path / log(tmp_path / f"out-{i}", runs[0]) for i in (3, 4)])
    assert "nats a token" in same.axes[0].get_ylabel()


def test_joined_emoji_stay_whole_in_a_line():
    assert sample.visible("🧑‍💻 a\0\n") == "🧑‍💻 a�⏎"


@pytest.mark.parametrize("lines", [run_of()[:1], run_of()[1:2], [dict(step=0, val_loss=2.0)]], ids=str)
def test_a_run_that_has_just_begun_is_a_picture_too(lines, tmp_path):
    sample.plot_losses([tmp_path / log(tmp_path / "a", lines)], tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")


@pytest.mark.parametrize("argv, target", [
    (["--plot"], "out/loss.png"), (["--plot=out-a"], "out-a/loss.png"), (["--plot", "out-a"], "out-a/loss.png"),
    (["--plot", "--out_dir=out-a"], "out-a/loss.png"), (["--plot", "out", "out-a"], "compare.png"),
    (["--plot", "out-a", "out-a"], "out-a/loss.png"), (["--seed=1", "--plot=out", "out-a"], "compare.png")], ids=str)
def test_the_folders_after_plot_are_drawn(argv, target, command, tmp_path):
    for name in ("out", "out-a"):
        log(tmp_path / name, run_of())
    assert command(*argv) == (f"{target}\n".replace("/", os.sep), "")
    assert is_picture(tmp_path / target) and not list(tmp_path.rglob("*.tmp"))


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, command):
    log(tmp_path / "out", run_of())
    command("--plot")
    before = (tmp_path / "out" / "loss.png").read_bytes()
    from matplotlib.figure import Figure

    def fails(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    assert "No space left" in command("--plot", status=2)[1]
    assert (tmp_path / "out" / "loss.png").read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


def test_a_run_keeps_its_picture_current_and_goes_on_without_one(project, monkeypatch):
    monkeypatch.undo()  # of the fixture's leaving the pictures out
    monkeypatch.chdir(project.path)
    drawn = []
    real = sample.plot_losses
    monkeypatch.setattr(sample, "plot_losses", lambda folders, target: (drawn.append(len(sample.read_log(folders[0]))),
                                                                        real(folders, target)))
    out, error = project.train("--max_iters=20", "--eval_interval=5")
    assert drawn == [1, 2, 3, 4] and is_picture(project.path / "out" / "loss.png") and error == ""

    def broken(folders, target):
        raise RuntimeError("no such font")

    monkeypatch.setattr(sample, "plot_losses", broken)
    out, error = project.train("--max_iters=10")
    assert "loss.png could not be drawn: no such font" in error and error.count("\n") == 1
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert project.train("--max_iters=10").err == ""


def test_drawing_leaves_no_state_in_matplotlib(tmp_path):
    log(tmp_path / "a", run_of())
    code = ("import sys, sample; sample.plot_losses(['a'], 'a.png'); assert 'matplotlib' in sys.modules; "
            "assert 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ----------------------------------------------------------------------------------------------------------------------
# What the model makes of a prompt


@pytest.mark.parametrize("config", [dict(), dict(position="learned"), dict(position="none", qk_norm=False), dict(
    n_head=4, n_embd=32, norm="layernorm", bias=True)], ids=str)
def test_the_weights_are_those_that_the_model_attends_with(config, monkeypatch):
    model, calls, real = random_model(**config), [], F.scaled_dot_product_attention
    logits = model(torch.tensor([IDS]))[0]

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is real:
                calls.append((args[2], result))  # values, and what came out
            return result

    with Calls():
        maps = sample.attention_maps(model, IDS)
    L, H, T = model.config.n_layer, model.config.n_head, len(IDS)
    assert maps.shape == (L, H, T, T) and len(calls) == L
    for weights, (v, y) in zip(maps, calls, strict=True):
        torch.testing.assert_close(weights @ v[0], y[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(L, H, T))
    assert (maps.triu(1) == 0).all() and (maps.tril() > 0).any()
    assert torch.equal(model(torch.tensor([IDS]))[0], logits), "recording went on after its end"


def test_the_map_of_a_head_is_where_its_layer_and_head_say():
    maps = torch.rand(2, 3, 4, 4)
    figure = sample.attention_figure(maps, list("ab␣⏎"))
    axes = figure.axes[0]
    drawn = torch.from_numpy(axes.images[0].get_array().filled(math.nan))
    assert drawn.shape == (2 * 5 - 1, 3 * 5 - 1)
    for layer in range(2):
        for head in range(3):
            assert torch.equal(drawn[layer * 5:layer * 5 + 4, head * 5:head * 5 + 4], maps[layer, head])
    assert drawn.isnan().sum() == drawn.numel() - maps.numel()
    assert texts(axes) == ["head 1", "head 2", "head 3", "layer 1", "layer 2"]
    assert [text.get_text() for text in axes.get_xticklabels()] == list("ab␣⏎") * 3
    assert [text.get_text() for text in axes.get_yticklabels()] == list("ab␣⏎") * 2
    assert axes.get_xticks().tolist() == [*range(4), *range(5, 9), *range(10, 14)]
    assert [text.xy[0] for text in axes.texts[:3]] == [1.5, 6.5, 11.5], "each head's name over the middle of its maps"
    assert [text.xy[1] for text in axes.texts[3:]] == [1.5, 6.5]
    assert "from" in axes.get_ylabel() and "looks at" in axes.get_xlabel()
    assert "weight" in figure.axes[1].get_ylabel()


def test_the_bars_are_the_models_probabilities():
    model, tokenizer = random_model(), prepare.tokenizer_from_spec(CHAR_SPEC)
    p = sample.probabilities(model, IDS)
    torch.testing.assert_close(p, model(torch.tensor([IDS]))[0][0].softmax(-1).detach())
    given, following = sample.probability_figure(p, IDS, tokenizer).axes
    came = [bar.get_height() for bar in given.patches]
    assert came == [p[i, IDS[i + 1]].item() for i in range(len(IDS) - 1)]
    assert [text.get_text() for text in given.get_xticklabels()] == sample.names(tokenizer, IDS[1:])
    values, ids = p[-1].topk(20)
    assert [bar.get_width() for bar in following.patches] == values.tolist()
    assert [text.get_text() for text in following.get_yticklabels()] == sample.names(tokenizer, ids.tolist())


@pytest.mark.parametrize("kind", sample.SHOWN)
@pytest.mark.parametrize("start", ["ab", "the € é\n😀 a", "x" * 99])
def test_show_draws_into_the_checkpoints_folder(kind, start, command, tmp_path):
    assert command(f"--show={kind}", f"--start={start}") == (os.path.join("out", f"{kind}.png") + "\n", "")
    assert is_picture(tmp_path / "out" / f"{kind}.png")
    save(tmp_path / "else" / "a.pt", random_model())
    assert command(f"--show={kind}", f"--start={start}", "--ckpt=else/a.pt")[0].startswith("else")


def test_an_empty_start_and_a_model_without_layers_have_probabilities(command, tmp_path):
    save(tmp_path / "out" / "best.pt", random_model(n_layer=0))
    assert command("--show=probabilities")[1] == "" and is_picture(tmp_path / "out" / "probabilities.png")


def test_a_text_of_dollars_is_no_formula():
    """matplotlib would set $x$ as one, and fail where it is none."""
    chars = "$\\{ab"
    tokenizer, p = prepare.tokenizer_from_spec({"kind": "char", "chars": chars}), torch.full((4, 5), 0.2)
    labels = sample.names(tokenizer, range(4))
    figures = [sample.probability_figure(p, [0, 1, 2, 0], tokenizer),
               sample.attention_figure(p[None, None, :, :4], labels)]
    ticks = [text for figure in figures for axes in figure.axes[:2] for axis in (axes.xaxis, axes.yaxis)
             for text in axis.get_ticklabels() if set(text.get_text()) & set(chars)]
    assert len(ticks) == 3 + 5 + 4 + 4 and not any(text.get_parse_math() for text in ticks)


def test_names_can_be_seen_and_drawn(no_chinese):
    tokenizer = prepare.tokenizer_from_spec(CHAR_SPEC)
    assert sample.names(tokenizer, [0, 1, 2, CHARS.index("€")]) == ["⏎", "␣", "a", "€"]
    tokenizer = prepare.tokenizer_from_spec({"kind": "byte"})
    assert sample.names(tokenizer, [65, 9, 0, 0xE4]) == ["A", "⇥", "U+0000", "\\xe4"]
    assert sample.drawable("\u200d") == "U+200D"
    assert sample.drawable("中 x") == "U+4E2D␣x" and len(sample.drawable("a" * 99)) < 30


# ----------------------------------------------------------------------------------------------------------------------
# A line from each checkpoint


def put(path, step, seed=0, **changes):
    """Put the checkpoint of a step where the one before it is."""
    save(path, random_model(seed=seed), step=step, best_val_loss=9.0 - step, elapsed=step / 3, **changes)


def test_every_checkpoint_is_one_line_and_the_run_s_end_ends_it(command, tmp_path, monkeypatch):
    path, seen, real = tmp_path / "out" / "ckpt.pt", threading.Event(), sample.show
    monkeypatch.setattr(sample, "POLL", 0.01)
    monkeypatch.setattr(sample, "show", lambda text: (real(text), seen.set()))
    config = dict(train.asdict(train.Settings(vocab_size=len(CHARS), block_size=8, n_layer=2, n_head=2, n_embd=16,
                                              ngram=1)))

    def run():
        for step in range(1, 6):
            put(path, step, step, config=config | dict(max_iters=5))
            seen.wait(30), seen.clear()

    trainer = threading.Thread(target=run)
    trainer.start()
    out, err = command("--every_step", "--start=ab")
    trainer.join()
    lines = out.splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["step", str(step), "best", "val", "loss", f"{9 - step:.4f}"] for step in range(1, 6)]
    assert len({line[35:] for line in lines}) == 5, "all of one checkpoint"
    assert all(len(line) < 100 for line in lines) and err.splitlines()[-1].endswith("ended, at step 5 of 5")


def test_the_lines_are_what_the_latest_checkpoint_says(command, tmp_path):
    put(tmp_path / "out" / "ckpt.pt", 2000, seed=3)
    (line,) = command("--every_step", "--start=ab")[0].splitlines()
    whole = command("--start=ab", "--ckpt=out/ckpt.pt", "--max_new_tokens=60")[0].removeprefix("ab")[:60]
    assert line.endswith(sample.visible(whole)) and len(sample.visible(whole)) == 60


def test_before_the_first_checkpoint_it_says_once_that_it_waits(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "POLL", 0.01)
    later = threading.Timer(0.5, put, (tmp_path / "new" / "ckpt.pt", 2000))
    later.start()
    out, err = command("--every_step", "--out_dir=new")
    assert out.count("\n") == 1 and err.count("waiting") == 1 and err.count("\n") == 2


def test_a_checkpoint_without_an_evaluation_has_a_line(command, tmp_path):
    save(tmp_path / "out" / "ckpt.pt", random_model(), step=2000)
    assert command("--every_step")[0].startswith("step   2000  best val loss -  ")


def test_a_damaged_checkpoint_that_stays_is_refused(command, tmp_path):
    (tmp_path / "out" / "ckpt.pt").write_bytes(b"damaged")
    assert "damaged" in command("--every_step", status=2)[1]


def test_replacing_at_any_moment_harms_neither_a_look_nor_the_lines(command, tmp_path, monkeypatch):
    """As train.py does it, by two renames, between which there is no ckpt.pt, but hundreds of times as often."""
    path, done = tmp_path / "out" / "ckpt.pt", threading.Event()
    monkeypatch.setattr(sample, "POLL", 0.001)
    model, step, pause = random_model(), 1, 0
    whole = dict(train.load_checkpoint(tmp_path / "out" / "best.pt"))

    def run():
        nonlocal step
        while not done.is_set():
            step += 1
            train.save_checkpoint(path, whole | dict(step=step, elapsed=float(step), model=model.state_dict()),
                                  keep=path.with_name("ckpt-previous.pt"))
            time.sleep(pause)

    save(path, model, step=1)
    trainer = threading.Thread(target=run)
    trainer.start()
    try:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            sample.read_checkpoint(path)
        pause = 0.02
        threading.Timer(3, lambda: whole["config"].update(max_iters=1)).start()
        out, err = command("--every_step")
    finally:
        done.set()
        trainer.join()
    steps = [int(line.split()[1]) for line in out.splitlines()]
    assert len(steps) > 1 and steps == sorted(set(steps)) and err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send Ctrl-C to one process alone")
def test_control_c_ends_the_waiting_quietly(folder):  # noqa: F811
    put(folder / "out" / "ckpt.pt", 1)
    child = subprocess.Popen([sys.executable, ROOT / "sample.py", "--every_step", "--device=cpu"], cwd=folder,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with child:
        assert child.stdout.readline().startswith(b"step      1")
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60) == (b"", b"") and child.returncode == 130


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("argv, named", [
    (["--plot", "lost"], ["lost", "log.jsonl", "--plot"]),
    (["--plot", "out"], ["log.jsonl"]),
    (["--plot", "empty"], ["empty", "no loss"]),
    (["--plot", "\0"], ["plot", "log.jsonl"]),
    (["--plot", "--show=attention"], ["--plot and --show"]),
    (["--plot", "--score=text.txt"], ["--score and --plot"]),
    (["--plot", "--start=a"], ["--plot and --start"]),
    (["--export=new", "--every_step"], ["--export and --every_step"]),
    (["--show=attention", "--every_step"], ["--show and --every_step"]),
    (["--interactive", "--every_step"], ["--every_step and --interactive"]),
    (["--interactive", "--show=attention"], ["--show and --interactive"]),
    (["--every_step", "--per_line", "--start=a"], ["--every_step", "--per_line"]),
    (["--every_step", "--init_from=gpt2"], ["--every_step", "--init_from=gpt2"]),
    (["--every_step", "--start=Ü"], ["'Ü'"]),
    (["--show=attention"], ["two tokens", "--start"]),
    (["--show=attention", "--start=ab", "--ckpt=flat.pt"], ["n_layer=0"]),
    (["--show=attention", "--start=ab", "--ckpt=infinite.pt"], ["not finite"]),
    (["--show=weights"], ["show=weights", "attention, probabilities"]),
    (["--show=probabilities", "--start=Ü"], ["'Ü'"])], ids=lambda words: " ".join(words)[:40])
def test_a_mistake_is_one_line_that_helps(argv, named, command, tmp_path):
    log(tmp_path / "empty", ['{"step": 1}'])
    put(tmp_path / "out" / "ckpt.pt", 2000)
    save(tmp_path / "flat.pt", random_model(n_layer=0))
    model = random_model()
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    save(tmp_path / "infinite.pt", model)
    err = command(*argv, status=2)[1]
    assert not [word for word in named if word not in err], err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("argv", [["--plot"], ["--show=attention", "--start=ab"], ["--show=probabilities"]], ids=str)
def test_without_matplotlib_a_line_says_how_to_get_it(argv, command, tmp_path, monkeypatch):
    log(tmp_path / "out", run_of())
    with contextlib.suppress(KeyError):
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in command(*argv, status=2)[1]
