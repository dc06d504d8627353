"""--export: transformers loads the folder, with the same numbers and the same text. --score: the loss of any text."""
import itertools
import json
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
from hypothesis import given
from hypothesis import strategies as st

import prepare
import sample
import train

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

random_model = partial(random_model, block_size=24)
CHAR, BYTE = dict(kind="char", chars=CHARS), dict(kind="byte")
TEXT = "abc \u00e9\u20ac\U0001f600\n  the end"
GPT2_LIKE = dict(position="learned", norm="layernorm", norm_weight=True, bias=True, qk_norm=False,
                 activation="gelu_tanh", tied_head=True)
LIKE = {"gpt2": {}, "exact gelu": dict(activation="gelu"), "no biases": dict(bias=False),
        "untied": dict(tied_head=False),
        "no gains": dict(norm_weight=False), "padded": dict(vocab_multiple=64), "no blocks": dict(n_layer=0)}
MODERN = {"defaults": {}, "n-grams": dict(ngram=3, ngram_rows=50),
          "bare": dict(norm="none", mlp=False, residual=False, zero_init=False),
          "tied": dict(tied_head=True, vocab_multiple=64), "learned": dict(position="learned"),
          "none": dict(position="none", bias=True, norm_weight=True), "gelu": dict(activation="gelu", qk_norm=False),
          "layernorm": dict(norm="layernorm", norm_weight=True, bias=True), "bigram": dict(n_layer=0)}
pytestmark = pytest.mark.usefixtures("torch_state")


def save(path, model, tokenizer=CHAR):
    """A checkpoint as train.py writes it."""
    settings = train.Settings(**{f.name: getattr(model.config, f.name) for f in fields(train.GPTConfig)})
    train.save_checkpoint(Path(path), dict(format=1, model=model.state_dict(), config=asdict(settings),
                                           tokenizer=tokenizer, **asdict(train.Progress())))


