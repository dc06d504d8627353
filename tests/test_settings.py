"""Settings: flags, config files, --help, renamed settings, and an import without side effects."""
import ast
import os
import subprocess
import sys
from dataclasses import asdict, fields
from typing import get_args

import pytest
from conftest import ROOT

import sample
import train

DEFAULT = train.Settings()
CONFIGS = sorted((ROOT / "config").rglob("*.py"))
assert CONFIGS


def settings(*argv):
    return train.Settings(**train.parse_args(train.Settings, [str(arg) for arg in argv])[0])


def config(path, text, name="mine.py"):
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path / name


def changed(s):
    """The settings that differ from their defaults, each of its declared type."""
    found = {key: value for key, value in asdict(s).items() if value != getattr(DEFAULT, key)}
    assert all(type(value) is type(getattr(DEFAULT, key)) for key, value in found.items())
    return found


# Flags and config files.

@pytest.mark.parametrize("argv, expected", [
    ("--n_layer=3", dict(n_layer=3)),
    ("--n_layer 3", dict(n_layer=3)),
    ("--max_iters=5000.0", dict(max_iters=5000)),
    ("--learning_rate=1e-3", dict(learning_rate=1e-3)),
    ("--bias", dict(bias=True)),
    ("--bias true --n_layer=3", dict(bias=True, n_layer=3)),
    ("--bias --n_layer=3", dict(bias=True, n_layer=3)),
    ("--n_layer=3 --bias", dict(bias=True, n_layer=3)),
    ("--decay_lr=False", dict(decay_lr=False)),
    ("--decay_lr false", dict(decay_lr=False)),
    ("--out_dir=a=b", dict(out_dir="a=b")),
    ("--out_dir=Über/日本", dict(out_dir="Über/日本")),
    ("--optimizer=AdamW", dict(optimizer="adamw")),
    ("--compile --n_layer=3", dict(compile="True", n_layer=3)),
    ("--compile=false", dict(compile="False")),
    ("--n_layer=3 --n_layer=2", dict(n_layer=2)),
    ("", {}),
])
def test_flags(argv, expected):
    assert changed(settings(*argv.split())) == expected


@pytest.mark.parametrize("text, expected", [
    ("n_layer=3 # three", dict(n_layer=3)),
    ("batch_size = 5 * 8", dict(batch_size=40)),
    ("max_iters = 2 * 3 * 1e3", dict(max_iters=6000)),
    ("learning_rate = 3 * 1e-4", dict(learning_rate=3 * 1e-4)),
    ('out_dir = "naïve/日本#b=c"  # ünïcode', dict(out_dir="naïve/日本#b=c")),
    ('"""A docstring,\nof two lines."""\n\n# and a comment\nn_layer = 3\n', dict(n_layer=3)),
    ("n_layer = 3\r\nn_head = 2\r\n", dict(n_layer=3, n_head=2)),
    ("\ufeffn_layer = 3", dict(n_layer=3)),  # as Windows' Notepad saves it
    ("compile = False", dict(compile="False")),
    ("n_layer = 3\nn_layer = 2", dict(n_layer=2)),
    ("", {}),
])
def test_a_config_file_is_literals_and_products(tmp_path, text, expected):
    assert changed(settings(config(tmp_path, text))) == expected


