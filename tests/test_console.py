"""The table that train.py prints, and the metrics that it logs to TensorBoard and Weights & Biases."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_a_run_prints_its_data_its_model_and_a_table(project):
    out, error = project.train("--max_iters=20")
    assert error == ""
    header, table = out.split("    step")
    for words in (r"^tiny: [\d,]+ training tokens", r"^[\d,]+ parameters, 1 x cpu, torch\.float32"):
        assert re.search(words, header, re.MULTILINE), words
    names, *rows, last = table.splitlines()
    rows = [row.split() for row in rows]
    assert [int(row[0]) for row in rows] == [5, 10, 15, 20]
    assert [len(row) for row in rows] == [7, 9, 7, 9], "losses of both splits at evaluations only"
    for row, line in zip(rows, project.log(timings=True), strict=True):
        losses = [f"{line[key]:.4f}" for key in ("loss", "train_loss", "val_loss") if line[key] is not None]
        expected = [*losses,
                    f"{line['lr']:.1e}", f"{line['grad_norm']:.3f}", f"{line['tokens_per_second']:,}"]
        assert row[1:-2] == expected
        assert re.fullmatch(r"\d+:\d\d:\d\d", row[-2])
    assert re.fullmatch(r"\d+:\d\d:\d\d", rows[0][-1]) and rows[-1][-1] == "0:00:00", "the time left"
    assert len({len(line) for line in table.splitlines()[1:-1]}) == 1 and len(table.splitlines()[1]) <= 80
    loss = min(line["val_loss"] for line in project.log() if line["val_loss"])
    assert f"best validation loss {loss:.4f}" in last


def scalars(folder):
    """{tag: {step: value}} of a folder of TensorBoard."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(set(steps)) == len(steps), "a step was logged twice"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def check_numbers(found, log):
    """The tracker's numbers are the log's."""
    for line in log:
        for key in line.keys() - {"step", "elapsed"}:
            if line[key] is None:
                assert line["step"] not in found.get(key, {})
            else:
                assert found[key][line["step"]] == pytest.approx(line[key], rel=1e-6), (key, line["step"])
    assert set(found["loss"]) == {line["step"] for line in log}


def test_tensorboard_has_the_numbers_of_the_log_across_runs_and_resumes(project):
    project.train("--tensorboard", "--max_iters=10")
    check_numbers(scalars("out/tensorboard"), project.log(timings=True))
    checkpoint = Path("out/ckpt.pt").read_bytes()
    for iters in (20, 25):  # the second time as after a crash that lost the steps from 10 to 20
        Path("out/ckpt.pt").write_bytes(checkpoint)
        project.train("--init_from=resume", f"--max_iters={iters}")
        check_numbers(scalars("out/tensorboard"), log := project.log(timings=True))
        assert log[-1]["step"] == iters
    project.train("--tensorboard", "--max_iters=10")
    assert set(scalars("out/tensorboard")["loss"]) == {5, 10}, "a new run has a curve of its own"
    assert set(scalars("out/previous-1/tensorboard")["loss"]) == {5, 10, 15, 20, 25}


def test_wandb_has_the_numbers_of_the_log_and_a_resumed_run_continues_its_run(project, monkeypatch):
    runs, found = [], {}

    def init(**options):
        runs.append(options)
        return SimpleNamespace(id=options["id"] or "first", log=lambda values, step: [
            found.setdefault(key, {}).update({step: value}) for key, value in values.items()])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for argv in (["--max_iters=10"], ["--init_from=resume", "--max_iters=20"]):
        project.train("--wandb_log", "--wandb_project=mine", "--wandb_run_name=name", *argv)
    assert [(run["project"], run["name"], run["id"]) for run in runs] == [
        ("mine", "name", None), ("mine", "name", "first")]
    assert runs[0]["config"]["n_embd"] == 32
    check_numbers(found, project.log(timings=True))


@pytest.mark.parametrize("flag, package", [("--tensorboard", "tensorboard"), ("--wandb_log", "wandb")])
def test_a_missing_package_is_named(project, monkeypatch, flag, package):
    monkeypatch.delitem(sys.modules, f"torch.utils.{package}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    line = project.train(flag, status=2).err
    assert f"pip install {package}" in line and line.count("\n") == 1
