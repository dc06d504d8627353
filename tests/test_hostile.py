"""No file executes code, and damage is one line: checkpoints, pretrained weights and data folders from elsewhere."""
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import same

import sample
import train

CODE = "open('canary', 'w')"


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.fixture
def trained(project):
    """A project with a run of 20 steps, and the bytes of its only checkpoint."""
    project.train("--eval_interval=20")
    return project, (project.path / "out" / "ckpt.pt").read_bytes()


def refuse(project, data):
    """A checkpoint that both train.py and sample.py refuse in one line, with exit status 2."""
    (project.path / "out" / "ckpt.pt").write_bytes(data)
    assert "ckpt.pt" in project.refuse("--init_from=resume")
    assert sample.main(["--ckpt=out/ckpt.pt", "--device=cpu", "--max_new_tokens=2"]) == 2
    line = project.capsys.readouterr().err
    assert line.count("\n") == 1 and "ckpt.pt" in line


def rezipped(data, name, part):
    """The bytes of a checkpoint with the content of one zip entry replaced, checksum included."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, part if entry.endswith(name) else old.read(entry))
        for entry in new.infolist():
            entry.external_attr = 0  # as torch writes it
    return file.getvalue()


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def pickles(checkpoint, data):
    """Files that execute CODE when they are unpickled, by name."""
    evil = Call(eval, CODE)
    yield "pickle", pickle.dumps(evil, 2)
    yield "opcodes", b"cbuiltins\neval\n(V" + CODE.encode() + b"\ntR."
    yield "pickle in the zip", rezipped(data, "data.pkl", pickle.dumps(evil, 2))
    yield "torch.save", saved(checkpoint | dict(config=evil))
    yield "torch.save before 1.6", saved(checkpoint | dict(config=evil), _use_new_zipfile_serialization=False)


def test_no_pickle_is_executed(trained, monkeypatch):
    """Not in a checkpoint, and not in GPT-2's pytorch_model.bin."""
    project, data = trained
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the default of torch.load, not its argument
    checkpoint, gpt2 = project.checkpoint(), project.path / "gpt2"
    gpt2.mkdir()
    config = dict(vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    (gpt2 / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, evil in pickles(checkpoint, data):
        refuse(project, evil)
        (gpt2 / "pytorch_model.bin").write_bytes(evil)
        assert "gpt2" in project.refuse("--init_from=./gpt2", "--out_dir=new")
        assert not (project.path / "canary").exists(), name
    eval(CODE).close()
    assert (project.path / "canary").exists(), "the code would have been noticed"


def test_nothing_in_a_data_folder_is_executed(project):
    for tokenizer, status in ((dict(kind="char", chars=CODE), 0), (dict(kind=CODE), 2),
                              (dict(kind="tiktoken", encoding=CODE), 2)):
        folder = project.dataset("evil", project.text, corpus=CODE, note=CODE, corpus_sha256=CODE, tokenizer=tokenizer)
        project.train("--dataset=evil", "--max_iters=2")
        assert sample.main(["--device=cpu", "--max_new_tokens=2"]) == status
    (folder / "meta.json").write_bytes(pickle.dumps(Call(eval, CODE)))
    assert "damaged" in project.refuse("--dataset=evil")
    assert not (project.path / "canary").exists()


@pytest.mark.parametrize("dtype", ["O", "O,O", "float64", "nonsense", 3])
def test_the_tokens_of_a_data_folder_are_unsigned_integers(project, dtype):
    """np.memmap takes the bytes of dtype "O" for addresses of Python objects."""
    meta = json.loads((project.path / "data" / "tiny" / "meta.json").read_text(encoding="utf-8"))
    size = np.dtype(dtype).itemsize if dtype in ("O", "O,O", "float64") else 1
    folder = project.dataset("evil", project.text, dtype=dtype)
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(bytes(meta["tokens"][split] * size))
    with pytest.raises(train.UserError, match="evil"):
        train.TokenDataset(folder, "train", train.read_meta("evil")[1])


def test_a_flipped_bit_is_refused_and_the_previous_checkpoint_used(trained):
    project, data = trained
    damaged, weight = bytearray(data), project.checkpoint()["model"]["wte.weight"]
    damaged[data.index(weight.numpy().tobytes()[:64]) + 9] ^= 1
    refuse(project, bytes(damaged))
    (project.path / "out" / "ckpt-previous.pt").write_bytes(data)
    note = project.train("--init_from=resume", "--max_iters=30").err
    assert "ckpt.pt" in note and "ckpt-previous.pt" in note and project.checkpoint()["progress"]["step"] == 30


def test_a_zip_entry_that_claims_to_be_a_folder_is_refused(trained):
    """torch would leave its weights uninitialized."""
    project, data = trained
    damaged, directory = bytearray(data), data.index(b"PK\1\2")
    entry = data.rindex(b"PK\1\2", directory, data.index(b"data/1", directory))
    damaged[entry + 38] ^= 0x10  # FILE_ATTRIBUTE_DIRECTORY in the external attributes
    refuse(project, bytes(damaged))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_state_has_the_shape_of_its_parameter_and_is_contiguous(project, optimizer):
    """A fused step would write past the end of a smaller one, and takes strides for granted."""
    project.train("--eval_interval=20", f"--optimizer={optimizer}")
    project.train("--init_from=resume", "--max_iters=30")
    expected, previous = project.checkpoint(), project.checkpoint(name="ckpt-previous.pt")

    def write(change):
        optimizers = [{i: {key: change(v) if v.ndim > 1 else v for key, v in state.items()}
                       for i, state in states.items()} for states in previous["optimizers"]]
        (project.path / "out" / "ckpt.pt").write_bytes(saved(previous | dict(optimizers=optimizers)))
        (project.path / "out" / "ckpt-previous.pt").unlink(missing_ok=True)

    for smaller in (lambda v: v[:1].clone(), lambda v: v.flatten()[:1].clone(), lambda v: v.T.contiguous()):
        write(smaller)
        line = project.train("--init_from=resume", "--max_iters=30", status=2).err
        assert "optimizer state" in line and line.count("\n") == 1
    write(lambda v: v.T.contiguous().T)
    project.train("--init_from=resume", "--max_iters=30")
    for key in ("model", "optimizers"):
        assert same(project.checkpoint()[key], expected[key])
