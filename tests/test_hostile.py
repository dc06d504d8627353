"""Files made to do harm by somebody who has read train.py, and moments chosen by somebody who has bad luck."""
import faulthandler
import io
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter, OrderedDict

import pytest
import torch
from conftest import TINY, same
from test_safety import CODE, Call, change_at, posix, put, replaced, resaved, state

import prepare
import sample
import train

RESUME = ["--init_from=resume", "--max_iters=30"]


@pytest.fixture
def trained(project):
    """A project with a run of 20 steps, and the bytes of its only checkpoint."""
    project.train("--eval_interval=20")
    return project, (project.path / "out" / "ckpt.pt").read_bytes()


@pytest.fixture
def in_time():
    """The end of all tests, and where it stood, instead of a wait that not even a signal ends."""
    faulthandler.dump_traceback_later(30, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def refuse(project, whole):
    """A checkpoint that neither train.py nor sample.py takes: one line, soon, without a warning beside it."""
    put(project, whole)
    began = time.monotonic()
    assert "ckpt.pt" in project.refuse("--init_from=resume")
    assert sample.main(["--ckpt=out/ckpt.pt", "--device=cpu", "--max_new_tokens=2"]) == 2
    line = project.capsys.readouterr().err
    assert line.count("\n") == 1 and "ckpt.pt" in line
    assert time.monotonic() - began < 5


# Pickles.


def laughs(kind, depth=30):
    """Some hundred values which, written out, are more than there is room or time for: 10**depth of them."""
    value = kind("x")
    for _ in range(depth):
        value = kind([value] * 10)
    return value


@pytest.mark.parametrize("value", [
    bytearray(5), Counter("ab"), {1, 2}, 1j, b"abc", torch.Size([1]), torch.float32, torch.device("cpu"),
    torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, device="meta"), torch.nn.Parameter(torch.zeros(3)), torch.zeros(3, dtype=torch.float64),
    laughs(list, 2)], ids=lambda value: f"{type(value).__name__} {str(value)[-24:]}")
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_read_that_no_run_writes(trained, value):
    """torch reads all of these; but bytearray(10**10), sparse tensors and the like are how a small file gets big."""
    project, whole = trained
    with pytest.raises(train.UserError):
        train.load_checkpoint(put(project, resaved(whole, more=value)))


@posix
@pytest.mark.parametrize("place", ["tokenizer", "kind", "bias", "n_layer", "norm", "optimizer"])
def test_a_billion_laughs_are_refused_at_once(trained, in_time, place):
    """They are shown in a message, compared or copied: each without end."""
    project, whole = trained
    joke, config = laughs(list), project.checkpoint()["config"]
    changes = {"tokenizer": dict(tokenizer=joke), "kind": dict(tokenizer=dict(kind=joke)),
               "optimizer": dict(optimizer={name: dict(momentum=joke) for name in project.checkpoint()["optimizer"]})}
    refuse(project, resaved(whole, **changes.get(place, dict(config=config | {place: joke}))))


@posix
def test_laughs_that_are_a_key_are_refused_before_they_are_read(trained, in_time):
    project, whole = trained
    key = b"K\1\x85" + b"".join(b"q%c(" % 9 + b"h\x09" * 9 + b"t" for _ in range(30))
    refuse(project, replaced(whole, "data.pkl", b"\x80\2}" + key + b"K\1s."))


@pytest.mark.parametrize("place", ["model", "optimizer", "tokenizer", "config"])
def test_a_dict_from_a_file_brings_no_methods_of_its_own(trained, place):
    """One whose `values` is another function than dict's could hide what it holds."""
    project, whole = trained
    checkpoint = project.checkpoint()
    if place == "model":
        joke = OrderedDict({name: torch.zeros(1).expand(2**33, 1024) for name in checkpoint["model"]})
    elif place == "optimizer":
        joke = checkpoint["optimizer"]["head.weight"] = OrderedDict(checkpoint["optimizer"]["head.weight"])
        joke["exp_avg"] = torch.zeros(1).expand(joke["exp_avg"].shape)
    else:
        joke = OrderedDict(checkpoint[place])
    joke.values = joke.items = joke.get = OrderedDict
    put(project, resaved(whole, **{place: checkpoint["optimizer"] if place == "optimizer" else joke}))
    assert "ckpt.pt" in project.refuse("--init_from=resume")
    if place != "optimizer":
        refuse(project, resaved(whole, **{place: joke}))


@pytest.mark.parametrize("first", [b"\x80\3", b"\x80\5", b""])
def test_another_pickle_protocol_is_no_second_line(trained, first, recwarn):
    project, whole = trained
    refuse(project, replaced(whole, "data.pkl", first + b"}."))
    assert not recwarn.list


@pytest.mark.parametrize("wrap", [b"%b", b"}X\5\0\0\0model%bs"])
def test_a_storage_in_a_dict_s_place_is_no_second_line(trained, recwarn, wrap):
    """torch warns of each use of one."""
    project, whole = trained
    size = len(zipfile.ZipFile(io.BytesIO(whole)).read("archive/data/0")) // 4
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuM" + struct.pack("<H", size) + b"tQ"
    refuse(project, replaced(whole, "data.pkl", b"\x80\2" + wrap % storage + b"."))
    assert not recwarn.list


