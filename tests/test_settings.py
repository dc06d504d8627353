"""Settings: what files and flags mean, and that every mistake is one line that names it."""
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

import train

DEFAULT = train.Settings()
CONFIGS = sorted((ROOT / "config").rglob("*.py"))


def settings(*argv):
    return train.override(train.Settings(), [str(arg) for arg in argv])


def config(path, text, name="mine.py"):
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path / name


def changed(s):
    return {key: value for key, value in asdict(s).items() if value != getattr(DEFAULT, key)}


# What is accepted.


@pytest.mark.parametrize("argv, expected", [
    ("--n_layer=3", dict(n_layer=3)),
    ("--n_layer 3", dict(n_layer=3)),
    ("--n_layer=5e1", dict(n_layer=50)),
    ("--max_iters=5e3", dict(max_iters=5000)),
    ("--max_iters=5000.0", dict(max_iters=5000)),
    ("--learning_rate=1e-3", dict(learning_rate=1e-3)),
    ("--learning_rate .5", dict(learning_rate=0.5)),
    ("--learning_rate=1", dict(learning_rate=1.0)),
    ("--grad_clip=0", dict(grad_clip=0.0)),
    ("--bias", dict(bias=True)),
    ("--bias=True", dict(bias=True)),
    ("--bias=true", dict(bias=True)),
    ("--bias=1", dict(bias=True)),
    ("--bias true --n_layer=3", dict(bias=True, n_layer=3)),
    ("--bias --n_layer=3", dict(bias=True, n_layer=3)),
    ("--n_layer=3 --bias", dict(bias=True, n_layer=3)),
    ("--decay_lr=no", dict(decay_lr=False)),
    ("--decay_lr=False", dict(decay_lr=False)),
    ("--decay_lr false", dict(decay_lr=False)),
    ("--decay_lr 0", dict(decay_lr=False)),
    ("--decay_lr=yes", {}),
    ("--out_dir=a=b", dict(out_dir="a=b")),
    ("--out_dir=--x", dict(out_dir="--x")),
    ("--out_dir=Über/日本", dict(out_dir="Über/日本")),
    ("--dataset=1e-3", dict(dataset="1e-3")),
    ("--optimizer=AdamW", dict(optimizer="adamw")),
    ("--compile", dict(compile="True")),
    ("--compile --n_layer=3", dict(compile="True", n_layer=3)),
    ("--compile=true", dict(compile="True")),
    ("--compile=1", dict(compile="True")),
    ("--compile=no", dict(compile="False")),
    ("--n_layer=3 --n_layer=2", dict(n_layer=2)),
    ("", {}),
])
def test_flags_mean_what_people_mean(argv, expected):
    assert changed(settings(*argv.split())) == expected
    for key, value in changed(settings(*argv.split())).items():
        assert type(value) is type(getattr(DEFAULT, key))


@pytest.mark.parametrize("line, expected", [
    ("n_layer = 3", dict(n_layer=3)),
    ("n_layer=3 # three", dict(n_layer=3)),
    ("n_layer = 3; n_head = 2", dict(n_layer=3, n_head=2)),
    ("batch_size = 5 * 8", dict(batch_size=40)),
    ("max_iters = 2**19", dict(max_iters=2**19)),
    ("max_iters = (600 + 1) * 1000 // 2 % 1000", dict(max_iters=500)),
    ("max_iters = 1e3", dict(max_iters=1000)),
    ("learning_rate = 1e-3 / 3", dict(learning_rate=1e-3 / 3)),
    ("learning_rate = 1", dict(learning_rate=1.0)),
    ("learning_rate = -1.5 + 2", dict(learning_rate=0.5)),
    ("seed = -1 + 2", dict(seed=1)),
    ("bias = True", dict(bias=True)),
    ("bias = 1", dict(bias=True)),
    ("out_dir = 'a#b=c'", dict(out_dir="a#b=c")),
    ('out_dir = "naïve/日本"  # ünïcode', dict(out_dir="naïve/日本")),
    ('"""A docstring,\nof two lines."""\n\n# and a comment\nn_layer = 3\n', dict(n_layer=3)),
    ("n_layer = 3\r\nn_head = 2\r\n", dict(n_layer=3, n_head=2)),
    ("\ufeffn_layer = 3", dict(n_layer=3)),  # as Windows' Notepad saves it
    ("compile = False", dict(compile="False")),
    ("compile = True", dict(compile="True")),
    ("n_layer = 3\nn_layer = 2", dict(n_layer=2)),
    ("", {}),
])
def test_a_config_file_is_literals_and_arithmetic(tmp_path, line, expected):
    s = settings(config(tmp_path, line))
    assert changed(s) == expected
    for key, value in changed(s).items():
        assert type(value) is type(getattr(DEFAULT, key))


