"""Settings: flags, config files, --help, renamed settings, and an import without side effects."""
import ast
import os
import subprocess
import sys
from dataclasses import asdict, fields
from typing import get_args

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

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
    ("--n_layer=5e1", dict(n_layer=50)),
    ("--max_iters=5000.0", dict(max_iters=5000)),
    ("--learning_rate=1e-3", dict(learning_rate=1e-3)),
    ("--learning_rate .5", dict(learning_rate=0.5)),
    ("--grad_clip=0", dict(grad_clip=0.0)),
    ("--bias", dict(bias=True)),
    ("--bias=true", dict(bias=True)),
    ("--bias true --n_layer=3", dict(bias=True, n_layer=3)),
    ("--bias --n_layer=3", dict(bias=True, n_layer=3)),
    ("--n_layer=3 --bias", dict(bias=True, n_layer=3)),
    ("--decay_lr=False", dict(decay_lr=False)),
    ("--decay_lr false", dict(decay_lr=False)),
    ("--out_dir=a=b", dict(out_dir="a=b")),
    ("--out_dir=Über/日本", dict(out_dir="Über/日本")),
    ("--dataset=1e-3", dict(dataset="1e-3")),
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
    ("n_layer = 3; n_head = 2", dict(n_layer=3, n_head=2)),
    ("batch_size = 5 * 8", dict(batch_size=40)),
    ("max_iters = 2 * 3 * 1e3", dict(max_iters=6000)),
    ("learning_rate = 1", dict(learning_rate=1.0)),
    ("learning_rate = 3 * 1e-4", dict(learning_rate=3 * 1e-4)),
    ("bias = True", dict(bias=True)),
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


def test_a_nanogpt_config_file_means_what_it_meant(tmp_path):
    """The keys of nanoGPT's train.py and configs, as its config files write them."""
    path = config(tmp_path, '''
# train a miniature character-level shakespeare model
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
eval_only = False
log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = True # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
init_from = 'scratch'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 64
block_size = 256 # context of up to 256 previous characters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False
learning_rate = 1e-3 # with baby networks can afford to go a bit higher
max_iters = 5000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.99 # make a bit bigger because number of tokens per iter is small
grad_clip = 1.0
decay_lr = True
warmup_iters = 100 # not super necessary potentially
lr_decay_iters = 5000 # make equal to max_iters usually
min_lr = 1e-4 # learning_rate / 10 usually
backend = 'nccl'
device = 'cpu'  # run on cpu only
dtype = 'bfloat16'
compile = False # do not torch compile the model
''')
    s = settings(path)
    train.check(s)
    expected = dict(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, eval_only=False, log_interval=10,
        wandb_log=True, wandb_project="shakespeare-char", wandb_run_name="mini-gpt",
        init_from="scratch", dataset="shakespeare_char", gradient_accumulation_steps=40, batch_size=64, block_size=256,
        n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, learning_rate=1e-3, max_iters=5000, weight_decay=0.1,
        beta1=0.9, beta2=0.99, grad_clip=1.0, decay_lr=True, warmup_iters=100, lr_decay_iters=5000, min_lr=1e-4,
        device="cpu", dtype="bfloat16", compile="False")
    assert {key: getattr(s, key) for key in expected} == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    s = settings(path)
    train.check(s)
    assert s.out_dir == DEFAULT.out_dir, "a bare sample.py would not find this model"
    for key, value, where in train.read_config(path):
        allowed = {float: (float, int), str: (str, bool)}.get(type(getattr(s, key)), (type(getattr(s, key)),))
        assert type(value) in allowed or value == getattr(s, key), where  # a product is a float


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


# What is refused.


