"""GPT-2 from files in Hugging Face's layout, by path and by name: the outputs of transformers, and finetuning.

The models are random and small.
"""
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, same

import prepare
import sample
import train

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

GPT2 = dict(kind="tiktoken", encoding="gpt2")
SHAPES = [dict(), dict(n_layer=3, n_head=4, n_embd=24, n_positions=9), dict(activation_function="gelu"),
          dict(tie_word_embeddings=False)]
pytestmark = pytest.mark.usefixtures("torch_state")


def gpt2(**config):
    """A GPT-2 of transformers, with random weights so large that its predictions depend on the context."""
    defaults = dict(vocab_size=50, n_positions=24, n_layer=2, n_head=2, n_embd=32, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**defaults | config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.fixture
def hub_folder(tmp_path):
    """A folder as transformers writes it."""
    gpt2().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def ours_from(folder):
    return train.model_from_checkpoint(train.load_gpt2(str(folder)))


def change(folder, remove=(), **changes):
    """Rewrite the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in safetensors.load_file(path).items() if k not in remove}
    safetensors.save_file(tensors | changes, path)


def refusal(name):
    """The message of the UserError for these files."""
    with pytest.raises(train.UserError) as caught:
        train.model_from_checkpoint(train.load_gpt2(str(name)))
    return str(caught.value)


# Weights

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_logits_loss_and_greedy_text_are_those_of_transformers(shape, tmp_path):
    reference = gpt2(**shape)
    reference.save_pretrained(tmp_path / "hf")
    ours, c = ours_from(tmp_path / "hf"), reference.config
    idx = torch.randint(c.vocab_size, (3, c.n_positions), generator=torch.Generator().manual_seed(2))
    logits, loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    torch.testing.assert_close(logits, reference(idx[:, :-1]).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, reference(idx, labels=idx).loss, atol=1e-5, rtol=0)
    prompt, new = idx[:, :4], c.n_positions - 4
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    greedy = torch.stack(list(sample.generate(ours, prompt, new, temperature=0)), 1)
    assert torch.equal(greedy, expected[:, 4:])


def without_prefix(folder):
    tensors = {k.removeprefix("transformer."): v.clone() for k, v in
               safetensors.load_file(folder / "model.safetensors").items()}
    safetensors.save_file(tensors, folder / "model.safetensors")


def as_pickle(folder, zipped=True):
    tensors = safetensors.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def with_buffers(folder):
    change(folder, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24), "transformer.h.1.attn.masked_bias":
                      torch.tensor(-1e4), "lm_head.weight":
                      safetensors.load_file(folder / "model.safetensors")["transformer.wte.weight"].clone()})


LAYOUTS = dict(without_prefix=without_prefix, pickle=as_pickle, old_pickle=lambda folder: as_pickle(folder, False),
               with_buffers=with_buffers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_model(layout, hub_folder):
    expected = train.load_gpt2(str(hub_folder))["model"]
    LAYOUTS[layout](hub_folder)
    assert same(train.load_gpt2(str(hub_folder))["model"], expected)
    weights = next(path for path in hub_folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    assert same(train.load_gpt2(str(weights))["model"], expected), "the path of the file instead of its folder"


def test_half_precision_files_become_float32(hub_folder):
    gpt2().half().save_pretrained(hub_folder)
    ours, reference = ours_from(hub_folder), gpt2().half().float()
    idx = torch.arange(20)[None]
    torch.testing.assert_close(ours(idx)[0], reference(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_layer, n_embd, count", [(12, 768, 124_439_808), (24, 1024, 354_823_168),
                                                   (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)])
def test_config_gpt2_has_the_published_number_of_parameters(n_layer, n_embd, count):
    values, _ = train.parse_args(train.Settings, [str(ROOT / "config" / "gpt2.py")])
    shape = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, vocab_size=50257, vocab_multiple=1)
    with torch.device("meta"):
        model = train.GPT(train.Settings(**values | shape))
    assert sum(p.numel() for p in model.parameters()) == count


# Errors

@pytest.mark.parametrize("file, data", [
    ("config.json", b"{"), ("config.json", b"{}"), ("model.safetensors", b"x"), ("config.json", None),
    ("model.safetensors", None)], ids=str)
def test_a_damaged_or_missing_file_is_one_line(file, data, words):
    (words.path / "hf" / file).unlink()
    if data is not None:
        (words.path / "hf" / file).write_bytes(data)
    assert "init_from=hf" in words.refuse(*FINETUNE)
    assert sample.main(["--init_from=hf"]) == 2
    assert words.capsys.readouterr().err.count("\n") == 1


def test_an_unknown_name_gets_a_suggestion():
    assert "did you mean gpt2-xl?" in refusal("gpt2-xxl") and "did you mean resume?" in refusal("Resume")


def test_missing_safetensors_is_one_line(words, monkeypatch):
    monkeypatch.delitem(sys.modules, "safetensors.torch")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in words.refuse(*FINETUNE)


# By name

@pytest.fixture
def hub(project, hub_folder, server):
    """A server with the files of hub_folder."""
    server.files = {path.name: path.read_bytes() for path in hub_folder.iterdir()}
    server.folder = "/openai-community/gpt2-medium/resolve/main/"
    return server


def test_a_name_is_downloaded_once(hub, hub_folder, monkeypatch):
    expected = train.load_gpt2(str(hub_folder))
    assert same(train.load_gpt2("gpt2-medium")["model"], expected["model"])
    hub.names()
    assert sorted(p.name for p in Path("data/hub/gpt2-medium").iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert same(train.load_gpt2("gpt2-medium")["model"], expected["model"]) and hub.names() == []


def test_every_name_is_downloaded_from_its_repository(hub):
    for name in prepare.GPT2_MODELS:
        hub.folder = f"/{'distilbert' if name == 'distilgpt2' else 'openai-community'}/{name}/resolve/main/"
        prepare.download_gpt2(name)
        assert Path("data/hub", name, "model.safetensors").exists()


def test_a_file_with_another_checksum_is_refused(hub):
    hub.checksum = lambda data: "0" * 64
    assert "SHA-256" in refusal("gpt2-medium")
    assert not list(Path("data/hub/gpt2-medium").glob("*.safetensors"))


def test_the_other_ranks_wait_for_the_download(project, hub_folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = []
    waiting = threading.Thread(target=lambda: found.append(train.load_gpt2("gpt2")), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert not found and waiting.is_alive()
    shutil.copytree(hub_folder, "data/hub/new")
    os.rename("data/hub/new", "data/hub/gpt2")
    waiting.join(10)
    assert same(found[0]["model"], train.load_gpt2(str(hub_folder))["model"])


def test_a_failed_download_is_one_line(hub, project, monkeypatch):
    assert "404" in refusal("gpt2")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for main, argv in ((train.main, TINY), (sample.main, [])):
        project.capsys.readouterr()
        assert main([*argv, "--init_from=gpt2-xl"]) == 2
        line = project.capsys.readouterr().err
        assert line.count("\n") == 1 and "gpt2-xl" in line


# Finetuning

SHAPE = ["--ngram=1", "--n_layer=2", "--dataset=words"]  # GPT-2's, overriding TINY
FINETUNE = [*SHAPE, "--init_from=hf", "--optimizer=adamw", "--learning_rate=1e-3"]


@pytest.fixture
def words(project, hub_folder):
    """A project with a GPT-2 in hf/ and a dataset whose tokenizer is GPT-2's."""
    project.dataset("words", project.text, tokenizer=GPT2)
    return project


def test_finetuning_evaluates_at_step_0_and_lowers_the_loss(words):
    out = words.train(*FINETUNE, "--max_iters=5", "--dropout=0.1").out
    first = words.log()[0]
    row = rf"^ +0 +{first['train_loss']:.4f} +{first['val_loss']:.4f}$"
    assert first["step"] == 0 and re.search(row, out, re.MULTILINE)
    measured = words.train(*FINETUNE, "--eval_only").out
    assert f"validation loss {first['val_loss']:.4f}" in measured
    model, s = ours_from("hf"), words.settings("--block_size=16")
    assert train.evaluate(model, words.split("val"), s, train.World()) == pytest.approx(first["val_loss"], abs=1e-5)
    assert words.log()[-1]["val_loss"] < first["val_loss"]
    assert words.checkpoint(name="best.pt")["progress"]["best_step"] == 5


def test_a_resumed_finetuning_is_bit_exact_and_needs_no_files(words):
    run = [*FINETUNE, "--dropout=0.1"]
    words.train(*run, "--out_dir=reference")
    words.train(*run, "--out_dir=parts", "--max_iters=10", "--lr_decay_iters=20")
    shutil.rmtree("hf")
    words.train("--init_from=resume", "--out_dir=parts", "--max_iters=20", "--optimizer=adamw", *SHAPE)
    reference, parts = words.checkpoint("reference"), words.checkpoint("parts")
    assert same(reference["model"], parts["model"]) and same(reference["optimizers"], parts["optimizers"])
    assert words.log("reference") == words.log("parts")


def test_block_size_may_be_smaller(words):
    words.train(*FINETUNE, "--max_iters=1", "--block_size=8", "--dropout=0.2", "--learning_rate=0")
    checkpoint, files = words.checkpoint(), train.load_gpt2("hf")["model"]
    assert torch.equal(checkpoint["model"]["wpe.weight"], files["wpe.weight"][:8])
    assert torch.equal(checkpoint["model"]["wte.weight"], files["wte.weight"])
    assert train.model_from_checkpoint(checkpoint).config.block_size == 8


@pytest.mark.parametrize("flag, named", [
    ("--n_embd=64", "n_embd=64"), ("--n_head=4", "n_head=4"), ("--n_layer=3", "n_layer=3"), ("--position=rope", "rope"),
    ("--qk_norm", "qk_norm"), ("--bias=False", "bias"), ("--activation=relu2", "relu2"),
    ("--block_size=25", "block_size=25"), ("--vocab_size=60", "vocab_size=60"), ("--tie_weights=False", "tie_weights"),
    ("--dataset=tiny", "tokenizer"), ("--init_from=gpt3", "gpt2"), ("--init_from=data", "init_from=data")])
def test_a_setting_that_contradicts_the_files_is_refused(flag, named, words):
    assert named in words.refuse(*FINETUNE, flag)


def test_config_finetune_gpt2_downloads_and_resumes_without_the_network(hub, words):
    hub.folder = "/openai-community/gpt2/resolve/main/"
    tiny = ["--dataset=words", "--device=cpu", "--dtype=float32", "--max_iters=2", "--block_size=16"]
    assert train.main([str(ROOT / "config" / "finetune_gpt2.py"), *tiny, "--gradient_accumulation_steps=2"]) == 0
    assert words.checkpoint()["config"]["init_from"] == "gpt2" and words.checkpoint()["config"]["n_layer"] == 2
    hub.shutdown()
    shutil.rmtree("data/hub")
    words.train(*SHAPE, "--init_from=resume", "--optimizer=adamw", "--max_iters=3", "--batch_size=1")


# Generating

def test_sample_py_generates_the_text_of_transformers(byte_level_gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reference = gpt2(vocab_size=257)
    with torch.no_grad():
        reference.transformer.wte.weight[256] = 0  # end-of-text is not generated
    reference.save_pretrained("hf")
    ids = torch.tensor([list(b"The sea")])
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    text = bytes(expected.tolist()).decode("utf-8", "replace")
    assert sample.main(["--init_from=hf", "--start=The sea", "--temperature=0", "--max_new_tokens=12", "--device=cpu",
                        "--dtype=float32"]) == 0
    assert capsys.readouterr().out in (text, text + "\n")
