"""Mistakes that people make: one line that names what was found and what to do, exit status 2, and nothing written."""
import random
import signal
import zipfile

import pytest
from conftest import TINY, Project

MODEL = "--device=cpu --dtype=float32 --max_new_tokens=3".split()

# Arguments, and words of the error message.
PREPARE = [
    ("missing.txt", ["missing.txt"]),
    ("shakespear", ["shakespear", "did you mean shakespeare?"]),
    ("finweb", ["finweb", "did you mean fineweb?"]),
    ("", ["no file"]),
    ("good.txt missing.txt", ["missing.txt"]),
    ("http://", ["http://"]),
    ("ftp://127.0.0.1/a.txt", ["ftp://"]),
    ("empty.txt", ["0 characters"]),
    ("hollow", ["0 characters"]),
    ("one.txt", ["1 character", "empty split"]),
    ("nul.txt", ["nul.txt", "NUL"]),
    ("binary.dat", ["binary.dat", "--tokenizer=byte"]),
    ("latin.txt", ["latin.txt", "0xe9", "position 6", "--tokenizer=byte"]),
    ("cut.txt", ["cut.txt", "--tokenizer=byte"]),
    ("utf16.txt", ["utf16.txt", "--tokenizer=byte"]),
    ("fake.txt.gz", ["fake.txt.gz", "gzip"]),
    ("corrupt.zip", ["corrupt.zip"]),
    ("broken.xml", ["broken.xml"]),
    ("rss.xml", ["rename it to .txt"]),
    ("entity.xml", ["&nosuch;"]),
    ("out/ckpt.pt", ["ckpt.pt", "--tokenizer=byte"]),
    ("good.txt --tokenizer=gpt-2", ["gpt-2", "gpt2"]),
    ("good.txt --tokenizer", ["--tokenizer", "argument"]),
    ("good.txt --val_fraction=2", ["--val_fraction=2"]),
    ("good.txt --val_fraction=10%", ["--val_fraction", "10%"]),
    ("good.txt --name=../out", ["--name=../out"]),
    ("good.txt --name=..", ["--name=.."]),
    ("good.txt --name=hub", ["--name=hub"]),
    ("good.txt --name=precious", ["diary.txt", "--name"]),
    ("good.txt --tokeniser=char", ["--tokeniser"]),
    ("fineweb --shards=0", ["--shards=0", "1 to 103"]),
    ("fineweb good.txt", ["fineweb", "combined"]),
    ("fineweb --shards=all", ["--shards", "all"]),
]
TRAIN = [
    ("--n_layr=3", ["n_layr", "did you mean n_layer?"]),
    ("--xyzzy=3", ["xyzzy", "--help"]),
    ("n_layer=3", ["n_layer=3", "--key=value"]),
    ("--n_layer", ["n_layer", "needs a value"]),
    ("--n_layer=2.5", ["n_layer=2.5", "int"]),
    ("--n_layer=nan", ["n_layer=nan", "int"]),
    ("--n_layer=" + "9" * 5000, ["n_layer=9", "int"]),
    ("--learning_rate=fast", ["learning_rate=fast", "float"]),
    ("--bias=perhaps", ["bias=perhaps", "True, False"]),
    ("--dtype=int4", ["dtype=int4", "bfloat16"]),
    ("--compile=maybe", ["compile=maybe", "auto"]),
    ("--optimizer=sgd", ["optimizer=sgd", "muon, adamw"]),
    ("--n_embd=0", ["n_embd=0", "at least 1"]),
    ("--seed=-1", ["seed=-1", "at least 0"]),
    ("--learning_rate=nan", ["learning_rate=nan", "at least 0"]),
    ("--dropout=1.5", ["dropout=1.5", "below 1"]),
    ("--n_embd=32 --n_head=5", ["n_embd=32", "n_head=5", "--n_embd=160"]),
    ("--block_size=100000", ["block_size=100000", "more text"]),
    ("--dataset=short", ["block_size=16", "data/short", "more text"]),
    ("--device=banana", ["device=banana", "--device=auto"]),
    ("--device=cuda:1000", ["device=cuda:1000", "--device=auto"]),
    ("--init_from=resum", ["init_from=resum", "did you mean resume?"]),
    ("--init_from=gpt3", ["init_from=gpt3", "did you mean gpt2?"]),
    ("--init_from=good.txt", ["good.txt", "GPT-2"]),
    ("--init_from=hollow", ["hollow", "GPT-2"]),
    ("--init_from=gpt-like", ["gpt-like", "GPT-2"]),
    ("--dataset=absent", ["data/absent", "prepare.py", "--name=absent"]),
    ("--dataset=shirt", ["data/shirt", "did you mean short?"]),
    ("--dataset=cut", ["train.bin", "bytes", "prepare.py"]),
    ("--dataset=hollow", ["meta.json", "prepare.py"]),
    ("--out_dir=good.txt", ["good.txt", "--out_dir"]),
    ("missing.py", ["missing.py"]),
    ("config/train_chr.py", ["did you mean config/train_char.py?"]),
    ("hollow", ["hollow", "directory"]),
    ("calls.py", ["calls.py:2", "key = value"]),
    ("--init_from=resume --out_dir=absent", ["absent", "--out_dir"]),
    ("--init_from=resume --out_dir=text", ["text/ckpt.pt", "not a checkpoint"]),
    ("--init_from=resume --n_layer=2", ["n_layer=2", "1"]),
    ("--init_from=resume --optimizer=adamw", ["optimizer=adamw", "muon"]),
    ("--init_from=resume --dataset=other", ["dataset=other", "tokenizer"]),
]
SAMPLE = [
    ("--out_dir=absent", ["absent", "train.py"]),
    ("--out_dir=text", ["text/best.pt", "not a checkpoint", "--ckpt=text/ckpt.pt"]),
    ("--ckpt=absent.pt", ["absent.pt"]),
    ("--ckpt=good.txt", ["good.txt", "not a checkpoint"]),
    ("--ckpt=out", ["out", "not a checkpoint"]),
    ("--start=FILE:missing.txt", ["missing.txt"]),
    ("--start=FILE:hollow", ["hollow", "directory"]),
    ("--start=FILE:latin.txt", ["latin.txt", "0xe9", "position 6"]),
    ("--start=日本", ["日", "U+65E5", "--tokenizer=byte"]),
    ("--temperature=hot", ["temperature=hot", "float"]),
    ("--top_p=1.5", ["top_p=1.5", "at most 1"]),
    ("--num_samples=0", ["num_samples=0", "at least 1"]),
    ("--max_new_tokens=-3", ["max_new_tokens=-3", "at least 0"]),
    ("--temperature=nan", ["temperature=nan", "at least 0"]),
    ("--seed=1e30", ["seed=1000", "at most"]),
    ("--device=banana", ["device=banana", "--device=auto"]),
    ("--dtype=int4", ["dtype=int4", "float32"]),
    ("--temprature=1", ["temprature", "did you mean temperature?"]),
    ("--init_from=gpt3", ["init_from=gpt3", "did you mean gpt2?"]),
    ("--init_from=gpt-like", ["gpt-like", "GPT-2"]),
    ("--ckpt=old.pt", ["old.pt", "format 1"]),
    ("--ckpt=torn.pt", ["torn.pt", "do not match"]),
    ("--ckpt=tokenizer.pt", ["unknown tokenizer"]),
    ("--plot=missing", ["missing", "log.jsonl"]),
    ("--plot", ["plot", "needs a value"]),
    ("--show=weights", ["show=weights", "attention, probabilities"]),
    ("--follow --plot=out", ["--plot and --follow"]),
    ("--export=out", ["export=out", "new"]),
    ("--export=new --score=good.txt", ["--export", "--score"]),
    ("--score=missing.txt", ["missing.txt"]),
    ("--score=hollow", ["hollow"]),
    ("--score=empty.txt", ["empty.txt"]),
    ("--score=percent.txt", ["'%'", "--tokenizer=byte"]),
]
MISTAKES = [(script, argv.split(" ") if isinstance(argv, str) else argv, words)
            for script, rows in (("prepare", PREPARE), ("train", TRAIN), ("sample", SAMPLE)) for argv, words in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dataset, a trained model and many invalid files. No test changes it."""
    import torch

    import train
    path = tmp_path_factory.mktemp("mistakes")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        project = Project(path, None)
        assert train.main([*TINY, "--max_iters=2"]) == 0
        project.dataset("short", "all of it" * 10)
        project.dataset("other", "all of it" * 100)
        with open(project.dataset("cut", "all of it" * 10) / "train.bin", "ab") as file:
            file.write(b"more")
        for name in ("hollow", "data/hollow", "folder/ckpt.pt", "text", "gpt-like", "config",
                     "data/downloads", "data/precious"):
            (path / name).mkdir(parents=True)
        for name, data in {
            "good.txt": b"all work and no play\n" * 20, "empty.txt": b"", "one.txt": b"x",
            "binary.dat": b"GIF8\0" + random.Random(1).randbytes(500), "latin.txt": "voila é\n".encode("latin-1"),
            "cut.txt": b"ab\xe6\x97", "utf16.txt": "text".encode("utf-16"), "fake.txt.gz": b"no archive",
            "percent.txt": b"a cat %\n", "text/ckpt.pt": b"no checkpoint", "text/best.pt": b"cut",
            "data/hollow/meta.json": b"",
            "gpt-like/config.json": b'{"model_type": "llama"}', "config/train_char.py": b"n_layer = 1\n",
            "calls.py": b"n_layer = 3\nn_head = int('4')\n", "nul.txt": b"abc\0def", "data/precious/diary.txt": b"mine",
            "broken.xml": b"<TEI><body><p>never closed</body></TEI>", "rss.xml": b"<rss><item>news</item></rss>",
            "entity.xml": b'<!DOCTYPE x SYSTEM "x.dtd"><TEI><body><p>&nosuch;</p></body></TEI>',
        }.items():
            (path / name).write_bytes(data)
        with zipfile.ZipFile("corrupt.zip", "w") as archive:
            archive.writestr("a.txt", "x" * 99)
        data = bytearray((path / "corrupt.zip").read_bytes())
        data[60] ^= 1  # the CRC differs
        (path / "corrupt.zip").write_bytes(data)
        checkpoint = project.checkpoint()
        torch.save(checkpoint | dict(format=1), "old.pt")
        torch.save(checkpoint | dict(tokenizer=dict(kind="python", code="1")), "tokenizer.pt")
        torch.save(checkpoint | dict(config=checkpoint["config"] | dict(n_embd=64)), "torn.pt")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return path


def listing(path):
    """The size and modification time of everything in a folder."""
    return {found: (found.stat().st_size, found.stat().st_mtime_ns) for found in path.rglob("*")}


@pytest.mark.parametrize("script, argv, words", MISTAKES, ids=[f"{s} {' '.join(a)[:50]!r}" for s, a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(folder, script, argv, words, monkeypatch, capsys):
    import prepare
    import sample
    import train
    monkeypatch.chdir(folder)
    before = listing(folder)
    given = [*{"prepare": [], "train": TINY, "sample": MODEL}[script], *argv]
    try:
        status = {"prepare": prepare, "train": train, "sample": sample}[script].main(given)
    except SystemExit as error:  # argparse
        status = error.code
    written = capsys.readouterr()
    assert status == 2, written.err or written.out
    assert written.err.startswith(f"{script}.py: ") and written.err.count("\n") == 1 and written.err.endswith("\n")
    assert "Traceback" not in written.err and len(written.err) < 1000
    for word in words:
        assert word in written.err
    assert listing(folder) == before, "something was written"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(name, monkeypatch):
    """auto would take the CPU."""
    import torch

    import train
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(train.UserError, match="4 processes on 2 GPUs"):
        train.get_device(name, local_rank=3, local_size=4)


@pytest.mark.parametrize("change", ["text", "split"])
def test_resuming_with_another_text_of_the_same_characters_is_a_note(project, change):
    project.train()
    assert project.train("--init_from=resume", "--max_iters=30").err == ""
    text = project.text[::-1] if change == "text" else project.text
    project.dataset("tiny", text[:-500], val=text[-500:])
    line = project.train("--init_from=resume", "--max_iters=40").err
    assert line.count("\n") == 1 and line.startswith("note: dataset=tiny")
    assert project.checkpoint()["progress"]["step"] == 40