@pytest.fixture
def here(tmp_path, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(folder, model, tokenizer=CHAR, status=0):
    save("model.pt", model, tokenizer)
    assert sample.main(["--ckpt=model.pt", f"--export={folder}"]) == status
    return folder


def greedy(model, prompt, count):
    return torch.stack(list(sample.generate(model, prompt, count, temperature=0)), 1)


# ----------------------------------------------------------------------------------------------------------------------
# Models with GPT-2's parts


@pytest.mark.parametrize("config", LIKE.values(), ids=LIKE)
@torch.inference_mode()
def test_a_model_with_gpt2_s_parts_is_a_gpt2(config, here):
    ours = random_model(**GPT2_LIKE | config)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(exported("hf", ours)).eval()
    idx = torch.randint(len(CHARS), (2, 24), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-4, rtol=0)
    loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
    torch.testing.assert_close(theirs(idx, labels=idx).loss, loss, atol=1e-5, rtol=0)
    prompt = idx[:, :4]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(text[:, 4:], greedy(ours, prompt, 20))
    loaded = transformers.AutoModelForCausalLM.from_pretrained("hf")
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == ours.config.tied_head


def test_out_and_in_again_is_the_same_to_the_last_bit(here):
    ours = random_model(**GPT2_LIKE)
    again = sample.read_gpt2(exported("hf", ours))
    assert same(again["model"], dict(ours.state_dict())) and again["tokenizer"] == CHAR
    for key in ("bias", "norm_weight"):
        without = random_model(**GPT2_LIKE | {key: False})
        back = train.model_from_checkpoint(sample.read_gpt2(exported(f"without {key}", without)))
        idx = torch.arange(20)[None]
        assert torch.equal(back(idx)[0], without(idx)[0])


def test_in_and_out_again_is_the_same_to_the_last_bit(here):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=256, n_positions=16, n_layer=2, n_head=2, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")
    Path("hf/config.json").write_text(json.dumps(json.loads(Path("hf/config.json").read_text())
                                                 | dict(tokenizer_spec=BYTE)))
    assert sample.main(["--init_from=hf", "--export=again"]) == 0
    assert same(safetensors.load_file("again/model.safetensors"), safetensors.load_file("hf/model.safetensors"))


def test_a_model_sent_out_can_be_finetuned_here(project):
    project.train("--ngram=1", "--position=learned", "--norm=layernorm", "--norm_weight", "--qk_norm=False",
                  "--activation=gelu", "--bias")
    assert sample.main(["--export=hf"]) == 0
    assert sample.main(["--init_from=hf", "--max_new_tokens=5", "--start=the"]) == 0
    project.train("--init_from=hf", "--out_dir=more", "--ngram=1", "--ngram_rows=32768")
    before, after = project.log()[-1]["val_loss"], project.log("more")[0]["val_loss"]
    assert after == pytest.approx(before, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# All other models, loaded where nothing of this project can be imported

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
    """What a process finds that has nothing but the exported folders."""
    path = tmp_path_factory.mktemp("modern")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, config in MODERN.items():
            exported(name, random_model(**config))
        (path / "elsewhere").mkdir()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(path / "home"),
                                                                             "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-I", "-c", LOADER, "found.pt", *(str(path / name) for name in MODERN)],
                              cwd=path / "elsewhere", env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return {Path(folder).name: found for folder, found in torch.load(path / "elsewhere" / "found.pt").items()}


@pytest.mark.parametrize("name", MODERN)
@torch.inference_mode()
def test_any_model_goes_out_with_its_own_code(name, loaded):
    ours, found = random_model(**MODERN[name]), loaded[name]
    idx = torch.arange(48).view(2, 24) % 30
    torch.testing.assert_close(found["logits"], ours(idx)[0], atol=1e-4, rtol=0)
    loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.equal(found["text"][:, 4:], greedy(ours, idx[:, :4], 20))
    assert found["long"] == 44 and found["tied"] == ours.config.tied_head and found["same"]
    assert "no padding" in found["padded"]
    assert found["ids"] == prepare.CharTokenizer(CHARS).encode("the end")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def same_tokens(folder, tokenizer, texts):
    """transformers' tokenizer of a folder encodes and decodes as ours."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text == tokenizer.decode(ids)
    return theirs


TEXTS = [TEXT, "a", " ", "\n\n", "  two  spaces ", "e\u0301" * 2, "\u65e5\u672c", "don't, we'll; it's 1234 !?",
         "\r\n\t"]


def test_characters_go_along(here):
    tokenizer = prepare.CharTokenizer(CHARS)
    texts = [text for text in TEXTS if set(text) <= set(CHARS)]
    assert len(texts) >= 4
    theirs = same_tokens(exported("hf", random_model(**GPT2_LIKE)), tokenizer, texts)
    assert len(theirs) == len(CHARS)
    with pytest.raises(Exception, match="UNK"):
        theirs("%")


def test_bytes_go_along(here):
    model = random_model(**GPT2_LIKE | dict(vocab_size=256))
    theirs = same_tokens(exported("hf", model, BYTE), prepare.ByteTokenizer(), TEXTS)
    assert theirs.decode(list(b"ab\xffc")) == "ab\ufffdc"


# tiktoken's, of gpt2
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def small_gpt2():
    """A tiktoken encoding as gpt2's is, whose merges are some pairs and triples of common letters."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)}
    for pair in itertools.product(b" etaonsh", repeat=2):
        ranks.setdefault(bytes(pair), len(ranks))
    for more in (b" th", b" the", b"then", b"\xe6\x97", b"\xe6\x97\xa5", b"ttoo", b"aaaa"):
        ranks.setdefault(more, len(ranks))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def test_gpt2_s_merges_are_recovered_and_go_along(here, monkeypatch):
    import tiktoken
    small = small_gpt2()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    spec = dict(kind="tiktoken", encoding="gpt2")
    exported("hf", random_model(**GPT2_LIKE | dict(vocab_size=small.n_vocab)), spec)
    tokenizer = prepare.tokenizer_from_spec(spec)
    letters = "".join(map(chr, torch.randint(97, 123, (2000,), generator=torch.Generator().manual_seed(1))))
    spaced = letters.translate(dict(zip(b"zyxwv", "  et "[:5], strict=True)))
    theirs = same_tokens("hf", tokenizer, [*TEXTS, "then the hen ate nothing", spaced, "a<|endoftext|>b"])
    assert theirs.eos_token_id == small.eot_token


def test_the_real_gpt2_tokenizer_goes_along(here):
    try:
        assert os.environ.get("TIKTOKEN_CACHE_DIR")
        tokenizer = prepare.BPETokenizer("gpt2")
    except (AssertionError, prepare.UserError):
        pytest.skip("TIKTOKEN_CACHE_DIR holds no ranks of gpt2")
    texts = sample.tokenizer_files(tokenizer, 1024)
    assert len(json.loads(texts["vocab.json"])) == 50257 and len(texts["merges.txt"].splitlines()) == 50001
    assert texts["merges.txt"].splitlines()[1:4] == ["\u0120 t", "\u0120 a", "h e"]
    Path("hf").mkdir()
    for name, text in texts.items():
        Path("hf", name).write_text(text, encoding="utf-8")
    Path("hf/config.json").write_text('{"model_type": "gpt2"}')
    same_tokens("hf", tokenizer, [*TEXTS, Path(train.__file__).read_text(encoding="utf-8")])


def test_a_tokenizer_that_transformers_has_no_file_for_is_left_out_with_a_note(here, monkeypatch, capsys):
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
    model = random_model(**GPT2_LIKE | dict(vocab_size=small_gpt2().n_vocab))
    exported("hf", model, dict(kind="tiktoken", encoding="cl100k_base"))
    assert re.fullmatch("sample.py: note: .*cl100k_base.*\n", capsys.readouterr().err)
    assert sorted(os.listdir("hf")) == ["config.json", "model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_an_empty_folder_is_filled_and_any_other_is_left_alone(here, capsys):
    model = random_model()
    Path("empty").mkdir()
    exported("empty", model)
    before = {path: path.read_bytes() for path in Path("empty").iterdir()}
    exported("empty", model, status=2)
    assert "empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("empty").iterdir()} == before
    exported("a/b/c", model)
    assert sorted(os.listdir("a/b")) == ["c"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), "safetensors"])
