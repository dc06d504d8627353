"""sample.py: the text is what the model says, whatever the cache, the batch and the terminal do to it."""
import contextlib
import doctest
import io
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHARS, ROOT, random_model
from hypothesis import given
from hypothesis import strategies as st

import prepare
import sample
import train

CHAR_SPEC = {"kind": "char", "chars": CHARS}
BYTE_SPEC = {"kind": "byte"}
pytestmark = pytest.mark.usefixtures("torch_state")


def save(path, model, tokenizer=CHAR_SPEC, **changes):
    """A checkpoint as train.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = train.Settings(**{f.name: getattr(model.config, f.name) for f in fields(train.GPTConfig)})
    train.save_checkpoint(path, dict(
        format=1, model=model.state_dict(), optimizer=[], scaler={}, config=asdict(settings), tokenizer=tokenizer,
        corpus="test", **asdict(train.Progress())) | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with out/best.pt in it."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "out" / "best.pt", random_model())
    return tmp_path


@pytest.fixture
def write(folder, capsys):
    """Runs sample.py here with these flags and returns its standard output."""
    def run(*argv, status=0):
        capsys.readouterr()
        found = sample.main(["--max_new_tokens=40", *argv, "--device=cpu", "--dtype=float32"])
        out, err = capsys.readouterr()
        assert (found, err) == (status, ""), err
        return out
    return run


def typed(monkeypatch, data):
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def tokens_of(model, prompts, count, num_samples=1, **options):
    """What generate() yields, (B, count)."""
    return torch.stack(list(sample.generate(model, torch.tensor(prompts), count, num_samples, **options)), 1)


# ----------------------------------------------------------------------------------------------------------------------
# With the cache, token for token what the model says without it


@contextlib.contextmanager
def attention_to_the_last(count):
    """Every query attends to the `count` positions that end with its own, at every layer."""
    real = F.scaled_dot_product_attention

    def banded(q, k, v, is_causal):
        position = torch.arange(q.shape[2])
        distance = position[:, None] - position
        return real(q, k, v, attn_mask=(distance >= 0) & (distance < count))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", banded)
        yield


@torch.inference_mode()
def uncached(model, prompt, count):
    """Greedy tokens, each from all of its window anew."""
    size, start = model.config.block_size, max(0, len(prompt) - model.config.block_size)
    ids = list(prompt)
    with attention_to_the_last(size):
        for _ in range(count):
            ids.append(model(torch.tensor([ids[start:]]))[0][0, -1].argmax().item())
            if model.config.position == "learned" and len(ids) - start > size:
                start = len(ids) - max(1, size // 2)
    return ids[len(prompt):]


MODELS = [
    *(dict(position=position, norm=norm, norm_weight=weight, bias=bias, qk_norm=qk_norm) for
      position, norm, weight, bias, qk_norm in product(
          ("rope", "learned", "none"), ("rmsnorm", "layernorm"), (False, True), (False, True), (False, True))),
    *(dict(position=position, **rest) for position, rest in product(("rope", "learned", "none"), (
        dict(activation="relu2"), dict(activation="gelu"), dict(activation="gelu_tanh"), dict(tied_head=True),
        dict(ngram=3), dict(ngram=5, ngram_rows=50), dict(mlp=False), dict(activation="relu"), dict(norm="none"),
        dict(residual=False, zero_init=False),
        dict(recompute=True), dict(n_layer=0), dict(n_layer=1), dict(block_size=1), dict(block_size=2),
        dict(block_size=7), dict(vocab_multiple=64), dict(n_head=1), dict(n_head=4, n_embd=32)))),
]


def test_every_choice_of_a_model_setting_is_among_them():
    for setting in fields(train.GPTConfig):
        kind = type(setting.default)
        choices = setting.metadata["choices"] or ([not setting.default] if kind is bool else [])
        assert set(choices) <= {config.get(setting.name) for config in MODELS}, setting.name


@pytest.mark.parametrize("config", MODELS, ids=lambda config: "-".join(map(str, config.values())))
def test_greedy_text_with_the_cache_equals_greedy_text_without_it(config):
    model = random_model(**config)
    for prompt in ([3], [5, 9, 2, 7, 7], list(range(20))):  # short, inside the context, longer than the context
        assert tokens_of(model, [prompt], 24, temperature=0)[0].tolist() == uncached(model, prompt, 24)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_the_logits_with_the_cache_are_those_without_it_far_past_the_context(position, monkeypatch):
    model, seen = random_model(position=position), []
    ids = torch.randint(len(CHARS), (1, 60), generator=torch.Generator().manual_seed(1))

    def draw(logits):
        seen.append(logits)
        return ids[:, len(seen)]

    monkeypatch.setattr(sample, "draw", draw)
    tokens_of(model, ids[:, :1].tolist(), 59)
    with attention_to_the_last(8), torch.inference_mode():
        torch.testing.assert_close(torch.stack(seen, 1), model(ids)[0][:, :-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_a_token_past_the_context_costs_no_more_than_one_before(position, monkeypatch):
    model, passes = random_model(position=position, block_size=16), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, cache: passes.append(idx.shape[1]) or forward(idx, cache=cache))
    tokens_of(model, [[1] * 5], 100)
    assert len(passes) == 100
    restarts = [n for n in passes[1:] if n > 1]
    if position == "learned":
        assert set(restarts) == {8} and len(restarts) <= 100 / 8
    else:
        assert not restarts


def test_the_cache_is_no_larger_than_the_text():
    assert sample.Cache(random_model(), 3, 5).keys[0].shape == (3, 2, 5, 8)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        cache = sample.Cache
        patch.setattr(sample, "Cache", lambda model, batch, size: sizes.append(size) or cache(model, batch, size))
        tokens_of(random_model(), [[1, 2]], 3)
        tokens_of(random_model(), [[1, 2]], 30)
    assert sizes == [5, 8]


def test_several_tokens_at_once_into_a_used_cache_are_refused():
    cache = sample.Cache(random_model(), 1, 8)
    cache.length = 3
    with pytest.raises(AssertionError, match="2 tokens at once"):
        cache.extend(0, torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_prompts_and_samples_in_a_batch_do_not_see_each_other(position):
    model, prompts = random_model(position=position), [[1, 2, 3], [9, 8, 7], [4, 4, 4]]
    together = tokens_of(model, prompts, 20, num_samples=2, temperature=0).tolist()
    alone = [tokens_of(model, [prompt], 20, temperature=0)[0].tolist() for prompt in prompts]
    assert together == [alone[0], alone[0], alone[1], alone[1], alone[2], alone[2]]


def test_bfloat16_weights_generate():
    model = random_model()
    model.compute_dtype = torch.bfloat16
    model.to(torch.bfloat16)
    assert tokens_of(model, [[1, 2]], 20).shape == (1, 20)


# ----------------------------------------------------------------------------------------------------------------------
# The draws follow the distribution that the settings describe


LOGITS = st.lists(st.lists(st.integers(-40, 40), min_size=6, max_size=6), min_size=1, max_size=3).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32) / 8)


def softmax(row):
    e = np.exp(np.asarray(row, np.float64) - np.max(row))
    return e / e.sum()


def kept(logits):
    return [{i for i, value in enumerate(row) if value > -math.inf} for row in logits.tolist()]


def likeliest_first(row):
    return sorted(range(len(row)), key=lambda i: -row[i])  # sorted() is stable: of equal ones the first


@given(LOGITS, st.integers(1, 9))
def test_top_k_keeps_the_k_likeliest_and_no_more_where_some_are_equal(logits, k):
    filtered = sample.keep_top_k(logits, k)
    for row, ids in zip(logits.tolist(), kept(filtered), strict=True):
        assert len(ids) == min(k, 6)
        assert min(row[i] for i in ids) >= max((row[i] for i in range(6) if i not in ids), default=-math.inf)
    assert torch.equal(filtered[filtered > -math.inf], logits[filtered > -math.inf])


@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    for row, ids in zip(logits.tolist(), kept(sample.keep_top_p(logits, p)), strict=True):
        order, probabilities = likeliest_first(row), softmax(row)
        assert ids == set(order[:len(ids)]) and ids
        assert sum(probabilities[i] for i in ids) >= p - 1e-5
        assert sum(probabilities[i] for i in order[:len(ids) - 1]) < p + 1e-5


@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_those_with_a_share_of_the_likeliest(logits, p):
    for row, ids in zip(logits.tolist(), kept(sample.keep_min_p(logits, p)), strict=True):
        probabilities = softmax(row)
        assert np.argmax(probabilities) in ids
        for i in range(6):
            share = probabilities[i] / probabilities.max()
            assert abs(share - p) < 1e-5 or (i in ids) == (share > p)


def test_the_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert sample.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_the_penalty_counts_the_prompt_and_each_sample_for_itself():
    model = random_model()
    penalized = tokens_of(model, [[1, 2, 3], [4, 5, 6]], 28, 2, temperature=0, repetition_penalty=1e9)
    for prompt, row in zip(([1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]), penalized.tolist(), strict=True):
        assert len(set(row) | set(prompt)) > 25, "almost every token is new while there are new ones"


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2),
    dict(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)], ids=str)
def test_draws_follow_the_reference_distribution(options):
    row, n = [1.0, 0.5, 2.0, -1.0, 0.0, 1.5], 40_000
    expected = softmax(np.array(row) / options.get("temperature", 1))
    order = likeliest_first(row)
    if "top_k" in options:
        expected[order[options["top_k"]:]] = 0
    if "top_p" in options:
        ahead = np.cumsum(expected[order] / expected.sum()) - expected[order] / expected.sum()
        expected[[i for i, before in zip(order, ahead, strict=True) if before >= options["top_p"]]] = 0
    if "min_p" in options:
        expected[expected < options["min_p"] * expected.max()] = 0
    expected /= expected.sum()
    drawn = sample.draw(torch.tensor([row] * n), **options, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert not counts[expected == 0].any()
    assert np.all(abs(counts / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9)


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.3, 4.0]))
def test_every_filter_is_transformers_own(seed, strength):
    process = pytest.importorskip("transformers").generation.logits_process
    generator = torch.Generator().manual_seed(seed)
    logits, seen = torch.randn(3, 40, generator=generator), torch.randint(40, (3, 5), generator=generator)
    p = strength / 5
    for ours, theirs in (
        (sample.keep_top_k(logits, 7), process.TopKLogitsWarper(7)),
        (sample.keep_top_p(logits, p), process.TopPLogitsWarper(p)),
        (sample.keep_min_p(logits, p), process.MinPLogitsWarper(p)),
        (sample.penalize_repetition(logits, torch.zeros(3, 40, dtype=torch.bool).scatter(1, seen, True), strength),
         process.RepetitionPenaltyLogitsProcessor(strength)),
    ):
        torch.testing.assert_close(ours, theirs(seen, logits.clone()))


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 1e-5])
def test_temperature_zero_is_greedy_and_anything_near_it_no_error(temperature):
    logits = torch.tensor([[1.0, 30.0, 2.0], [5.0, 5.0, -100.0]])
    assert sample.draw(logits, temperature=temperature).tolist() == [1, 0]


def test_forbidden_ids_are_never_drawn():
    model, forbidden = random_model(), torch.arange(1, len(CHARS))
    for temperature in (0, 100):
        assert set(tokens_of(model, [[5]], 30, temperature=temperature, forbidden=forbidden)[0].tolist()) == {0}


def test_same_seed_same_text(write):
    first = write("--start=the ", "--seed=1", "--num_samples=3")
    assert write("--start=the ", "--seed=1", "--num_samples=3") == first
    assert write("--start=the ", "--seed=2", "--num_samples=3") != first
    texts = first.split(sample.SEPARATOR + "\n")
    assert texts[3] == "" and len(set(texts[:3])) == 3, "samples of one prompt are drawn independently"


# ----------------------------------------------------------------------------------------------------------------------
# Text: whole characters, ends, prompts


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from(["é", "€", "😀", "ab", "aab"]).map(
    str.encode)), max_size=8).map(b"".join), st.sampled_from(["", "b", "ab", "aab", "é€", "\ufffd", "abaab"]))
def test_pieces_join_to_the_whole_text_cut_at_the_stop_string(data, stop):
    text, pieces = sample.Continuation(prepare.ByteTokenizer(), stop), []
    for token in data:
        pieces.append(text.feed(token))
    pieces.append(text.finish())
    whole = data.decode("utf-8", errors="replace")
    if stop and stop in whole:
        at = whole.index(stop)
        # What only an end makes into U+FFFD is no reason to stop.
        assert "".join(pieces) in (whole[:at], whole)
    else:
        assert "".join(pieces) == whole


def test_an_unfinished_character_waits_and_is_shown_as_such_only_at_the_end():
    text = sample.Continuation(prepare.ByteTokenizer())
    assert [text.feed(token) for token in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert text.feed("€".encode()[0]) == "" and text.finish() == "\ufffd" and text.finish() == ""


def test_nothing_that_may_belong_to_the_stop_string_is_shown():
    text = sample.Continuation(prepare.ByteTokenizer(), "END")
    assert [text.feed(ord(c)) for c in "xENxEEND more"] == ["x", "", "", "ENx", "", "E", "", ""] + [""] * 5
    assert text.ended and text.finish() == ""


def test_a_stop_string_may_begin_and_end_inside_tokens():
    class Words:
        eot = None

        def decode_bytes(self, ids):
            return b"".join([b"one E", b"ND two", b"three END four", b"EEND"][i] for i in ids)

    for tokens, expected in (([0, 1, 2], "one "), ([2, 0], "three "), ([0, 0, 3, 1], "one Eone EE"), ([0], "one E")):
        text = sample.Continuation(Words(), "END")
        assert "".join([text.feed(token) for token in tokens] + [text.finish()]) == expected


class Spoken:
    """A tokenizer of ids 0 to 9, spelled a to j; 9 ends a text."""
    eot, vocab_size = 9, 10

    def encode(self, text):
        return ["abcdefghij".index(c) for c in text]

    def decode_bytes(self, ids):
        return "".join("abcdefghij"[i] for i in ids).encode()


def test_end_of_text_ends_a_sample_and_is_not_shown():
    text = sample.Continuation(Spoken())
    assert [text.feed(token) for token in (0, 1, 9, 2)] == ["a", "b", "", ""] and text.ended


def test_generation_stops_when_every_sample_has_ended_and_an_empty_start_is_end_of_text(write, folder, monkeypatch):
    save(folder / "out" / "best.pt", random_model(vocab_size=10))
    monkeypatch.setattr(prepare, "tokenizer_from_spec", lambda spec: Spoken())
    prompts, steps, generate = [], [], sample.generate

    def counted(model, idx, *args, **options):
        prompts.append(idx.tolist())
        for token in generate(model, idx, *args, **options):
            steps.append(token)
            yield token

    monkeypatch.setattr(sample, "generate", counted)
    out = write("--max_new_tokens=100000", "--num_samples=3")
    assert prompts == [[[9]]] and len(steps) < 1000
    assert out.count(sample.SEPARATOR) == 3 and "j" not in out


@pytest.mark.parametrize("spec, start", [(BYTE_SPEC, 10), (CHAR_SPEC, 0), ({"kind": "char", "chars": "xyz"}, 0)])
def test_an_empty_start_is_a_line_end_or_the_first_id(spec, start, folder):
    tokenizer = prepare.tokenizer_from_spec(spec)
    save(folder / "out" / "best.pt", random_model(vocab_size=tokenizer.vocab_size), spec)
    assert sample.Writer(sample.Settings(device="cpu")).encode("") == [start]


def test_the_prompt_comes_first_and_the_text_ends_with_a_line_end(write):
    assert write("--start=abc", "--max_new_tokens=0") == "abc\n"
    assert write("--start=abc\n", "--max_new_tokens=0") == "abc\n"
    assert write("--max_new_tokens=0") == "\n"
    out = write("--start=é€😀", "--max_new_tokens=30")
    assert out.startswith("é€😀") and out.endswith("\n") and len(out) in (33, 34)


def test_a_single_sample_appears_as_it_is_written(write, monkeypatch):
    shown = []
    monkeypatch.setattr(sample, "show", shown.append)
    write("--start=abc", "--max_new_tokens=20")
    assert shown[0] == "abc" and len([piece for piece in shown[1:-1] if piece]) == 20


def test_the_stop_string_ends_the_text_before_it(write):
    whole = write("--start=ab", "--seed=3")
    stop = whole[20:22]
    assert write("--start=ab", "--seed=3", f"--stop={stop}") == whole[:whole.index(stop, 2)] + "\n"


def test_a_stop_of_backslash_n_is_a_line_end(write):
    first, *rest = write("--start=ab", "--seed=3").split("\n")
    assert rest and write("--start=ab", "--seed=3", r"--stop=\n") == first + "\n"


def test_a_start_longer_than_the_context_is_shown_whole_and_goes_on_from_its_end(write):
    start = "the quick brown fox jumps over it" * 40
    out = write(f"--start={start}", "--temperature=0", "--max_new_tokens=20")
    tail = write(f"--start={start[-8:]}", "--temperature=0", "--max_new_tokens=20")
    assert out.startswith(start) and out[len(start):] == tail[8:]


@pytest.mark.parametrize("data", ["abc\né".encode(), "abc\r\né".encode(), b"\xef\xbb\xbf" + "abc\né".encode()],
                         ids=["plain", "windows", "byte order mark"])
def test_the_start_may_come_from_a_file_or_from_standard_input(data, write, folder, monkeypatch):
    (folder / "prompt.txt").write_bytes(data)
    expected = write("--start=abc\né")
    assert write("--start=FILE:prompt.txt") == expected
    typed(monkeypatch, data)
    assert write("--start=-") == expected


def test_each_line_of_a_file_goes_on_as_it_would_alone(write, folder):
    lines = ["abc", "d", "xyz", "a line well beyond the context of eight", "q", "the same", "abc"]
    (folder / "prompts.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    greedy = ("--temperature=0", "--max_new_tokens=20")
    expected = [write(f"--start={line}", *greedy) + sample.SEPARATOR + "\n" for line in lines]
    assert write("--start=FILE:prompts.txt", "--per_line", *greedy) == "".join(expected)
    twice = "".join(text for text in expected for _ in range(2))
    assert write("--start=FILE:prompts.txt", "--per_line", "--num_samples=2", *greedy) == twice


def test_any_number_of_samples_is_split_into_batches_that_fit(write, monkeypatch):
    monkeypatch.setattr(sample, "ROWS", 3)
    greedy = ("--temperature=0", "--max_new_tokens=5")
    one = write("--start=ab", *greedy) + sample.SEPARATOR + "\n"
    assert write("--start=ab", "--num_samples=7", *greedy) == one * 7


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 9), st.integers(1, 6))
def test_batches_hold_every_sample_once_and_one_length_each(lengths, num_samples, rows):
    drawn = [0] * len(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "ROWS", rows)
        for numbers, samples in sample.in_batches(lengths, num_samples):
            assert 0 < len(numbers) * samples <= rows and len({lengths[number] for number in numbers}) == 1
            for number in numbers:
                drawn[number] += samples
    assert drawn == [num_samples] * len(lengths)


def test_interactive_goes_on_from_each_line_and_survives_an_unknown_character(folder, monkeypatch, capsys):
    typed(monkeypatch, b"abc\nQ\n\nxyz")
    assert sample.main(["--interactive", "--temperature=0", "--max_new_tokens=5", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abc") and "xyz" in out and err.count("\n") == 1 and "'Q'" in err
    assert out.count(sample.SEPARATOR) == 4, "an answer to each line, told apart also where nobody sees the lines"


def test_a_start_that_is_a_file_s_name_is_pointed_out(folder, capsys):
    (folder / "abc").write_text("xyz", encoding="utf-8")
    assert sample.main(["--start=abc", "--max_new_tokens=2", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abc") and err.count("\n") == 1 and "--start=FILE:abc" in err


def test_best_comes_before_latest_and_a_named_checkpoint_before_both(write, folder):
    best, latest = folder / "out" / "best.pt", folder / "out" / "ckpt.pt"
    save(latest, random_model(seed=1))
    from_best, from_latest = write("--start=a"), write("--start=a", "--ckpt=out/ckpt.pt")
    assert from_best != from_latest
    best.unlink()
    assert write("--start=a") == from_latest


@pytest.mark.parametrize("config", [dict(n_layer=0), dict(block_size=1), dict(vocab_size=99, vocab_multiple=64),
                                    dict(position="learned"), dict(tied_head=True)], ids=str)
def test_any_model_writes_and_only_what_the_tokenizer_can_decode(config, write, folder):
    save(folder / "out" / "best.pt", random_model(**config))
    out = write("--max_new_tokens=50", "--temperature=5", "--top_k=0", "--num_samples=4", "--start=a")
    texts = out.split(sample.SEPARATOR + "\n")[:4]
    assert all(51 <= len(text) <= 52 and set(text) <= set(CHARS) for text in texts)


@pytest.mark.parametrize("option", ["--top_k=3", "--top_p=0.5", "--min_p=0.3", "--repetition_penalty=2",
                                    "--dtype=bfloat16", "--temperature=100", "--temperature=0.000001"])
def test_every_way_of_drawing_writes(option, folder, capsys):
    assert sample.main(["--device=cpu", "--max_new_tokens=20", option]) == 0
    assert len(capsys.readouterr().out) in (20, 21)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: one line that names the thing, the value and the remedy


MISTAKES = [
    (["--out_dir=nowhere"], ["nowhere", "train.py", "--out_dir"]),
    (["--out_dir=" + "x" * 5000], ["cannot read checkpoint"]),
    (["--ckpt=lost.pt"], ["no checkpoint at lost.pt"]),
    (["--ckpt=text.txt"], ["text.txt", "not a checkpoint"]),
    (["--ckpt=out"], ["ckpt=out is a folder", "--out_dir=out"]),
    (["--start=FILE:lost.txt"], ["lost.txt", "No such file", "--start=FILE:"]),
    (["--start=FILE:out"], ["out", "it is a folder"]),
    (["--start=FILE:"], ["cannot read", "--start=FILE:"]),
    (["--start=FILE:latin.txt"], ["latin.txt", "0xe9", "offset 3", "UTF-8"]),
    (["--start=FILE:blank.txt", "--per_line"], ["per_line", "blank.txt"]),
    (["--per_line"], ["per_line", "--start=FILE:"]),
    (["--start=Ünknown"], ["'Ü'", "U+00DC"]),
    (["--start=FILE:tab.txt"], ["'\\t'"]),
    (["--interactive", "--start=abc"], ["interactive", "--start"]),
    (["--top_k=-1"], ["top_k=-1", "at least 0"]),
    (["--temperature=-1"], ["temperature=-1", "at least 0"]),
    (["--temperature=1e300"], ["temperature=1e+300", "below 1000"]),
    (["--temperature=nan"], ["temperature=nan"]),
    (["--top_p=0"], ["top_p=0.0", "above 0"]),
    (["--top_p=2"], ["top_p=2.0", "at most 1"]),
    (["--min_p=1.5"], ["min_p=1.5", "below 1"]),
    (["--repetition_penalty=0"], ["repetition_penalty=0.0"]),
    (["--num_samples=0"], ["num_samples=0", "at least 1"]),
    (["--max_new_tokens=-1"], ["max_new_tokens=-1", "at least 0"]),
    (["--max_new_tokens=ten"], ["max_new_tokens=ten", "whole number"]),
    (["--seed=-1"], ["seed=-1"]),
    (["--seed=" + "9" * 30], ["seed", "below 2**53"]),
    (["--num_sample=3"], ["num_sample", "did you mean num_samples"]),
    (["--xyzzy=3"], ["xyzzy", "--help"]),
    (["ROMEO:"], ["ROMEO:", "--key=value"]),
    (["--dtype=int8"], ["dtype=int8", "bfloat16"]),
    (["--device=toaster"], ["device", "toaster"]),
    (["--device=cuda:99"], ["device", "cuda:99"]),
    (["--ckpt=hostile.pt"], ["tokenizer", "python"]),
    (["--ckpt=encoding.pt"], ["encoding", "evil"]),
    (["--ckpt=torn.pt"], ["torn.pt", "do not fit together"]),
    (["--ckpt=narrow.pt"], ["narrow.pt", "31", "30"]),
    (["--ckpt=infinite.pt"], ["not finite", "--dtype=float32"]),
]


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A folder of files to fall over."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / "text.txt").write_text("no checkpoint", encoding="utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (folder / "tab.txt").write_text("a\tb", encoding="utf-8")
    model = random_model()
    save(folder / "out" / "best.pt", model)
    save(folder / "hostile.pt", model, {"kind": "python", "code": "print('owned')"})
    save(folder / "encoding.pt", model, {"kind": "tiktoken", "encoding": "https://evil.example/ranks"})
    save(folder / "torn.pt", train.GPT(train.GPTConfig(vocab_size=31)), config=asdict(train.Settings(vocab_size=32)))
    save(folder / "narrow.pt", random_model(vocab_size=30))
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    save(folder / "infinite.pt", model)
    return folder


@pytest.mark.parametrize("argv, named", MISTAKES, ids=[argv[0][:40] for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_that_helps(argv, named, trap, monkeypatch, capsys):
    monkeypatch.chdir(trap)
    status = sample.main(["--device=cpu", *argv])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("sample.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert not [word for word in named if word not in err], err


def test_help_names_every_setting_and_its_default(capsys):
    assert sample.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{setting.name}={setting.default}" in out for setting in fields(sample.Settings))


def test_settings_may_come_from_a_file_and_later_ones_win(write, folder):
    (folder / "short.py").write_text('start = "ab"\nmax_new_tokens = 0\n', encoding="utf-8")
    assert write("short.py") == "ab\n"
    assert write("short.py", "--start=cd") == "cd\n"


# ----------------------------------------------------------------------------------------------------------------------
# As a process


def process(folder, *argv):
    """Start sample.py, to write without end."""
    return subprocess.Popen(
        [sys.executable, ROOT / "sample.py", "--max_new_tokens=100000000", "--device=cpu", *argv], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_closed_pipe_ends_it_quietly(folder):
    child = process(folder, "--start=abc")
    with child:
        assert child.stdout.read(3) == b"abc"
        child.stdout.close()
        assert child.wait(60) == 0 and child.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send Ctrl-C to one process alone")
def test_control_c_ends_it_quietly(folder):
    child = process(folder, "--start=abc")
    with child:
        assert child.stdout.read(20)
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
        assert child.returncode == 130 and err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a file that is always full")
def test_a_full_disk_is_one_line(folder):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, ROOT / "sample.py", "--device=cpu"], cwd=folder, stdout=full,
                              stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [f"sample.py: cannot write the text: {os.strerror(28)}"]


def test_importing_prints_nothing_and_touches_nothing(tmp_path):
    code = ("import sys, torch; threads = torch.get_num_threads(); import sample; "
            "assert torch.get_num_threads() == threads and not torch.cuda.is_initialized(); "
            "assert not {'tiktoken', 'requests'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=tmp_path, capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"") and not list(tmp_path.iterdir())


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(sample).failed == 0