def test_no_variable_of_the_environment_makes_a_pickle_run(trained, monkeypatch):
    project, whole = trained
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refuse(project, replaced(whole, "data.pkl", pickle.dumps(Call(eval, CODE), 2)))
    file = io.BytesIO()
    torch.save(dict(model=Call(eval, CODE)), file, _use_new_zipfile_serialization=False)
    refuse(project, file.getvalue())
    assert not (project.path / "canary").exists()


@pytest.mark.parametrize("spoil", [
    lambda v: torch.zeros(1).expand(v.shape), lambda v: v.t().contiguous().t(), lambda v: torch.zeros(2**20)[:1]],
    ids=["small", "turned", "another"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_optimizer_s_state_is_no_view_of_something_smaller(project, spoil, optimizer):
    """AdamW's fused step took it for whole, and wrote past its end."""
    project.train("--eval_interval=20", f"--optimizer={optimizer}")
    entries = project.checkpoint()["optimizer"]
    for entry in entries.values():
        entry.update({key: spoil(v) for key, v in entry.items() if v.ndim})
    put(project, resaved((project.path / "out" / "ckpt.pt").read_bytes(), optimizer=entries))
    assert "ckpt.pt" in project.refuse("--init_from=resume")


# Zip files that are two things at once.


def two_directories(whole):
    """A zip file in which torch finds a compressed part, and zipfile, which believes less, a small one stored."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "version"):
            archive.writestr(f"archive/{name}", b"\x80\2}.")
        archive.writestr("archive/byteorder", bytes(10**6), zipfile.ZIP_DEFLATED)
    data = file.getvalue()
    begin = zipfile.ZipFile(file).start_dir
    directory, part = data[begin:-22], b"archive/x"
    local = struct.pack("<4s2B4HL2L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, len(part), 0)
    local += part + b"x"
    shift = len(directory) + len(local)  # what zipfile adds to each place, because the directory lies so much later
    padding = len(directory) - 46 - len(part)
    other = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, len(part), 0,
                        padding, 0, 0, 0, begin + len(directory) - shift) + part + bytes(padding)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(other), begin, 0)
    return data[:begin] + directory + local + other + end


def overlapping(whole):
    """Ten thousand names of the same bytes: read by each name they are gigabytes."""
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a") as archive:
        first = max(archive.infolist(), key=lambda part: part.file_size)
        for n in range(10_000):
            part = zipfile.ZipInfo(f"archive/more/{n}")
            part.header_offset, part.CRC, part.file_size = first.header_offset, first.CRC, first.file_size
            part.compress_size, part.orig_filename = first.file_size, first.filename
            archive.filelist.append(part)
        archive._didModify = True
    return file.getvalue()


def twice(whole):
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"\x80\2}.")
        archive.infolist()[-1].external_attr = 0
    return file.getvalue()


def after_a_legacy_one(whole):
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(whole), weights_only=True), file, _use_new_zipfile_serialization=False)
    return file.getvalue() + whole


@pytest.mark.parametrize("make", [two_directories, overlapping, twice, after_a_legacy_one, lambda whole: whole + whole,
                                  lambda whole: whole + b"x" * 30, lambda whole: b"x" * 30 + whole],
                         ids=["two directories", "overlapping", "twice", "legacy", "doubled", "before", "after"])
def test_a_zip_file_has_one_reading(trained, monkeypatch, make):
    """What zipfile checks and what torch reads is the same: the rest does not get to torch."""
    project, whole = trained
    data = make(whole)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch was asked to read it"))
    refuse(project, data)


# What is no file.


@posix
@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt-previous.pt", "best.pt", ".lock", ".job", "log.jsonl",
                                  "ckpt.pt.tmp"])
def test_a_pipe_in_a_folder_of_checkpoints_is_not_waited_for(trained, in_time, monkeypatch, name):
    project, whole = trained
    (project.path / "out" / name).unlink(missing_ok=True)
    os.mkfifo(project.path / "out" / name)
    if name == "ckpt.pt":
        assert "ckpt.pt" in project.refuse("--init_from=resume")
    else:
        project.train(*RESUME)
    if name == "best.pt":
        os.unlink("out/best.pt")
        os.mkfifo("out/best.pt")
        assert sample.main(["--device=cpu"]) == 2 and "not a file" in project.capsys.readouterr().err
    for key, value in dict(TORCHELASTIC_RUN_ID="job", TORCHELASTIC_RESTART_COUNT="1").items():
        monkeypatch.setenv(key, value)
    project.train("--max_iters=2")


@posix
@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_a_pipe_or_a_device_in_a_data_folder_is_refused(project, in_time, name, device):
    path = project.path / "data" / "tiny" / name
    path.unlink()
    path.symlink_to(device) if device else os.mkfifo(path)
    assert name in project.refuse()


@posix
def test_links_to_nothing_do_not_have_it_made(trained):
    project, _ = trained
    for name in (".lock", "ckpt.pt.tmp", "best.pt.tmp", "log.jsonl.tmp", "previous"):
        (project.path / "out" / name).unlink(missing_ok=True)
        (project.path / "out" / name).symlink_to(project.path / "made")
    project.train(*RESUME)
    project.train()
    assert not (project.path / "made").exists() and (project.path / "out" / "previous-2" / "ckpt.pt").exists()


# Bad luck.


def test_a_clock_that_is_set_back_does_not_spoil_the_checkpoints(project, monkeypatch):
    """As on a machine that gets the time after it has started: the seconds since the launch were less than none."""
    real = time.time
    change_at(project, monkeypatch, 3, lambda: monkeypatch.setattr(train.time, "time", lambda: real() - 10**6))
    project.train()
    assert project.checkpoint()["elapsed"] >= 0
    assert project.train(*RESUME).err == "" and project.checkpoint()["step"] == 30


@pytest.mark.parametrize("line", ['{"step": ' + "9" * 5000 + ', "loss": 1}', '{"step": \u0663, "loss": 1}', "\0" * 100,
                                  '{"step": -1, "loss": 1}', "[" * 9999])
def test_a_damaged_log_stops_no_resume(trained, line):
    project, _ = trained
    with open(project.path / "out" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert project.train(*RESUME).err == "" and project.checkpoint()["step"] == 30


def test_a_data_folder_replaced_while_a_run_resumes_is_noticed(trained, monkeypatch):
    """After its tokenizer was compared with the checkpoint's and before the tokens are opened."""
    project, _ = trained
    real = train.join_world

    def join_world(s):
        project.dataset("tiny", project.text.replace("e", "E"))
        return real(s)

    monkeypatch.setattr(train, "join_world", join_world)
    project.capsys.readouterr()
    assert train.main([*TINY, *RESUME]) == 2
    line = project.capsys.readouterr().err
    assert line.count("\n") == 1 and "tokenizer" in line and project.checkpoint()["step"] == 20


@pytest.mark.parametrize("change", ["text", "split"])
def test_going_on_with_another_text_of_the_same_letters_is_said(trained, change):
    project, _ = trained
    assert project.train(*RESUME).err == ""
    text = project.text[::-1] if change == "text" else project.text
    project.dataset("tiny", text[:-500], val=text[-500:])
    line = project.train("--init_from=resume", "--max_iters=40").err
    assert line.count("\n") == 1 and line.startswith("note: dataset=tiny is not the text")


@posix
def test_a_run_whose_folder_was_moved_does_not_write_over_the_next_one_s(project, monkeypatch):
    """The lock went away with the folder."""
    def move():
        os.rename("out", "kept")
        os.mkdir("out")
        for name in (".lock", "ckpt.pt", "log.jsonl"):
            (project.path / "out" / name).write_text("another's")

    change_at(project, monkeypatch, 12, move)
    line = project.train("--eval_interval=10", status=1).err
    assert line.count("\n") == 1 and "another run's" in line
    assert {path.read_text() for path in (project.path / "out").iterdir()} == {"another's"}
    assert project.checkpoint("kept")["step"] == 10


@posix
def test_a_lock_that_was_deleted_does_not_stop_the_saves(project, monkeypatch):
    change_at(project, monkeypatch, 12, lambda: os.unlink("out/.lock"))
    project.train()
    assert project.checkpoint()["step"] == 20


def run_until(argv, module, name, count):
    """Run train.py in a fork that dies, without a chance to clean up, at the call number `count` of a function."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    real, calls = getattr(module, name), []

    def die(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            os._exit(77)
        return real(*args, **kwargs)

    setattr(module, name, die)
    os._exit(train.main([*TINY, *argv]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name, counts", [("replace", range(2, 7)), ("fsync", range(2, 5)), ("link", [])])
def test_a_run_that_dies_in_a_save_goes_on(project, name, counts):
    """Before each call that touches the disk: the first two saves are of best.pt and ckpt.pt at step 10."""
    project.train("--out_dir=whole")
    for count in counts:
        shutil.rmtree("out", ignore_errors=True)
        assert run_until([], os, name, count) == 77
        if count > (3 if name == "replace" else 2):
            project.train("--init_from=resume")
        else:
            assert "no checkpoint" in project.refuse("--init_from=resume")
            project.train()
        assert same(state(project), state(project, "whole")) and project.log() == project.log("whole"), count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_dies_while_it_sets_another_aside_loses_nothing(project):
    project.train("--eval_interval=10")
    shutil.copytree("out", "before")
    for count in range(1, 6):
        shutil.rmtree("out")
        shutil.copytree("before", "out")
        assert run_until([], os, "replace", count) == 77
        project.train("--max_iters=2")
        kept = [path.read_bytes() for path in (project.path / "out").rglob("*") if path.is_file()]
        assert all((project.path / "before" / name).read_bytes() in kept for name in train.RUN_FILES)


def test_half_a_character_is_one_line():
    """As a config file can have it: start = "\\ud800"."""
    with pytest.raises(prepare.UserError, match="half"):
        prepare.ByteTokenizer().encode("a\ud800")
    assert prepare.ByteTokenizer().encode("\udcff") == [255]