def test_files_and_flags_override_from_left_to_right(tmp_path):
    one, two = config(tmp_path, "n_layer = 1\nn_head = 1", "one.py"), config(tmp_path, "n_layer = 2", "two.py")
    assert settings(one, two).n_layer == 2
    assert settings(two, one).n_layer == 1
    assert settings("--n_layer=7", one).n_layer == 1
    assert changed(settings(one, "--n_layer=7")) == dict(n_layer=7, n_head=1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    s = settings(path)
    train.check(s)
    assert s.out_dir == DEFAULT.out_dir, "a bare sample.py would not find this model"


@pytest.mark.parametrize("script", [train, sample])
def test_help_is_the_lines_of_the_dataclass(script, capsys, tmp_path, monkeypatch):
    """Name, type, default and comment of each setting, once."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        script.main(["--help"])
    assert not done.value.code
    text = capsys.readouterr().out
    source = (ROOT / f"{script.__name__}.py").read_text(encoding="utf-8").splitlines()
    lines = [line for line in text.splitlines() if f"    {line}" in source and ": " in line.split(" = ")[0]]
    assert [line.split(":")[0] for line in lines] == [f.name for f in fields(script.Settings)]
    for line, f in zip(lines, fields(script.Settings), strict=True):
        kind, default = line.removeprefix(f"{f.name}: ").split(" = ", 1)
        choices = ", ".join(f'"{word}"' for word in get_args(f.type))
        assert kind == (f"Literal[{choices}]" if choices else f.type.__name__)
        value, _, comment = default.partition("  # ")
        assert ast.literal_eval(value) == f.default
        assert comment or f.name == "wandb_project"
    assert not list(tmp_path.iterdir())


# Errors.

@pytest.mark.parametrize("line, words", [
    ("n_layr = 3", ["n_layr", "n_layer"]),
    ("norm = 'layer_norm'", ["layer_norm", "layernorm"]),
    ("n_layer = 'three'", ["n_layer", "three", "int"]),
    ("n_layer = 1e999", ["n_layer"]),
    ("n_layer = None", []),
    ("n_layer = [3]", []),
    ("n_layer = 2**3", []),
    ("learning_rate = 'fast'", ["learning_rate", "fast"]),
    ("bias = 2", ["bias", "2"]),
    ("n_layer = n_head", []),
    ("n_layer 3", []),
])
def test_an_invalid_line_is_named(tmp_path, line, words):
    path = config(tmp_path, f"# one\n\n{line}\n")
    with pytest.raises(train.UserError) as error:
        settings("--n_head=2", path)
    assert "\n" not in str(error.value)
    for word in [f"{path}:3", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("code", [
    'n_layer = __import__("pathlib").Path("canary").touch()',
    'n_layer = [open("canary", "w") for _ in "x"]',
    'n_layer = f"{open(\'canary\', \'w\')}"',
    'n_layer = 3 * open("canary", "w")',
    'n_layer: open("canary", "w") = 3',
    'n_layer += 3',
    'n_layer, n_head = 3, 3',
    'train.n_layer = 3',
    'exec("open(\'canary\', \'w\')")',
    'if open("canary", "w"): n_layer = 3',
])
def test_nothing_in_a_config_file_is_executed(project, code):
    (project.path / "canary.py").write_text('open("canary", "w")', encoding="utf-8")
    assert "mine.py:" in project.refuse(str(config(project.path, code)))
    assert settings(config(project.path, "import canary\nfrom canary import x\nn_layer = 3")).n_layer == 3
    assert not (project.path / "canary").exists()


@pytest.mark.parametrize("value", ["9**9**9", "'a' * 10**12", "9" * 5000, "*".join(["9"] * 20_000), "(" * 5000])
def test_no_value_fills_the_memory_or_exhausts_the_stack(tmp_path, value):
    with pytest.raises(train.UserError, match="mine.py:"):
        settings(config(tmp_path, f"n_layer = {value}"))


COUNTS = ("block_size n_head n_embd ngram vocab_multiple batch_size gradient_accumulation_steps "
          "max_iters eval_interval log_interval").split()
FRACTIONS = "dropout beta1 beta2 momentum".split()


@pytest.mark.parametrize("argv", [
    *(f"--{key}=0" for key in COUNTS), *(f"--{key}={value}" for key in FRACTIONS for value in (-1, 1, "nan")),
    "--n_embd=30 --n_head=4", "--n_embd=30 --n_head=2"])  # 15 channels per head: no pairs for RoPE
def test_settings_out_of_range_are_refused(argv):
    with pytest.raises(train.UserError) as error:
        train.check(settings(*argv.split()))
    for flag in argv.split():
        assert flag.split("=")[0][2:] in str(error.value) and flag.split("=")[1] in str(error.value)


def test_the_limits_of_settings_are_allowed():
    train.check(settings(*(f"--{key}=1" for key in COUNTS), "--position=learned"))
    train.check(settings("--n_embd=30", "--n_head=2", "--position=learned", *(f"--{key}=0" for key in FRACTIONS)))


# Importing.

def test_importing_has_no_side_effects(tmp_path):
    """No output, file, device, signal handler or random number; no use of argv; no import of optional packages."""
    program = """
import signal, sys
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import prepare
assert "torch" not in sys.modules
import torch
state = torch.get_rng_state()
from train import GPT, GPTConfig
assert torch.equal(state, torch.get_rng_state())
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert not {"sample", "requests", "tiktoken", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program, "--bogus=1", "absent.py"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())
