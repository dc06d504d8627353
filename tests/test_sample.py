"""sample.py: sampling, its cache, prompts, scoring and the samples of a run."""
import contextlib
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
SEPARATOR = "-" * 15 + "\n"
pytestmark = pytest.mark.usefixtures("torch_state")


def save(path, model, tokenizer=CHAR_SPEC, step=1, **changes):
    """A checkpoint as train.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = asdict(train.Settings(**asdict(model.config))) | changes
    torch.save(dict(format=2, model=model.state_dict(), progress=dict(step=step, best_val_loss=9.0 - step),
                    config=config, tokenizer=tokenizer), path)


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


def test_it_generates_where_a_launcher_set_its_variables(write, monkeypatch):
    """It joins no process group, which would wait for the other ranks."""
    expected = write()
    for key, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(key, value)
    assert write() == expected


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


MODELS = [dict(position=position, **rest) for position, rest in product(("rope", "learned", "none"), (
    dict(), dict(norm="layernorm", norm_affine=True, bias=True, qk_norm=False), dict(norm_affine=True),
    dict(norm="none"), dict(activation="gelu", tie_weights=True), dict(ngram=3), dict(ngram=5, ngram_buckets=50),
    dict(mlp=False), dict(residual=False), dict(n_layer=0), dict(block_size=1), dict(block_size=2), dict(block_size=7),
    dict(vocab_multiple=64), dict(n_head=4, n_embd=32)))]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: "-".join(map(str, config.values())))
def test_greedy_text_with_the_cache_equals_greedy_text_without_it(config):
    model = random_model(**config)
    for prompt in ([3], [5, 9, 2, 7, 7], list(range(20))):  # short, inside the context, longer than the context
        assert tokens_of(model, [prompt], 24, temperature=0)[0].tolist() == uncached(model, prompt, 24)


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_prompts_and_samples_in_a_batch_do_not_see_each_other(position):
    model, prompts = random_model(position=position), [[1, 2, 3], [9, 8, 7], [4, 4, 4]]
    together = tokens_of(model, prompts, 20, num_samples=2, temperature=0).tolist()
    alone = [tokens_of(model, [prompt], 20, temperature=0)[0].tolist() for prompt in prompts]
    assert together == [alone[0], alone[0], alone[1], alone[1], alone[2], alone[2]]


# ----------------------------------------------------------------------------------------------------------------------
# The draws follow the distribution that the settings describe


LOGITS = st.lists(st.lists(st.integers(-40, 40), min_size=6, max_size=6), min_size=1, max_size=3).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32) / 8)


def softmax(row):
    e = np.exp(np.asarray(row, np.float64) - np.max(row))
    return e / e.sum()


def kept(logits):
    return [{i for i, value in enumerate(row) if value > -math.inf} for row in logits.tolist()]


def most_likely_first(row):
    return sorted(range(len(row)), key=lambda i: -row[i])  # sorted() is stable: of equal ones the first


@given(LOGITS, st.integers(1, 9))
def test_top_k_keeps_the_k_most_likely_and_no_more_where_some_are_equal(logits, k):
    filtered = sample.keep_top_k(logits, k)
    for row, ids in zip(logits.tolist(), kept(filtered), strict=True):
        assert len(ids) == min(k, 6)
        assert min(row[i] for i in ids) >= max((row[i] for i in range(6) if i not in ids), default=-math.inf)
    assert torch.equal(filtered[filtered > -math.inf], logits[filtered > -math.inf])


@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    for row, ids in zip(logits.tolist(), kept(sample.keep_top_p(logits, p)), strict=True):
        order, probabilities = most_likely_first(row), softmax(row)
        assert ids == set(order[:len(ids)]) and ids
        assert sum(probabilities[i] for i in ids) >= p - 1e-5
        assert sum(probabilities[i] for i in order[:len(ids) - 1]) < p + 1e-5


@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_those_with_a_share_of_the_most_likely(logits, p):
    for row, ids in zip(logits.tolist(), kept(sample.keep_min_p(logits, p)), strict=True):
        probabilities = softmax(row)
        assert np.argmax(probabilities) in ids
        for i in range(6):
            share = probabilities[i] / probabilities.max()
            assert abs(share - p) < 1e-5 or (i in ids) == (share > p)


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2),
    dict(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)], ids=str)
def test_draws_follow_the_reference_distribution(options):
    row, n = [1.0, 0.5, 2.0, -1.0, 0.0, 1.5], 40_000
    expected = softmax(np.array(row) / options.get("temperature", 1))
    order = most_likely_first(row)
    if "top_k" in options:
        expected[order[options["top_k"]:]] = 0
    if "top_p" in options:
        ahead = np.cumsum(expected[order] / expected.sum()) - expected[order] / expected.sum()
        expected[[i for i, before in zip(order, ahead, strict=True) if before >= options["top_p"]]] = 0
    if "min_p" in options:
        expected[expected < options["min_p"] * expected.max()] = 0
    expected /= expected.sum()
    drawn = sample.sample_next(torch.tensor([row] * n), **options, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert not counts[expected == 0].any()
    assert np.all(abs(counts / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9)


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.3, 4.0]))
def test_every_filter_is_transformers_own(seed, strength):
    process = pytest.importorskip("transformers").generation.logits_process
    logits, p = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)), strength / 5
    for ours, theirs in ((sample.keep_top_k(logits, 7), process.TopKLogitsWarper(7)),
                         (sample.keep_top_p(logits, p), process.TopPLogitsWarper(p)),
                         (sample.keep_min_p(logits, p), process.MinPLogitsWarper(p))):
        torch.testing.assert_close(ours, theirs(None, logits.clone()))


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 1e-5])
def test_temperature_zero_is_greedy_and_anything_near_it_no_error(temperature):
    logits = torch.tensor([[1.0, 30.0, 2.0], [5.0, 5.0, -100.0]])
    assert sample.sample_next(logits, temperature=temperature).tolist() == [1, 0]


def test_same_seed_same_text(write):
    first = write("--start=the ", "--seed=1", "--num_samples=3")
    assert write("--start=the ", "--seed=1", "--num_samples=3") == first
    assert write("--start=the ", "--seed=2", "--num_samples=3") != first
    texts = first.split(SEPARATOR)
    assert texts[3] == "" and len(set(texts[:3])) == 3, "samples of one prompt are drawn independently"


# ----------------------------------------------------------------------------------------------------------------------
# Text: whole characters, ends, prompts


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from(["é", "€", "😀", "ab", "aab"]).map(
    str.encode)), max_size=8).map(b"".join), st.sampled_from(["", "b", "ab", "aab", "é€", "\ufffd", "abaab"]))
def test_pieces_join_to_the_whole_text_cut_at_the_stop_string(data, stop):
    text, pieces = sample.StreamDecoder(prepare.ByteTokenizer(), stop), []
    for token in data:
        pieces.append(text.push(token))
    pieces.append(text.finish())
    whole = data.decode("utf-8", errors="replace")
    if stop and stop in whole:
        at = whole.index(stop)
        # What only an end makes into U+FFFD is no reason to stop.
        assert "".join(pieces) in (whole[:at], whole)
    else:
        assert "".join(pieces) == whole


def test_an_unfinished_character_waits_and_is_shown_as_such_only_at_the_end():
    text = sample.StreamDecoder(prepare.ByteTokenizer())
    assert [text.push(token) for token in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert text.push("€".encode()[0]) == "" and text.finish() == "\ufffd" and text.finish() == ""


def test_nothing_that_may_belong_to_the_stop_string_is_shown():
    text = sample.StreamDecoder(prepare.ByteTokenizer(), "END")
    assert [text.push(ord(c)) for c in "xENxEEND more"] == ["x", "", "", "ENx", "", "E", "", ""] + [""] * 5
    assert text.ended and text.finish() == ""


class Letters:
    """A tokenizer of ids 0 to 9, which are a to j; 9 ends a text."""
    eot, vocab_size = 9, 10

    def encode(self, text):
        return ["abcdefghij".index(c) for c in text]

    def decode_bytes(self, ids):
        return "".join("abcdefghij"[i] for i in ids).encode()


def test_generation_stops_when_every_sample_has_ended_and_an_empty_start_is_end_of_text(write, folder, monkeypatch):
    save(folder / "out" / "best.pt", random_model(vocab_size=10))
    monkeypatch.setattr(sample, "tokenizer_from_spec", lambda spec: Letters())
    prompts, steps, generate = [], [], sample.generate

    def counted(model, idx, *args, **options):
        prompts.append(idx.tolist())
        for token in generate(model, idx, *args, **options):
            steps.append(token)
            yield token

    monkeypatch.setattr(sample, "generate", counted)
    out = write("--max_new_tokens=100000", "--num_samples=3")
    assert prompts == [[[9]]] and len(steps) < 1000
    assert out.count(SEPARATOR) == 3 and "j" not in out


def test_the_prompt_comes_first_and_the_text_ends_with_a_line_end(write):
    assert write("--start=abc", "--max_new_tokens=0") == "abc\n"
    assert write("--start=abc\n", "--max_new_tokens=0") == "abc\n"
    assert write("--max_new_tokens=0") == "\n"
    out = write("--start=é€😀", "--max_new_tokens=30")
    assert out.startswith("é€😀") and out.endswith("\n") and len(out) in (33, 34)


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
    expected = [write(f"--start={line}", *greedy) + SEPARATOR for line in lines]
    assert write("--start=FILE:prompts.txt", "--per_line", *greedy) == "".join(expected)
    twice = "".join(text for text in expected for _ in range(2))
    assert write("--start=FILE:prompts.txt", "--per_line", "--num_samples=2", *greedy) == twice


def test_interactive_goes_on_from_each_line_and_survives_an_unknown_character(folder, monkeypatch, capsys):
    typed(monkeypatch, b"abc\nQ\n\nxyz")
    assert sample.main(["--interactive", "--temperature=0", "--max_new_tokens=5", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abc") and "xyz" in out and err.count("\n") == 1 and "Q" in err
    assert out.count(SEPARATOR) == 3


def test_best_comes_before_latest_and_a_named_checkpoint_before_both(write, folder):
    best, latest = folder / "out" / "best.pt", folder / "out" / "ckpt.pt"
    save(latest, random_model(seed=1))
    from_best, from_latest = write("--start=a"), write("--start=a", "--ckpt=out/ckpt.pt")
    assert from_best != from_latest
    best.unlink()
    assert write("--start=a") == from_latest


@pytest.mark.parametrize("config", [dict(n_layer=0), dict(block_size=1), dict(vocab_multiple=64),
                                    dict(position="learned"), dict(tie_weights=True)], ids=str)
def test_any_model_writes_and_only_what_the_tokenizer_can_decode(config, write, folder):
    save(folder / "out" / "best.pt", random_model(**config))
    out = write("--max_new_tokens=50", "--temperature=5", "--top_k=0", "--num_samples=4", "--start=a")
    texts = out.split(SEPARATOR)[:4]
    assert all(51 <= len(text) <= 52 and set(text) <= set(CHARS) for text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: one line that names the thing, the value and the remedy


MISTAKES = [
    (["--out_dir=nowhere"], ["nowhere", "train.py", "--out_dir"]),
    (["--ckpt=lost.pt"], ["no checkpoint at lost.pt"]),
    (["--ckpt=text.txt"], ["text.txt", "not a checkpoint"]),
    (["--ckpt=out"], ["out", "not a checkpoint"]),
    (["--ckpt=old.pt"], ["old.pt", "format 1"]),
    (["--ckpt=hostile.pt"], ["tokenizer", "python"]),
    (["--ckpt=encoding.pt"], ["evil"]),
    (["--ckpt=torn.pt"], ["torn.pt", "do not match"]),
    (["--start=FILE:lost.txt"], ["lost.txt", "No such file"]),
    (["--start=FILE:out"], ["FILE:out", "directory"]),
    (["--start=FILE:latin.txt"], ["latin.txt", "0xe9", "UTF-8"]),
    (["--start=\u00dcnknown"], ["\u00dc"]),
    (["--top_p=0"], ["top_p=0.0", "at least"]),
    (["--top_p=2"], ["top_p=2.0", "at most 1"]),
    (["--min_p=1.5"], ["min_p=1.5", "at most 1"]),
    (["--num_samples=0"], ["num_samples=0", "at least 1"]),
    (["--max_new_tokens=ten"], ["max_new_tokens=ten", "int"]),
    (["--num_sample=3"], ["num_sample", "did you mean num_samples"]),
    (["--every_step"], ["did you mean follow"]),
    (["--xyzzy=3"], ["xyzzy", "--help"]),
    (["ROMEO:"], ["ROMEO:", "--key=value"]),
    (["--dtype=int8"], ["dtype=int8", "bfloat16"]),
    (["--device=toaster"], ["device", "toaster"]),
    (["--follow", "--plot=out"], ["--plot and --follow"]),
    (["--follow", "--ckpt=text.txt"], ["text.txt", "not a checkpoint"]),
    (["--score=lost.txt"], ["lost.txt"]),
    (["--plot=lost"], ["lost", "log.jsonl"]),
    (["--plot"], ["plot", "needs a value"]),
    (["--show=weights"], ["show=weights", "attention, probabilities"]),
]


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A folder of files to fall over."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / "text.txt").write_text("no checkpoint", encoding="utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    model = random_model()
    save(folder / "out" / "best.pt", model)
    save(folder / "hostile.pt", model, {"kind": "python", "code": "print('owned')"})
    save(folder / "encoding.pt", model, {"kind": "tiktoken", "encoding": "https://evil.example/ranks"})
    save(folder / "torn.pt", model, n_embd=32)
    torch.save(dict(format=1), folder / "old.pt")
    return folder


@pytest.mark.parametrize("argv, named", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_that_helps(argv, named, trap, monkeypatch, capsys):
    monkeypatch.chdir(trap)
    status = sample.main(["--device=cpu", *argv])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("sample.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert not [word for word in named if word not in err], err


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    out = capsys.readouterr().out
    assert not stopped.value.code and all(f"\n{setting.name}: " in out for setting in fields(sample.Settings))


# ----------------------------------------------------------------------------------------------------------------------
# Scoring, and the samples of a run


@pytest.mark.parametrize("count", [2, 8, 9, 10, 13, 14, 40])
def test_the_loss_of_a_text_counts_every_token_once_with_at_least_half_a_window_before_it(count):
    model, T = random_model(), 8
    ids = np.random.default_rng(count).integers(len(CHARS), size=count)
    expected, start = 0.0, 0
    for i in range(1, count):  # a window moves on by T / 2 when token i is past its last target
        start += T // 2 if i - start > T else 0
        logits = model(torch.tensor(ids[None, start:i]))[0][0, -1]
        expected -= logits.log_softmax(-1)[ids[i]].item()
    assert sample.evaluate_text(model, ids) == pytest.approx(expected, rel=1e-5)


def test_score_prints_the_loss_of_a_file(write, folder):
    text = "the quick brown fox é" * 9
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = prepare.tokenizer_from_spec(CHAR_SPEC)
    total = sample.evaluate_text(random_model(), np.array(tokenizer.encode(text)))
    out = write("--score=text.txt")
    assert f"loss {total / (len(text) - 1):.4f} " in out
    assert f"{total / math.log(2) / len(text.encode()):.4f} bits per byte" in out


def test_follow_prints_a_line_for_each_checkpoint_and_ends_with_the_run(write, folder, monkeypatch):
    path, steps = folder / "new" / "ckpt.pt", iter((1, 2, 5))

    def save_next(seconds):  # in place of waiting
        step = next(steps)
        save(path, random_model(seed=step), step=step, max_iters=5)
        os.utime(path, (step, step))

    monkeypatch.setattr(sample.time, "sleep", save_next)
    lines = write("--follow", "--out_dir=new", "--start=ab", "--max_new_tokens=500").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n}, best val loss {9 - n:.4f}" for n in (1, 2, 5)]
    text = write("--start=ab", "--ckpt=new/ckpt.pt", "--max_new_tokens=60")[2:62]
    assert lines[-1].endswith(f": {text!r}") and len(text) == 60


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
    assert done.stderr.startswith(b"sample.py: ") and os.strerror(28).encode() in done.stderr
    assert done.stderr.count(b"\n") == 1 and done.returncode == 2