@pytest.mark.parametrize("line, words", [
    ("n_layr = 3", ["n_layr", "n_layer"]),
    ("norm = 'layer_norm'", ["layer_norm", "layernorm"]),
    ("n_layer = 'three'", ["n_layer", "three", "int"]),
    ("n_layer = 2.5", ["n_layer", "2.5"]),
    ("n_layer = 1e999", ["n_layer"]),
    ("n_layer = None", []),
    ("n_layer = [3]", []),
    ("n_layer = 3j", []),
    ("n_layer = 2**3", []),
    ("learning_rate = 'fast'", ["learning_rate", "fast"]),
    ("bias = 2", ["bias", "2"]),
    ("bias = 'perhaps'", ["bias", "perhaps"]),
    ("n_layer = n_head", []),
    ("n_layer 3", []),
])
def test_a_wrong_line_is_named_with_its_place(tmp_path, line, words):
    path = config(tmp_path, f"# one\n\n{line}\n")
    with pytest.raises(train.UserError) as error:
        settings("--n_head=2", path)
    assert "\n" not in str(error.value)
    for word in [f"{path}:3", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("old, new", dict(
    decay_share="cooldown_frac", ngram_rows="ngram_buckets", tied_head="tie_weights", norm_weight="norm_affine",
    checkpoint_minutes="save_interval_minutes", recompute="gradient_checkpointing", wandb="wandb_log",
    size="n_layer, n_head, n_embd", train_last="", parallel="").items())
def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name(project, old, new):
    path = config(project.path, f"{old} = 1\n")
    for argv, where in ((f"--{old}=1", "command line"), (str(path), f"{path}:1")):
        line = project.refuse(argv)
        assert f"{where}: unknown setting {old}" in line and new in line


@pytest.mark.parametrize("old, new", dict(every_step="follow", repetition_penalty="").items())
def test_a_setting_of_an_earlier_sample_py_is_refused_with_its_new_name(old, new, capsys):
    assert sample.main([f"--{old}"]) == 2
    line = capsys.readouterr().err
    assert old in line and new in line and line.count("\n") == 1


@pytest.mark.parametrize("code", [
    'n_layer = __import__("pathlib").Path("canary").touch()',
    'n_layer = [open("canary", "w") for _ in "x"]',
    'n_layer = {"x": open("canary", "w")}',
    'n_layer = f"{open(\'canary\', \'w\')}"',
    'n_layer = (lambda: open("canary", "w"))()',
    'n_layer = 3 if open("canary", "w") else 4',
    'n_layer = 3 * open("canary", "w")',
    'n_layer = "".join.__globals__',
    'n_layer: open("canary", "w") = 3',
    'n_layer += 3',
    'n_layer, n_head = 3, 3',
    'train.n_layer = 3',
    'globals()[open("canary", "w")] = 3',
    'exec("open(\'canary\', \'w\')")',
    'def n_layer(): pass',
    'class n_layer(open("canary", "w")): pass',
    'if open("canary", "w"): n_layer = 3',
    'with open("canary", "w"): pass',
    'del n_layer',
    '@open("canary", "w")\ndef f(): pass',
])
def test_nothing_in_a_config_file_is_executed(project, code):
    (project.path / "canary.py").write_text('open("canary", "w")', encoding="utf-8")
    assert "mine.py:" in project.refuse(str(config(project.path, code)))
    assert settings(config(project.path, "import canary\nfrom canary import x\nn_layer = 3")).n_layer == 3
    assert not (project.path / "canary").exists()


@pytest.mark.parametrize("value", [
    "9**9**9", "'a' * 10**12", "1 << 10**12", "9" * 5000, "*".join(["1e300"] * 12),
    "*".join(["9"] * 20_000), "-" * 5000 + "1", "(" * 5000, "[" * 50_000, "not " * 20_000 + "1", "x." * 20_000 + "x",
])
def test_no_value_fills_the_memory_or_exhausts_the_stack(tmp_path, value):
    for key in ("n_layer", "bias"):
        with pytest.raises(train.UserError, match="mine.py:"):
            settings(config(tmp_path, f"{key} = {value}"))


COUNTS = ("block_size n_head n_embd ngram ngram_buckets vocab_multiple batch_size gradient_accumulation_steps "
          "max_iters eval_interval log_interval").split()
FRACTIONS = "dropout ngram_dropout beta1 beta2 momentum".split()


@pytest.mark.parametrize("argv", [
    *(f"--{key}=0" for key in COUNTS), *(f"--{key}={value}" for key in FRACTIONS for value in (-1, 1, "nan")),
    "--n_embd=30 --n_head=4", "--n_embd=30 --n_head=2"])  # heads of 15 channels cannot be rotated in pairs
def test_settings_that_no_model_can_have_are_refused(argv):
    with pytest.raises(train.UserError) as error:
        train.check(settings(*argv.split()))
    for flag in argv.split():
        assert flag.split("=")[0][2:] in str(error.value) and flag.split("=")[1] in str(error.value)


def test_settings_at_the_edge_of_what_is_allowed_pass():
    train.check(settings(*(f"--{key}=1" for key in COUNTS), "--position=learned"))
    train.check(settings("--n_embd=30", "--n_head=2", "--position=learned", *(f"--{key}=0" for key in FRACTIONS)))


# Any text at all.

FRAGMENTS = st.sampled_from([
    "n_layer", "learning_rate", "out_dir", "bias", " = ", "=", "3", "1e-3", "-", "**", "*", "/", "%", "//", "(", ")",
    "'", '"', '"""', "\\", "#", "\n", "\t", "True", "None", "[", "]", "lambda: ", "f'{", "}'", "é", "日", "\0",
    "\ufeff", "import os", "if ", ":", ";", "9**9", "0x", "1_0", "j", "0.0", "..."])


@given(st.one_of(st.text(), st.lists(FRAGMENTS).map("".join),
                 st.lists(FRAGMENTS).map(lambda parts: "n_layer = " + "".join(parts)), st.binary()))
@example("n_layer = (-1) ** 0.5")
@pytest.mark.filterwarnings("ignore")  # Python's own remarks on odd syntax
def test_any_file_is_read_or_refused(tmp_path, text):
    path = config(tmp_path, text)
    try:
        train.check(settings(path))
    except train.UserError as error:
        assert str(error)


WORDS = st.one_of(st.text(), st.integers().map(str), st.floats().map(str),
                  st.sampled_from(["", "True", "no", "1e5", "1e400", "-1", "½", "٣", "1_0", "0x1", "9" * 5000, "muon"]))
FLAGS = st.one_of(
    st.builds("--{}={}".format, st.sampled_from([spec.name for spec in fields(train.Settings)]), WORDS),
    st.builds("--{}={}".format, st.text(), WORDS), st.sampled_from(["--bias", "--n_layer", "--", "-", "--=", "="]),
    st.text().map("--".__add__), WORDS)


@given(st.lists(FLAGS, max_size=5))
def test_any_command_line_is_understood_or_refused(argv):
    try:
        s = settings(*argv)
    except train.UserError as error:
        assert str(error)
        return
    for f in fields(s):
        value = getattr(s, f.name)
        assert value in get_args(f.type) if get_args(f.type) else type(value) is f.type


# Importing.


def test_importing_has_no_side_effects(tmp_path):
    """No output, no argv, no device, no signal handler, no random number, no file, and no package before it is used."""
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