def test_files_and_flags_count_from_left_to_right(tmp_path):
    one, two = config(tmp_path, "n_layer = 1\nn_head = 1", "one.py"), config(tmp_path, "n_layer = 2", "two.py")
    assert settings(one, two).n_layer == 2
    assert settings(two, one).n_layer == 1
    assert settings("--n_layer=7", one).n_layer == 1
    assert settings(one, "--n_layer=7").n_layer == 7
    assert settings(one, "--n_layer=7", two).n_layer == 2
    assert settings(one, "--n_layer=7", two).n_head == 1


@pytest.mark.parametrize("size, shape", {
    "gpt-nano": (3, 3, 48), "gpt-micro": (4, 4, 128), "gpt-mini": (6, 6, 192), "gopher-44m": (8, 16, 512),
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}.items())
def test_size_sets_the_shape_where_it_stands(size, shape):
    s = settings("--n_layer=99", f"--size={size}")
    assert (s.n_layer, s.n_head, s.n_embd) == shape
    later = settings(f"--size={size}", "--n_layer=99")
    assert (later.n_layer, later.n_head, later.n_embd) == (99, *shape[1:])
    train.check(s)


def test_a_nanogpt_config_file_means_what_it_meant(tmp_path, capsys):
    """The keys of nanoGPT's train.py and configs, as its config files write them."""
    path = config(tmp_path, '''
# train a miniature character-level shakespeare model
# good for debugging and playing on macbooks and such

out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
eval_only = False
log_interval = 10 # don't print too too often

# we expect to overfit on this small dataset, so only save when val improves
always_save_checkpoint = False

wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
init_from = 'scratch'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 64
block_size = 256 # context of up to 256 previous characters

# baby GPT model :)
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

# on macbook also add
backend = 'nccl'
device = 'cpu'  # run on cpu only
dtype = 'bfloat16'
compile = False # do not torch compile the model
''')
    s = settings(path)
    train.check(s)
    expected = dict(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, eval_only=False, log_interval=10,
        init_from="scratch", dataset="shakespeare_char", gradient_accumulation_steps=40, batch_size=64, block_size=256,
        n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, learning_rate=1e-3, max_iters=5000, weight_decay=0.1,
        beta1=0.9, beta2=0.99, grad_clip=1.0, decay_lr=True, warmup_iters=100, lr_decay_iters=5000, min_lr=1e-4,
        device="cpu", dtype="bfloat16", compile="False")
    assert {key: getattr(s, key) for key in expected} == expected
    notes = capsys.readouterr().err.splitlines()
    assert {word for note in notes for word in note.split()} >= {"always_save_checkpoint", "wandb_log", "backend"}


def test_there_are_config_files():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    s = settings(path)
    train.check(s)
    assert s.out_dir == DEFAULT.out_dir, "a bare sample.py would not find this model"
    types = {spec.name: spec.type for spec in fields(train.Settings)}
    for key, value, where in train.read_config(path):
        allowed = {float: (float, int), str: (str, bool)}.get(types[key], (types[key],))
        assert type(value) in allowed, where


