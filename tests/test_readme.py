"""The README's commands run, and the files it names exist."""
import io
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import prepare
import sample
import train

README = ROOT / "README.md"
TEXT = ("ROMEO: Once more I come. To be, or not to be? Scr. Romae.\n"
        "JULIET: What, art thou come again? Good night, good night!\n") * 40
TINY = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 "
        "--max_iters=2 --eval_iters=1 --compile=False").split()


def commands():
    """The single commands of the README's sh blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [c.strip() for block in blocks for line in block.splitlines() for c in line.split("&&") if c.strip()]


def test_named_files_exist():
    named = set(re.findall(r"(?<!PATH/)\b(?:config|tests)/[\w/]+\.py\b|\b(?:prepare|train|sample)\.py\b|\bLICENSE\b",
                           README.read_text(encoding="utf-8")))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_figure_is_missing():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README.read_text(encoding="utf-8"))


@pytest.fixture
def clone(project, server, byte_level_gpt2, tmp_path, monkeypatch):
    """The scripts and configs in a folder with some texts, and a server with the corpora."""
    for name in ("config", "train.py", "prepare.py", "sample.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "notes").mkdir()
    for name in ("book.txt", "notes/a.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    server.files["book.txt"] = TEXT.encode()
    for name in ("shakespeare", "atticus"):
        monkeypatch.setitem(prepare.CORPORA, name, (f"{server.url}/book.txt", None))


def run(command, monkeypatch):
    """Run one command of the README at a tiny size, in this process if possible. Returns its exit status."""
    if " | " in command:
        echo, command = command.split(" | ")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(shlex.split(echo)[1].encode()), encoding="utf-8"))
    program, *args = shlex.split(command.replace("--device=cuda", "--device=cpu"))
    if program == "torchrun":
        process, script = args[0], args[1]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", process, script, *args[2:], *TINY]
        return subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).returncode
    assert program == "python", command
    script, *args = args
    if script == "train.py":
        # the model of a resumed run is that of the checkpoint
        return train.main(args + (["--max_iters=4"] if "--init_from=resume" in args else TINY))
    if script == "sample.py":
        return sample.main([*args, "--max_new_tokens=5"])
    assert script == "prepare.py", command
    return prepare.main(args)


def test_the_arguments_of_every_command_are_valid(monkeypatch):
    """Also of those that need GPUs, a network or minutes, in code and in text."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(prepare, "prepare", lambda *args: None)
    monkeypatch.setattr(prepare, "prepare_fineweb", lambda *args: None)
    found = re.findall(r"\b(?:python|torchrun)\b[^`\n]*?\b(prepare|train|sample)\.py((?: [^`|;&\n]*)?)",
                       README.read_text(encoding="utf-8"))
    for script, words in found:
        argv = [word for word in shlex.split(words) if not word.startswith(("PATH/", "out/"))]
        if script == "prepare" and "--help" not in argv:
            assert prepare.main(argv) == 0
        elif "--help" not in argv and "[" not in words:
            module = train if script == "train" else sample
            module.check(module.Settings(**train.parse_args(module.Settings, argv)[0]))
    assert len(found) > 20


def test_every_command_runs(clone, monkeypatch):
    ran = []
    for command in commands():
        if command.startswith(("pip install", "pytest")):
            continue
        assert run(command, monkeypatch) == 0, command
        ran.append(command.split()[0])
    assert ran.count("python") > 10 and "torchrun" in ran
