"""The plots of sample.py and train.py show what the log and the model contain."""
import itertools
import json
import os
import sys
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, random_model
from test_sample import folder, save  # noqa: F401  a fixture

import prepare
import sample
import train

pytestmark = pytest.mark.usefixtures("torch_state")
RECORDS = [dict(step=step, tokens=64 * step, loss=1.5 + 10 / step, train_loss=None, val_loss=None)
           | (dict(train_loss=1.5 + 9 / step, val_loss=1.5 + 12 / step) if step % 20 == 0 else {})
           for step in range(10, 101, 10)]
PLOTS = [(["--plot=out"], "out/loss.png"), (["--plot=out,out-$a$"], "compare.png"),
         (["--show=attention", "--start=ab\u00e9"], "out/attention.png"),
         (["--show=probabilities", "--start=the \u00e9\n a"], "out/probabilities.png"),
         (["--show=probabilities", "--ckpt=else/a.pt"], "else/probabilities.png")]


@pytest.fixture
def command(folder, capsys):  # noqa: F811
    """Two runs with logs; runs sample.py beside them with these flags and returns its (stdout, stderr)."""
    for name in ("out", "out-$a$"):
        (folder / name).mkdir(exist_ok=True)
        lines = [json.dumps(record) for record in (dict(step=0, val_loss=4.0), *RECORDS)]
        lines = ["", '{"step": 10, "lo', *lines[:5], "\0\0", *lines[5:], '{"step": 11']
        (folder / name / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    save(folder / "else" / "a.pt", random_model(vocab_size=5), {"kind": "char", "chars": "$\\{_^"})

    def run(*argv, status=0):
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as a missing glyph
            found = sample.main([*argv, "--device=cpu", "--dtype=float32"])
        out, err = capsys.readouterr()
        assert found == status, err
        return out, err
    return run


@pytest.mark.parametrize("argv, target", PLOTS, ids=str)
def test_a_plot_is_a_png_that_replaces_the_one_before_only_when_complete(argv, target, command, tmp_path, monkeypatch):
    from matplotlib import image
    from matplotlib.figure import Figure
    assert command(*argv) == (target.replace("/", os.sep) + "\n", "")
    pixels = image.imread(tmp_path / target)
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.02
    before = (tmp_path / target).read_bytes()

    def fails(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    error = command(*argv, status=2)[1]
    assert "No space left" in error and error.count("\n") == 1
    assert (tmp_path / target).read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("argv, target", PLOTS[1:4], ids=str)
def test_without_matplotlib_a_line_says_how_to_install_it(argv, target, command, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = command(*argv, status=2)[1]
    assert "pip install matplotlib" in error and error.count("\n") == 1 and not (tmp_path / target).exists()


def test_the_curves_are_the_records_of_the_log_without_damaged_lines(command, tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *xy, **style: drawn.append(xy[:2]) or plot(axes, *xy, **style))
    command("--plot=out")
    records = [dict(step=0, tokens=0, val_loss=4.0), *RECORDS]
    assert drawn == [([r["tokens"] for r in records if r.get(key)], [r[key] for r in records if r.get(key)])
                     for key in ("loss", "train_loss", "val_loss")]


@pytest.mark.parametrize("seconds, plots", [(0.01, 1), (11, 2)])
def test_training_plots_at_its_end_and_at_most_every_ten_seconds(seconds, plots, project, monkeypatch):
    monkeypatch.undo()  # of the fixture's leaving the plots out
    monkeypatch.chdir(project.path)
    drawn, plot_losses = [], train.plot_losses
    monkeypatch.setattr(train, "plot_losses", lambda folders: drawn.append(plot_losses(folders).read_bytes()[1:4]))
    clock = itertools.count(time.monotonic(), seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    project.train("--max_iters=20", "--eval_interval=10")
    assert drawn == [b"PNG"] * plots


@pytest.mark.parametrize("config", [dict(), dict(n_head=4, n_embd=32, qk_norm=False)], ids=str)
def test_attention_weights_are_a_softmax_that_reproduces_the_output_of_attention(config, monkeypatch):
    model, calls, attention = random_model(**config), [], F.scaled_dot_product_attention

    def record(q, k, v, **options):
        calls.append((v, attention(q, k, v, **options)))
        return calls[-1][1]

    idx = torch.tensor([[5, 9, 2, 7, 7, 0]])
    expected = model(idx)[0]
    with sample.AttentionWeights() as weights:
        assert torch.equal(model(idx)[0], expected)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model(idx)
    assert len(weights.maps) == len(calls) == 2
    for maps, (v, y) in zip(weights.maps, calls, strict=True):
        assert maps.shape == (1, model.config.n_head, 6, 6) and (maps.triu(1) == 0).all()
        torch.testing.assert_close(maps.sum(-1), torch.ones(1, model.config.n_head, 6))
        torch.testing.assert_close(maps @ v, y, rtol=1e-5, atol=1e-5)


def test_the_bars_are_the_probabilities_of_the_model(command, monkeypatch):
    seen, plot = [], sample.plot_probabilities
    monkeypatch.setattr(sample, "plot_probabilities", lambda *args: seen.append((args[0], plot(*args))) or seen[-1][1])
    command("--show=probabilities", "--start=the fox")
    [(p, figure)] = seen
    ids = [CHARS.index(c) for c in "the fox"]
    torch.testing.assert_close(p, random_model()(torch.tensor([ids]))[0][0].softmax(-1).detach())
    torch.testing.assert_close(p.sum(-1), torch.ones(len(ids)))
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == [p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert [bar.get_width() for bar in below.patches] == p[-1].topk(20).values.tolist()


def test_attention_of_a_model_without_layers_is_refused(command, tmp_path):
    save(tmp_path / "out" / "best.pt", random_model(n_layer=0))
    assert "n_layer=0" in command("--show=attention", status=2)[1]


def test_a_label_shows_the_bytes_of_an_incomplete_character():
    assert sample.token_labels(prepare.ByteTokenizer(), [0xE5, 10, 32, 36]) == [r"\xe5", r"\n", "\u2423", r"\$"]