def test_help_tells_every_setting_with_its_default_and_reason(project):
    entries = re.split(r"\n  (?=--)", project.train("--help").out)[1:]
    lines = {entry.split("=")[0]: " ".join(entry.split()) for entry in entries}
    for spec in fields(train.Settings):
        line = lines[f"--{spec.name}"]
        assert f"--{spec.name}={spec.default}" in line
        assert spec.type.__name__ in line
        assert len(line.split("=", 1)[1].split()) >= 4, f"no reason: {line}"
        for choice in spec.metadata["choices"] or ():
            assert choice in line
    assert not (project.path / "out").exists()


# What is refused.


@pytest.mark.parametrize("line, words", [
    ("n_layr = 3", ["n_layr", "n_layer"]),
    ("learning_rte = 1", ["learning_rte", "learning_rate"]),
    ("optimizer = 'moun'", ["moun", "muon"]),
    ("norm = 'layer_norm'", ["layer_norm", "layernorm"]),
    ("size = 'gpt3'", ["gpt3", "gpt2"]),
    ("n_layer = 'three'", ["n_layer", "three", "whole number"]),
    ("n_layer = 2.5", ["n_layer", "2.5", "whole number"]),
    ("n_layer = True", ["n_layer", "True"]),
    ("n_layer = 1e999", ["n_layer"]),
    ("n_layer = (-1) ** 0.5", []),
    ("learning_rate = (-1) ** 0.5", []),
    ("learning_rate = 'fast'", ["learning_rate", "fast"]),
    ("learning_rate = 1e999", ["learning_rate"]),
    ("learning_rate = 1e999 - 1e999", ["learning_rate"]),
    ("learning_rate = 1 / 0", []),
    ("bias = 2", ["bias", "2"]),
    ("bias = 'perhaps'", ["bias", "perhaps"]),
    ("n_layer = None", []),
    ("n_layer = [3]", []),
    ("n_layer = n_head", []),
    ("n_layer: 3", []),
    ("n_layer 3", []),
    ("print", []),
    ("import os", []),
])
def test_a_bad_line_is_named_with_its_place(tmp_path, line, words):
    path = config(tmp_path, f"# one\n\n{line}\n")
    with pytest.raises(train.UserError) as error:
        settings("--n_head=2", path)
    assert f"{path}:3" in str(error.value)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("code", [
    'n_layer = __import__("pathlib").Path("canary").touch()',
    'n_layer = open("canary", "w")',
    'n_layer = [open("canary", "w") for _ in "x"]',
    'n_layer = {open("canary", "w") for _ in "x"}',
    'n_layer = list(open("canary", "w") for _ in "x")',
    'n_layer = {"x": open("canary", "w")}',
    'n_layer = f"{open(\'canary\', \'w\')}"',
    'n_layer = (lambda: open("canary", "w"))()',
    'n_layer = (x := open("canary", "w"))',
    'n_layer = 3 if open("canary", "w") else 4',
    'n_layer = 3 or open("canary", "w")',
    'n_layer = open("canary", "w") + 1',
    'n_layer = -open("canary", "w")',
    'n_layer = (1).__class__',
    'n_layer = "".join.__globals__',
    'n_layer = "abc"[0]',
    'n_layer = 1 < open("canary", "w")',
    'n_layer = n_head',
    'n_layer = "%s" % 3',
    'n_layer = b"x"',
    'n_layer = 3j',
    'n_layer = ...',
    'n_layer: open("canary", "w") = 3',
    'n_layer += 3',
    'n_layer, n_head = 3, 3',
    'settings.n_layer = 3',
    'globals()[open("canary", "w")] = 3',
    'open("canary", "w")',
    'exec("open(\'canary\', \'w\')")',
    'f"{open(\'canary\', \'w\')}"',
    'import canary',
    'from pathlib import Path; Path("canary").touch()',
    'def n_layer(): pass',
    'class n_layer(open("canary", "w")): pass',
    'if open("canary", "w"): n_layer = 3',
    'for n_layer in [open("canary", "w")]: pass',
    'while open("canary", "w"): break',
    'with open("canary", "w"): pass',
    'try: open("canary", "w")\nfinally: pass',
    'assert open("canary", "w")',
    'del n_layer',
    'global n_layer',
    'raise SystemExit',
    '@open("canary", "w")\ndef f(): pass',
])
def test_nothing_in_a_config_file_is_executed(project, code):
    (project.path / "canary.py").write_text('open("canary", "w")', encoding="utf-8")
    assert "mine.py:" in project.refuse(str(config(project.path, code)))
    assert not (project.path / "canary").exists()


