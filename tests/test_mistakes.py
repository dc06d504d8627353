"""Mistakes that people make: each is one line that names the value and the remedy, status 2, and nothing is written."""
import json
import math
import random
import signal
import zipfile

import pytest
from conftest import TINY, Project

MODEL = "--device=cpu --dtype=float32 --max_new_tokens=3".split()
LONG = "x" * 300  # longer than any file system's names

# What is typed, and the words that the line must hold: the value found, and what to do instead.
PREPARE = [
    ("missing.txt", ["missing.txt", "--help"]),
    ("latim.txt", ["latim.txt", "did you mean latin.txt?"]),
    ("shakespear", ["shakespear", "shakespeare"]),
    (LONG, [LONG[:100]]),
    ("empty.txt", ["empty"]),
    ("one.txt", ["1 character", "more text"]),
    ("hollow", ["hollow", "no files"]),
    ("binary.dat", ["binary.dat", "offset 4", "--tokenizer=byte"]),
    ("latin.txt", ["latin.txt", "0xe9", "offset 6", "--tokenizer=byte"]),
    ("good.txt latin.txt", ["latin.txt", "0xe9", "offset 6"]),
    ("cut.txt", ["cut.txt", "0xe6", "offset 2", "--tokenizer=byte"]),
    ("utf16.txt", ["utf16.txt", "UTF-16", "iconv"]),
    ("fake.zip", ["fake.zip"]),
    ("fake.txt.gz", ["fake.txt.gz"]),
    ("out/ckpt.pt", ["ckpt.pt", "offset"]),
    ("good.txt --tokenizer=word", ["word", "char", "byte"]),
    ("good.txt --tokenizer=gpt-2", ["gpt-2", "gpt2"]),
    ("good.txt --tokenizer=", ["there is no tokenizer", "char"]),
    ("good.txt --tokenizer", ["--tokenizer", "argument"]),
    ("good.txt --val_fraction=2", ["--val_fraction=2", "--val_fraction=0.1"]),
    ("good.txt --val_fraction=0", ["--val_fraction=0", "between 0 and 1"]),
    ("good.txt --val_fraction=-0.1", ["--val_fraction=-0.1", "between 0 and 1"]),
    ("good.txt --val_fraction=10%", ["10%", "--val_fraction=0.1"]),
    ("good.txt --val_fraction=1e-400", ["1e-400", "--val_fraction=0.1"]),
    ("good.txt --name=../out", ["../out", "--name"]),
    ("good.txt --name=", ["--name"]),
    (["good.txt", f"--name={LONG}"], [LONG[:100]]),
    ("good.txt --tokeniser=char", ["--tokeniser", "--tokenizer"]),
    ("good.txt --out_dir=x", ["--out_dir", "--help"]),
    ("ftp://127.0.0.1/a.txt", ["ftp://127.0.0.1/a.txt", "http"]),
    ("http://", ["http://"]),
    ("finweb", ["finweb", "fineweb"]),
    ("fineweb good.txt", ["fineweb", "alone"]),
    ("fineweb --tokenizer=char", ["--tokenizer=char", "gpt2", "leave it out"]),
    ("fineweb --val_fraction=0.1", ["--val_fraction=0.1", "leave it out"]),
    ("fineweb --shards=0", ["--shards=0", "1 to 103"]),
    ("fineweb --shards=104", ["--shards=104", "1 to 103"]),
    ("fineweb --shards=all", ["--shards=all", "1 to 103"]),
    ("fineweb --shards=" + "9" * 5000, ["--shards=999", "1 to 103"]),
    ("fineweb --shards", ["--shards", "argument"]),
    ("fineweb --name=../x", ["--name=../x"]),
    ("good.txt --shards=3", ["--shards=3", "fineweb"]),
    ("--shards=3", ["--shards=3", "fineweb"]),
]
TRAIN = [
    ("--n_layr=3", ["n_layr", "n_layer"]),
    ("n_layer=3", ["n_layer=3", "--key=value"]),
    ("--n_layer", ["--n_layer", "needs a value"]),
    ("--n_layer=two", ["n_layer=two", "whole number"]),
    ("--n_layer=1e12", ["n_layer=", "below 10000"]),
    ("--n_layer=" + "9" * 5000, ["n_layer=", "whole number"]),
    ("--n_embd=0", ["n_embd=0", "at least 1"]),
    ("--n_embd=1e18", ["n_embd=", "below"]),
    ("--n_embd=30", ["n_embd=30", "--position=learned"]),
    ("--n_embd=32 --n_head=5", ["n_embd=32", "n_head=5", "--n_head=4"]),
    ("--block_size=-16", ["block_size=-16", "at least 1"]),
    ("--block_size=100000", ["block_size=100000", "--block_size="]),
    ("--dataset=short", ["block_size=16", "val.bin", "(9 tokens)", "--block_size=4"]),
    ("--batch_size=0", ["batch_size=0", "at least 1"]),
    ("--batch_size=1e15", ["batch_size=", "below"]),
    ("--gradient_accumulation_steps=1e15", ["gradient_accumulation_steps=", "below"]),
    ("--max_iters=-1", ["max_iters=-1", "at least 1"]),
    ("--max_iters=1e300", ["max_iters=", "whole number"]),
    ("--max_iters=many", ["max_iters=many", "whole number"]),
    ("--learning_rate=nan", ["learning_rate=nan", "--learning_rate=0.005"]),
    ("--learning_rate=-1", ["learning_rate=-1", "at least 0"]),
    ("--dropout=1.5", ["dropout=1.5", "below 1"]),
    ("--grad_clip=-1", ["grad_clip=-1", "at least 0"]),
    ("--checkpoint_minutes=-1", ["checkpoint_minutes=-1", "at least 0"]),
    ("--checkpoint_minutes=soon", ["checkpoint_minutes=soon", "number"]),
    ("--eval_interval=0", ["eval_interval=0", "at least 1"]),
    ("--device=banana", ["device=banana", "--device=auto"]),
    ("--device=cuda:1000", ["device=cuda:1000", "--device=auto"]),
    ("--dtype=int4", ["dtype=int4", "bfloat16"]),
    ("--compile=maybe", ["compile=maybe", "auto"]),
    ("--optimizer=sgd", ["optimizer=sgd", "muon"]),
    ("--init_from=gpt3", ["init_from=gpt3", "gpt2"]),
    ("--init_from=again", ["init_from=again", "resume", "distilgpt2"]),
    ("--init_from=good.txt", ["config.json", "No such file"]),
    ("--init_from=hollow", ["hollow", "config.json"]),
    ("--init_from=gpt-like", ["gpt-like/config.json", "model_type=llama", "gpt2"]),
    ("--train_last=2", ["train_last=2", "--train_last=1"]),
    ("--train_last=-1", ["train_last=-1", "at least 0"]),
    ("--seed=-1", ["seed=-1", "at least 0"]),
    ("--seed=1e30", ["seed=", "whole number"]),
    ("--vocab_size=3", ["vocab_size=3", "leave it out"]),
    ("--dataset=absent", ["data/absent", "prepare.py TEXT --name=absent"]),
    ("--dataset=shirt", ["data/shirt", "--dataset=short"]),
    ("--dataset=./latin.txt", ["latin.txt", "prepare.py ./latin.txt --name=mine"]),
    ("latin.txt", ["latin.txt", "prepare.py latin.txt"]),
    ("--dataset=fineweb", ["data/fineweb", "prepare.py fineweb"]),
    ("--dataset=good.txt", ["good.txt", "prepare.py"]),
    ("--dataset=out", ["data/out", "prepare.py"]),
    (f"--dataset={LONG}", ["meta.json", "prepare.py"]),
    ("--dataset=cut", ["train.bin", "bytes", "prepare.py"]),
    ("--dataset=hollow", ["meta.json", "prepare.py"]),
    ("--dataset=float", ["meta.json", "prepare.py"]),
    ("--dataset=unsplit", ["meta.json", "prepare.py"]),
    ("--out_dir=good.txt", ["good.txt", "--out_dir"]),
    ("--out_dir=good.txt/out", ["good.txt/out", "--out_dir"]),
    (f"--out_dir={LONG}", [LONG[:100], "--out_dir"]),
    ("null.py --max_iters=1", ["out_dir", "null"]),
    ("missing.py", ["missing.py", "config"]),
    ("hollow", ["hollow", "config"]),
    ("out/ckpt.pt", ["ckpt.pt:1", "key = value"]),
    ("latin.txt", ["latin.txt:1", "key = value"]),
    ("calls.py", ["calls.py:2", "key = value"]),
    ("--init_from=resume --out_dir=absent", ["absent", "--out_dir"]),
    ("--init_from=resume --out_dir=good.txt", ["good.txt", "checkpoint"]),
    (f"--init_from=resume --out_dir={LONG}", [LONG[:100]]),
    ("--init_from=resume --out_dir=hollow", ["hollow", "train.py"]),
    ("--init_from=resume --out_dir=text", ["ckpt.pt", "train anew"]),
    ("--init_from=resume --out_dir=folder", ["ckpt.pt", "directory"]),
    ("--init_from=resume --n_layer=2", ["n_layer=2", "has 1", "--out_dir"]),
    ("--init_from=resume --n_embd=64", ["n_embd=64", "has 32", "--out_dir"]),
    ("--init_from=resume --optimizer=adamw", ["optimizer=adamw", "has muon"]),
    ("--init_from=resume --dataset=short", ["dataset=short", "tokenizer"]),
    ("--init_from=resume --train_last=1", ["train_last=1", "has 0"]),
]
SAMPLE = [
    ("--out_dir=absent", ["absent", "train.py"]),
    ("--out_dir=good.txt", ["good.txt"]),
    (f"--out_dir={LONG}", [LONG[:100]]),
    ("--out_dir=text", ["ckpt.pt", "train anew"]),
    ("--out_dir=folder", ["ckpt.pt", "directory"]),
    ("--ckpt=absent.pt", ["absent.pt", "train.py"]),
    ("--ckpt=good.txt", ["good.txt"]),
    ("--ckpt=out", ["ckpt=out is a folder", "--out_dir=out"]),
    ("--ckpt=out/log.jsonl", ["log.jsonl"]),
    ("--start=FILE:missing.txt", ["missing.txt", "--start=FILE:"]),
    ("--start=FILE:", ["start", "--start=FILE:"]),
    ("--start=FILE:hollow", ["hollow", "folder"]),
    ("--start=FILE:latin.txt", ["latin.txt", "0xe9", "offset 6"]),
    (f"--start=FILE:{LONG}", [LONG[:100]]),
    ("--start=FILE:empty.txt --per_line", ["empty.txt", "--start="]),
    ("--start=%", ["'%'", "--tokenizer=byte"]),
    ("--start=日本", ["日", "U+65E5"]),
    ("--temperature=-1", ["temperature=-1", "at least 0"]),
    ("--temperature=hot", ["temperature=hot", "number"]),
    ("--temperature=inf", ["temperature=inf", "number"]),
    ("--top_k=-1", ["top_k=-1", "at least 0"]),
    ("--top_k=many", ["top_k=many", "whole number"]),
    ("--top_p=0", ["top_p=0", "--top_p="]),
    ("--top_p=1.5", ["top_p=1.5", "at most 1"]),
    ("--min_p=2", ["min_p=2", "below 1"]),
    ("--repetition_penalty=0", ["repetition_penalty=0", "at least 0.01"]),
    ("--num_samples=0", ["num_samples=0", "at least 1"]),
    ("--num_samples=1e400", ["num_samples=", "whole number"]),
    ("--max_new_tokens=-5", ["max_new_tokens=-5", "at least 0"]),
    ("--seed=-1", ["seed=-1", "0"]),
    ("--device=banana", ["device=banana", "--device=auto"]),
    ("--dtype=int4", ["dtype=int4", "float32"]),
    ("--temprature=1", ["temprature", "temperature"]),
    ("--interactive --start=a", ["interactive", "--start"]),
    ("--init_from=gpt3", ["init_from=gpt3", "gpt2"]),
    ("--init_from=scratch", ["init_from=scratch", "--init_from=gpt2"]),
    ("--init_from=hollow", ["hollow", "config.json"]),
    ("--init_from=gpt-like", ["gpt-like/config.json", "model_type=llama"]),
    ("--init_from=hollow --ckpt=out/ckpt.pt", ["init_from=hollow", "ckpt=out/ckpt.pt"]),
    ("--export=hollow/../out", ["export=hollow/../out", "new"]),
    ("--export=good.txt", ["export=good.txt", "new"]),
    (f"--export={LONG}", [LONG[:100]]),
    ("--export=new --out_dir=absent", ["absent", "train.py"]),
    ("--export=new --score=good.txt", ["--export", "--score", "one"]),
    ("--score=missing.txt", ["missing.txt", "path"]),
    ("--score=hollow", ["hollow", "no files"]),
    ("--score=empty.txt", ["empty.txt"]),
    ("--score=latin.txt", ["latin.txt", "0xe9", "offset 6"]),
    ("--score=percent.txt", ["'%'", "--tokenizer=byte"]),
    ("--score=good.txt --start=a", ["--score", "--start"]),
    ("hello", ["hello", "--key=value"]),
    ("out/ckpt.pt", ["ckpt.pt:1", "key = value"]),
]
MISTAKES = [(script, argv.split(" ") if isinstance(argv, str) else argv, words)
            for script, rows in (("prepare", PREPARE), ("train", TRAIN), ("sample", SAMPLE)) for argv, words in rows]


