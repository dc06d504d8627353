"""--export: transformers loads the folder, with the same numbers and the same text. --score: the loss of any text."""
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHARS, random_model, same

import prepare
import sample
import train

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

random_model = partial(random_model, block_size=24)
CHAR, BYTE = dict(kind="char", chars=CHARS), dict(kind="byte")
TEXT = "abc \u00e9\u20ac\U0001f600\n  the end"
GPT2_LIKE = dict(position="learned", norm="layernorm", norm_affine=True, bias=True, qk_norm=False,
                 activation="gelu_tanh", tie_weights=True)
LIKE = {"gpt2": {}, "exact gelu": dict(activation="gelu"), "untied": dict(tie_weights=False),
        "padded": dict(vocab_multiple=64), "no blocks": dict(n_layer=0)}
OTHER = {"defaults": {}, "n-grams": dict(ngram=3),
         "bare": dict(norm="none", mlp=False, residual=False, zero_init=False),
         "tied": dict(tie_weights=True, vocab_multiple=64), "no biases": GPT2_LIKE | dict(bias=False)}
pytestmark = pytest.mark.usefixtures("torch_state")


def save(path, model, tokenizer=CHAR):
    """A checkpoint as train.py writes it."""
    settings = train.Settings(**{f.name: getattr(model.config, f.name) for f in fields(train.GPTConfig)})
    torch.save(dict(format=3, model=model.state_dict(), config=asdict(settings), tokenizer=tokenizer), path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(folder, model, tokenizer=CHAR, status=0):
    save("model.pt", model, tokenizer)
    assert sample.main(["--ckpt=model.pt", f"--export={folder}"]) == status
    return folder


def greedy(model, prompt, count):
    return torch.stack(list(sample.generate(model, prompt, count, temperature=0)), 1)


# Models with GPT-2's architecture

@pytest.mark.parametrize("config", LIKE.values(), ids=LIKE)
@torch.inference_mode()
def test_a_gpt2_like_model_is_exported_as_gpt2(config, here):
    ours = random_model(**GPT2_LIKE | config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(exported("hf", ours)).eval()
    assert type(reference) is transformers.GPT2LMHeadModel
    idx = torch.randint(len(CHARS), (2, 24), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(reference(idx).logits, ours(idx)[0], atol=1e-4, rtol=0)
    loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
    torch.testing.assert_close(reference(idx, labels=idx).loss, loss, atol=1e-5, rtol=0)
    prompt = idx[:, :4]
    text = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(text[:, 4:], greedy(ours, prompt, 20))
    assert (reference.lm_head.weight is reference.transformer.wte.weight) == ours.config.tie_weights


def test_an_exported_gpt2_is_read_bit_for_bit(here):
    ours = random_model(**GPT2_LIKE)
    again = train.load_gpt2(exported("hf", ours))
    assert same(again["model"], dict(ours.state_dict())) and again["tokenizer"] == CHAR
    assert sample.main(["--init_from=hf", "--export=again"]) == 0
    assert same(safetensors.load_file("again/model.safetensors"), safetensors.load_file("hf/model.safetensors"))


def test_an_exported_model_can_be_finetuned(project):
    project.train("--ngram=1", "--position=learned", "--norm=layernorm", "--norm_affine", "--qk_norm=False",
                  "--activation=gelu", "--bias")
    assert sample.main(["--export=hf"]) == 0
    assert sample.main(["--init_from=hf", "--max_new_tokens=5", "--start=the"]) == 0
    project.train("--init_from=hf", "--out_dir=more", "--ngram=1")
    before, after = project.log()[-1]["val_loss"], project.log("more")[0]["val_loss"]
    assert after == pytest.approx(before, abs=1e-5)


# All other models, loaded in a process that cannot import this project

LOADER = """
import sys, torch, transformers
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    idx = torch.arange(48).view(2, 24) % 30
    inputs = dict(input_ids=idx[:, :4], attention_mask=torch.ones(2, 4, dtype=torch.long))
    text = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    long = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    try:
        padded = model(idx, attention_mask=torch.zeros_like(idx))
    except ValueError as error:
        padded = str(error)
    model.train()(idx, labels=idx).loss.backward()
    model.eval().save_pretrained(folder + "-again")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    logits = model(idx).logits.detach()
    found[folder] = dict(logits=logits, loss=model(idx, labels=idx).loss.item(), text=text, tied=tied, padded=padded,
                         long=long.shape[1], same=torch.equal(again(idx).logits, logits),
                         ids=tokenizer("the end")["input_ids"])
assert not {"train", "sample", "prepare"} & set(sys.modules)
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The outputs of the exported models, by name."""
    path = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, config in OTHER.items():
            exported(name, random_model(**config))
        (path / "elsewhere").mkdir()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(path / "home"),
                                                                             "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-I", "-c", LOADER, "found.pt", *(str(path / name) for name in OTHER)],
                              cwd=path / "elsewhere", env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return {Path(folder).name: found for folder, found in torch.load(path / "elsewhere" / "found.pt").items()}


@pytest.mark.parametrize("name", OTHER)
@torch.inference_mode()
def test_any_other_model_is_exported_with_its_code(name, loaded):
    ours, found = random_model(**OTHER[name]), loaded[name]
    idx = torch.arange(48).view(2, 24) % 30
    torch.testing.assert_close(found["logits"], ours(idx)[0], atol=1e-4, rtol=0)
    loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.equal(found["text"][:, 4:], greedy(ours, idx[:, :4], 20))
    assert found["long"] == 44 and found["tied"] == ours.config.tie_weights and found["same"]
    assert "padding" in found["padded"]
    assert found["ids"] == prepare.CharTokenizer(CHARS).encode("the end")


# Tokenizers

def same_tokens(folder, tokenizer, texts):
    """transformers' tokenizer of a folder encodes and decodes as ours."""
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer.encode(text)
        assert reference(text)["input_ids"] == ids, text
        assert reference.decode(ids) == text == tokenizer.decode(ids)
    return reference


TEXTS = [TEXT, "a", " ", "\n\n", "  two  spaces ", "e\u0301" * 2, "\u65e5\u672c", "don't, we'll; it's 1234 !?",
         "\r\n\t"]


def test_a_char_tokenizer_is_exported(here):
    tokenizer = prepare.CharTokenizer(CHARS)
    texts = [text for text in TEXTS if set(text) <= set(CHARS)]
    assert len(texts) >= 4
    reference = same_tokens(exported("hf", random_model(**GPT2_LIKE)), tokenizer, texts)
    assert len(reference) == len(CHARS)
    with pytest.raises(Exception, match="UNK"):
        reference("%")


def test_a_byte_tokenizer_is_exported(here):
    model = random_model(**GPT2_LIKE | dict(vocab_size=256))
    every_byte = "".join(map(chr, range(0x800))) + "\u0800\U0001f600"
    reference = same_tokens(exported("hf", model, BYTE), prepare.ByteTokenizer(), [*TEXTS, every_byte])
    assert reference.decode(list(b"ab\xffc")) == "ab\ufffdc"


def test_the_tokenizer_of_gpt2_is_not_exported_and_the_output_says_so(here, byte_level_gpt2, capsys):
    exported("hf", random_model(**GPT2_LIKE | dict(vocab_size=257)), dict(kind="tiktoken", encoding="gpt2"))
    assert "tokenizer is not included" in capsys.readouterr().out
    assert sorted(os.listdir("hf")) == ["config.json", "model.safetensors"]
    assert transformers.AutoConfig.from_pretrained("hf").eos_token_id == 256


# Errors

def test_an_existing_folder_is_refused_and_parents_are_created(here, capsys):
    Path("hf").mkdir()
    exported("hf", random_model(), status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "export=hf" in err and os.listdir("hf") == []
    exported("a/b/c", random_model())
    assert os.listdir("a/b") == ["c"]


def test_a_failed_write_leaves_no_folder_with_that_name(here, monkeypatch, capsys):
    def full(*args, **rest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "save_file", full)
        exported("hf", random_model(), status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left" in err and not Path("hf").exists()
    exported("hf", random_model())
    assert sorted(os.listdir()) == ["hf", "model.pt"]


# Scores

@torch.inference_mode()
def reference(model, ids):
    """The total loss, each token from the last window before it that begins at a multiple of half the context."""
    T, total = model.config.block_size, 0.0
    step = max(1, T // 2)
    for i in range(1, len(ids)):
        start = max(0, -(-(i - T) // step)) * step
        logits = model(torch.tensor([ids[start:i]]))[0][0, -1]
        total -= logits.log_softmax(-1)[ids[i]].item()
    return total


@pytest.mark.parametrize("config", [{}, dict(position="learned"), dict(block_size=7), dict(block_size=1)], ids=str)
@pytest.mark.parametrize("count", [2, 8, 24, 25, 26, 200])
def test_the_score_is_that_of_a_naive_reference(config, count):
    model = random_model(**config)
    ids = torch.randint(len(CHARS), (count,), generator=torch.Generator().manual_seed(count)).numpy()
    assert sample.evaluate_text(model, ids.astype(np.uint8)) == pytest.approx(reference(model, ids.tolist()), rel=1e-4)


@pytest.mark.parametrize("spec", [CHAR, BYTE], ids=["char", "byte"])
def test_loss_perplexity_and_bits_per_byte_agree(spec, here, capsys):
    tokenizer = prepare.tokenizer_from_spec(spec)
    model = random_model(vocab_size=tokenizer.vocab_size)
    save("model.pt", model, spec)
    text = TEXT * 20
    Path("book.txt").write_text(text, encoding="utf-8", newline="")
    assert sample.main(["--ckpt=model.pt", "--score=book.txt", "--device=cpu", "--dtype=float32"]) == 0
    numbers = re.search(r"loss ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits per byte "
                        r"\(([\d,]+) .*, ([\d,]+)", capsys.readouterr().out)
    loss, perplexity, bits, count, size = (float(number.replace(",", "")) for number in numbers.groups())
    ids = tokenizer.encode(text)
    assert (count, size) == (len(ids), len(text.encode()))
    assert loss == pytest.approx(reference(model, ids) / (count - 1), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss * (count - 1) / size / math.log(2), abs=1e-3)