@pytest.mark.parametrize("value", [
    "9**9**9", "9**9**9**9", "2**2**2**2**2**2", "10**(10**10)", "(9**9)**(9**9)", "-9**9**9", "9.0**9**9", "0**-1",
    "'a' * 10**12", "1 << 10**12", "~1", "9" * 5000, "((((10**6)**64)*((10**6)**64))**9)**9",
    "*".join(["(10**6)**64"] * 12), "*".join(["(10**6)**64"] * 2000),
    "-" * 900 + "1", "-" * 5000 + "1", "(" * 5000, "[" * 50_000, "not " * 20_000 + "1", "1" + "+1" * 900 + "+x",
    "1" + "+1" * 20_000 + "+x", "x." * 20_000 + "x", "'" + "a" * 10_000 + "'",
])
def test_no_value_can_fill_the_memory_or_exhaust_the_stack(tmp_path, value):
    began = time.perf_counter()
    for key in ("n_layer", "learning_rate", "bias"):
        try:
            s = settings(config(tmp_path, f"{key} = {value}"))
            train.check(s)
            assert len(str(getattr(s, key))) < 20
        except train.UserError as error:
            assert "\n" not in str(error)
    assert time.perf_counter() - began < 10


def mistakes():
    """Command lines beside the tiny settings, and what the one line must say."""
    yield "--n_layr=3", ["n_layr", "n_layer"]
    yield "--n_layr", ["n_layr", "n_layer"]
    yield "--n_layer", ["n_layer", "value"]
    yield "--xyzzy=3", ["xyzzy", "--help"]
    yield "--n_layer=three", ["n_layer", "three"]
    yield "--n_layer=2.5", ["n_layer", "2.5"]
    yield "--n_layer=", ["n_layer"]
    yield "--n_layer=nan", ["n_layer", "nan"]
    yield "--learning_rate=fast", ["learning_rate", "fast"]
    yield "--learning_rate=inf", ["learning_rate", "inf"]
    yield "--learning_rate=nan", ["learning_rate", "nan"]
    yield "--bias=perhaps", ["bias", "perhaps"]
    yield "--optimizer=moun", ["moun", "muon"]
    yield "--init_from=resum", ["resum", "resume"]
    yield "--dtype=fp16", ["fp16", "float16"]
    yield "--size=gpt3", ["gpt3", "gpt2"]
    yield "n_layer=3", ["n_layer=3", "--"]
    yield "-n_layer=3", ["-n_layer=3", "--"]
    yield "absent.py", ["absent.py"]
    yield "mime.py", ["mime.py"]
    yield "data", ["data"]
    yield "data/tiny/train.bin", ["train.bin"]
    yield "out.pt", ["out.pt"]
    yield "--dataset=absent", ["absent", "prepare.py"]
    yield "--dataset=data/absent", ["absent", "prepare.py"]
    yield "--init_from=resume", ["ckpt.pt", "train.py"]
    yield "--init_from=resume --out_dir=elsewhere", ["elsewhere"]
    yield "--device=gpu", ["gpu", "cuda"]
    yield "--device=cuda:99", ["cuda:99"]
    yield "--device=meta", ["meta"]
    yield "--out_dir=mine.py", ["mine.py"]
    yield "--out_dir=mine.py/below", ["mine.py"]
    yield "--vocab_size=3", ["vocab_size", "3"]
    yield "--block_size=1000", ["block_size", "1000", "val.bin"]
    yield "--block_size=100000", ["block_size", "100000"]
    yield "--n_embd=30 --n_head=4", ["n_embd", "30", "n_head", "4"]
    yield "--n_embd=30 --n_head=2", ["rope", "learned"]  # heads of 15 channels cannot be rotated in pairs
    yield "--seed=1e30", ["seed"]
    for key in ("block_size", "n_head", "n_embd", "batch_size", "gradient_accumulation_steps", "max_iters",
                "log_interval", "eval_interval", "vocab_multiple"):
        yield f"--{key}=0", [key, "0"]
    for key in ("n_layer", "vocab_size", "eval_iters", "warmup_iters", "lr_decay_iters", "seed", "learning_rate",
                "min_lr", "weight_decay", "grad_clip", "dropout", "beta1", "beta2", "momentum", "decay_share"):
        yield f"--{key}=-1", [key, "-1"]
    for key in ("dropout", "beta1", "beta2", "momentum"):
        yield f"--{key}=1", [key, "1"]