def test_there_are_enough_of_them():
    assert len(MISTAKES) >= 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset, a trained model and many wrong things. Nothing may change in it, so one serves all."""
    import train
    path = tmp_path_factory.mktemp("mistakes")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
            patch.delenv(key, raising=False)
        patch.chdir(path)
        project = Project(path, None)
        assert train.main([*TINY, "--max_iters=2"]) == 0
        project.dataset("short", "all of it" * 10)
        project.dataset("unsplit", "all of it" * 10, tokens=dict(train=90, val=0), bytes=dict(train=90, val=0))
        project.dataset("float", "all of it" * 10, dtype="float64")
        with open(project.dataset("cut", "all of it" * 10) / "train.bin", "ab") as file:
            file.write(b"more")
        for name in ("hollow", "data/hollow", "folder/ckpt.pt", "text", "gpt-like"):
            (path / name).mkdir(parents=True)
        noise = random.Random(1).randbytes(500)
        for name, data in {
            "good.txt": b"all work and no play\n" * 20, "empty.txt": b"", "one.txt": b"x",
            "binary.dat": b"GIF8\0" + noise,
            "latin.txt": "voilà é".encode("latin-1").replace(b"\xe0", b"a") + b"\n", "cut.txt": b"ab\xe6\x97",
            "utf16.txt": "text".encode("utf-16"), "fake.zip": b"no archive", "fake.txt.gz": b"no archive",
            "gpt-like/config.json": b'{"model_type": "llama"}', "percent.txt": b"a cat %\n",
            "text/ckpt.pt": b"no checkpoint", "data/hollow/meta.json": b"",
            "calls.py": b"n_layer = 3\nn_head = int('4')\n", "null.py": b"out_dir = 'a\\0b'\n",
        }.items():
            (path / name).write_bytes(data)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return path


def listing(path):
    """Everything below a folder, with its size and time of change."""
    return {found: (found.stat().st_size, found.stat().st_mtime_ns) for found in path.rglob("*")}


@pytest.mark.parametrize("script, argv, words", MISTAKES, ids=[f"{s} {' '.join(a)[:50]}" for s, a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(folder, script, argv, words, monkeypatch, capsys):
    import prepare
    import sample
    import train
    monkeypatch.chdir(folder)
    before = listing(folder)
    given = [*{"prepare": [], "train": TINY, "sample": MODEL}[script], *argv]
    status = {"prepare": prepare, "train": train, "sample": sample}[script].main(given)
    written = capsys.readouterr()
    assert status == 2, written.err or written.out
    assert written.err.startswith(f"{script}.py: ") and written.err.count("\n") == 1 and written.err.endswith("\n")
    assert "Traceback" not in written.err and len(written.err) < 1000
    for word in words:
        assert word in written.err
    assert listing(folder) == before, "something was written"


def test_a_folder_that_cannot_be_written_is_one_line(project, monkeypatch):
    """Permissions do not bind everybody, so that the system's refusal is made up."""
    import train
    project.train("--max_iters=2")
    real = open

    def refuse(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(train, "open", refuse, raising=False)
    for argv in ([], ["--init_from=resume", "--max_iters=4"], ["--out_dir=new"]):
        line = project.refuse(*argv)
        assert "Permission denied" in line and "--out_dir" in line


@pytest.mark.parametrize("argv", ["--init_from=resume", ""])
def test_a_folder_that_cannot_be_read_is_one_line(project, monkeypatch, argv):
    import train
    project.train("--max_iters=2")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    monkeypatch.setattr(train.Path, "read_text", refuse)
    line = project.refuse(*argv.split())
    assert "ckpt.pt" in line or "meta.json" in line


def test_too_many_samples_for_the_memory_are_one_line(folder, monkeypatch, capsys):
    """What the CPU's allocator says, and the GPU's."""
    import torch

    import sample
    monkeypatch.chdir(folder)
    for error in (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()):

        def full(*args, error=error):
            raise error

        monkeypatch.setattr(sample, "Cache", full)
        assert sample.main([*MODEL, "--num_samples=1000000"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "memory" in line and "--num_samples" in line


def test_an_error_of_ours_is_not_passed_off_as_the_memory_s(folder, monkeypatch, capsys):
    """Some errors speak of memory and mean something else."""
    import sample
    import train
    monkeypatch.chdir(folder)

    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sample, "Cache", broken)
    with pytest.raises(RuntimeError):
        sample.main(MODEL)
    monkeypatch.setattr(train, "Run", broken)
    with pytest.raises(RuntimeError):
        train.main([*TINY, "--out_dir=hollow"])
    (folder / "hollow" / ".lock").unlink()


def test_top_k_0_is_off(folder, monkeypatch, capsys):
    import sample
    monkeypatch.chdir(folder)
    texts = []
    for k in (0, 10_000):
        assert sample.main([*MODEL, f"--top_k={k}", "--max_new_tokens=40"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_name_that_is_no_text_is_printed_all_the_same(project):
    """Bytes of a command line that are no UTF-8 reach Python as lone surrogates."""
    project.train("--max_iters=2", "--out_dir=caf\udce9")
    assert project.checkpoint("caf\udce9")["step"] == 2
    project.train("--init_from=resume", "--max_iters=4", "--out_dir=caf\udce9")
    assert "caf" in project.refuse("--out_dir=caf\udce9/log.jsonl")


def test_the_numbers_of_a_meta_json_may_be_anything(project):
    """Whatever its numbers are, a dataset is trained on or refused."""
    import train
    path = project.path / "data" / "tiny" / "meta.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    statuses = []
    draw = random.Random(3)
    for _ in range(60):
        meta, key = json.loads(json.dumps(good)), draw.choice(["vocab_size", "tokens", "bytes", "format", "characters"])
        value = draw.choice([0, 1, -1, 2**31, 2**53 + 1, 10**300, 1e308, math.nan, math.inf, True, "7", [], {}, None])
        if key in ("tokens", "bytes"):
            meta[key][draw.choice(["train", "val"])] = value
        else:
            meta[key] = value
        path.write_text(json.dumps(meta), encoding="utf-8")
        project.capsys.readouterr()
        status = train.main([*TINY, "--max_iters=1", "--out_dir=new"])
        error = project.capsys.readouterr().err
        assert status in (0, 1, 2) and error.count("\n") == (status > 0), (key, value, error)
        statuses.append(status)
    assert {0, 2} <= set(statuses)