def test_a_full_disk_leaves_nothing(here, error, monkeypatch, capsys):
    import safetensors as package

    def full(*args, **rest):
        raise package.SafetensorError("I/O error: No space left on device") if error == "safetensors" else error

    monkeypatch.setattr(safetensors, "save_file", full)
    exported("hf", random_model(), status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left" in err and "export=hf" in err
    assert sorted(os.listdir()) == ["model.pt"]


def test_without_safetensors_the_line_says_what_to_install(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    exported("hf", random_model(), status=2)
    assert "pip install safetensors" in capsys.readouterr().err and sorted(os.listdir()) == ["model.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 25))
def test_windows_count_every_token_but_the_first_once_after_half_a_context(count, size, chunk):
    ids, seen = np.arange(count), []
    for window, new in sample.sliding_windows(np.array_split(ids, max(1, count // chunk)), size):
        assert len(window) <= size + 1 and (window == np.arange(window[0], window[0] + len(window))).all()
        for i in range(len(window) - new, len(window)):
            assert i >= 1 and (i >= size / 2 or i == window[i]), "half a context, or all there is"
            seen.append(window[i])
    assert seen == list(range(1, count))


def test_windows_are_cut_as_the_text_comes():
    chunks = (np.arange(10) for _ in itertools.count())
    assert [new for _, new in itertools.islice(sample.sliding_windows(chunks, 8), 1000)] == [8] + [4] * 999


@torch.inference_mode()
def reference(model, ids):
    """The sum of the losses by a window for each token: the last to begin at a multiple of half the context."""
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
    ids = torch.randint(len(CHARS), (count,), generator=torch.Generator().manual_seed(count)).tolist()
    total, counted = sample.measure(model, np.array_split(np.array(ids), 3))
    assert counted == count - 1 and total == pytest.approx(reference(model, ids), rel=1e-4)


def scored(capsys, *argv):
    capsys.readouterr()
    assert sample.main([*argv, "--device=cpu", "--dtype=float32"]) == 0
    out = capsys.readouterr().out
    numbers = re.search(r"loss ([\d.]+) nats a token, perplexity ([\d.]+), ([\d.]+) bits per byte "
                        r"\(([\d,]+) .*, ([\d,]+)", out)
    return [float(number.replace(",", "")) for number in numbers.groups()]


@pytest.mark.parametrize("spec", [CHAR, BYTE], ids=["char", "byte"])
def test_loss_perplexity_and_bits_per_byte_agree(spec, here, capsys):
    tokenizer = prepare.tokenizer_from_spec(spec)
    model = random_model(vocab_size=tokenizer.vocab_size)
    save("model.pt", model, spec)
    text = TEXT * 20
    Path("book.txt").write_text(text, encoding="utf-8", newline="")
    loss, perplexity, bits, count, size = scored(capsys, "--ckpt=model.pt", "--score=book.txt")
    ids = tokenizer.encode(text)
    assert (count, size) == (len(ids) - 1, len(text.encode()))
    assert loss == pytest.approx(reference(model, ids) / count, abs=1e-3)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss * count / size / math.log(2), abs=1e-3)


def test_gpt2_is_scored_without_a_checkpoint(here, capsys, monkeypatch):
    import tiktoken
    small = small_gpt2()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    config = transformers.GPT2Config(vocab_size=small.n_vocab, n_positions=16, n_layer=1, n_head=2, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")
    Path("book.txt").write_text("then the hen ate nothing. " * 40, encoding="utf-8")
    loss, _, bits, count, size = scored(capsys, "--init_from=hf", "--score=book.txt")
    assert count < size - 100 and bits == pytest.approx(loss * count / size / math.log(2), abs=1e-3)
    assert loss == pytest.approx(math.log(small.n_vocab), abs=0.5), "nothing is known yet"


def test_a_text_that_cannot_be_scored_is_one_line(here, capsys):
    save("model.pt", random_model())
    for name, data, named in (("one.txt", b"a", "fewer than two"), ("odd.txt", b"a%b", "'%'"),
                              ("latin.txt", b"abc\xe9 abc", "0xe9")):
        Path(name).write_bytes(data)
        assert sample.main(["--ckpt=model.pt", f"--score={name}"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and named in err