@pytest.mark.parametrize("argv, words", list(mistakes()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_is_one_line_and_leaves_nothing_behind(project, argv, words):
    import torch
    torch.save({"model": torch.zeros(9)}, project.path / "out.pt")
    config(project.path, "n_layer = 1")
    line = project.refuse(*argv.split())
    for word in words:
        assert word in line


def test_a_near_name_is_offered_for_a_missing_config_file(project):
    (project.path / "config").mkdir()
    config(project.path / "config", "n_layer = 1", "train_char.py")
    assert "config/train_char.py" in project.refuse("config/train_chr.py")


def test_inconsistent_settings_are_refused_before_any_work():
    for argv in (["--n_embd=30", "--n_head=4"], ["--n_head=0"], ["--dropout=1"], ["--decay_share=0"],
                 ["--n_embd=30", "--n_head=2"], ["--seed=1e30"]):
        with pytest.raises(train.UserError):
            train.check(settings(*argv))
    train.check(settings("--n_embd=30", "--n_head=2", "--position=learned"))
    train.check(settings("--seed=4294967295"))
    train.check(DEFAULT)


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
        for key, value, where in train.read_config(path):
            assert isinstance(key, str) and where.startswith(str(path))
            assert isinstance(value, (bool, int, float, str))
        train.check(settings(path))
    except train.UserError as error:
        assert "\n" not in str(error)


WORDS = st.one_of(st.text(), st.integers().map(str), st.floats().map(str),
                  st.sampled_from(["", "True", "no", "1e5", "1e400", "-1", "½", "٣", "1_0", "0x1", "9" * 5000, "muon"]))
FLAGS = st.one_of(
    st.builds("--{}={}".format, st.sampled_from([spec.name for spec in fields(train.Settings)]), WORDS),
    st.builds("--{}={}".format, st.text(), WORDS), st.sampled_from(["--bias", "--n_layer", "--", "-", "--=", "="]),
    st.text().map("--".__add__), WORDS)


@given(st.lists(FLAGS, max_size=5))
def test_any_command_line_is_understood_or_refused(argv):
    s = train.Settings()
    try:
        assert train.override(s, argv) is s
        train.check(s)
    except train.UserError as error:
        assert str(error)
        return
    for spec in fields(s):
        assert type(getattr(s, spec.name)) is spec.type


# Importing.


def test_importing_is_free(tmp_path):
    """No output, no argv, no device, no signal handler, no random number, no other module of the project, no file."""
    program = """
import signal, sys
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import torch
state = torch.get_rng_state()
import train
assert torch.equal(state, torch.get_rng_state())
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert not {"sample", "prepare"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program, "--bogus=1", "absent.py"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(Path(tmp_path).iterdir())
