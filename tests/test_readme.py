"""The README's commands run, its tables of settings and sections are the code's, and the files it names exist.

`python tests/test_readme.py` rewrites the tables.
"""
import dataclasses
import http.server
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

README = ROOT / "README.md"
TEXT = ("ROMEO: Once more I come. To be, or not to be? Scr. Romae.\n"
        "JULIET: What, art thou come again? Good night, good night!\n") * 40
TINY = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 "
        "--max_iters=2 --eval_iters=1 --compile=False").split()


def settings_table():
    """The README's table of settings, from the dataclass."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for spec in dataclasses.fields(train.Settings):
        choices = ", ".join(f"`{c}`" for c in spec.metadata["choices"] or () if c)
        default = f"`{spec.default}`" if spec.default != "" else ""
        rows.append(f"| `{spec.name}` | {default} | {spec.metadata['reason']}{': ' * bool(choices)}{choices} |")
    return "\n".join(rows)


def sections_table():
    """The README's map of train.py: what each section defines, and how long it is."""
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    rows = ["| section | lines | what it defines |", "|---|---|---|"]
    for section in re.split(r"^# -{20,}\n# ", text, flags=re.MULTILINE)[1:]:
        title, names = re.match(r"[^.:]+", section)[0], re.findall(r"^(?:def|class) (\w+)", section, flags=re.MULTILINE)
        rows.append(f"| {title} | {section.count(chr(10))} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join([*rows, f"| all | {text.count(chr(10)):,} | |"])


def with_tables(text):
    """The README's text with both tables put between their marks."""
    for name, table in (("settings", settings_table()), ("sections", sections_table())):
        text = re.sub(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- end of {name} -->)",
                      lambda m, table=table: m[1] + table + "\n" + m[2], text, flags=re.DOTALL)
    return text


def commands():
    """The single commands of the README's sh blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [c.strip() for block in blocks for line in block.splitlines() for c in line.split("&&") if c.strip()]


def test_tables_are_current():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python tests/test_readme.py"
    assert "| `max_iters` |" in text and "| Model |" in text and "`fit`" in text


def test_named_files_exist():
    named = set(re.findall(r"\b(?:config|tests)/[\w/]+\.py\b|\b(?:prepare|train|sample)\.py\b|\bLICENSE\b",
                           README.read_text(encoding="utf-8")))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_figure_is_missing():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README.read_text(encoding="utf-8"))


@pytest.fixture
def newcomer(project, tmp_path, monkeypatch):
    """A folder with what a clone holds and a text of one's own, and no network but a loopback server of Shakespeare."""
    for name in ("config", "train.py", "prepare.py", "sample.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shakespeare.txt"
    for name in ("shakespeare", "atticus"):
        monkeypatch.setitem(prepare.CORPORA, name, prepare.Corpus("", url))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    import tiktoken
    letters = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 256}
    small = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=letters, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    yield tmp_path
    server.shutdown()


def run(command, monkeypatch):
    """Run one command of the README at a tiny size, in this process where that is the same."""
    if " | " in command:
        said, command = command.split(" | ")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(shlex.split(said)[1].encode()), encoding="utf-8"))
    program, *args = shlex.split(command.replace("--device=cuda", "--device=cpu"))
    if program == "torchrun":
        process, script = args[0], args[1]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", process, script, *args[2:], *TINY]
        return subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).returncode
    assert program == "python", command
    script, *args = args
    if script == "train.py":
        # a resumed run keeps the size it has
        return train.main(args + (["--max_iters=4"] if "--init_from=resume" in args else TINY))
    if script == "sample.py":
        return sample.main([*args, "--max_new_tokens=5"])
    assert script == "prepare.py", command
    return prepare.main(args)


def test_every_command_is_understood(monkeypatch):
    """Also those that need GPUs, a network or minutes, wherever in the README they stand."""
    monkeypatch.chdir(ROOT)
    found = re.findall(r"\b(?:python|torchrun)\b[^`\n]*?\b(prepare|train|sample)\.py((?: [^`|;&\n]*)?)",
                       README.read_text(encoding="utf-8"))
    understand = dict(prepare=prepare.parse, train=lambda argv: train.override(train.Settings(), argv),
                      sample=lambda argv: train.override(sample.Settings(), sample.join_folders(argv)))
    for script, words in found:
        if "--help" not in words and "[" not in words:
            understand[script]([word for word in shlex.split(words) if word != "..."])
    assert len(found) > 40


def test_every_command_runs(newcomer, monkeypatch):
    ran = []
    for command in commands():
        if command.startswith(("pip install", "pytest")):
            continue
        assert run(command, monkeypatch) == 0, command
        ran.append(command.split()[0])
    assert ran.count("python") > 10 and "torchrun" in ran


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
