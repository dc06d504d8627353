"""sample.py: sampling, its cache, prompts, scoring and the samples of a run."""
import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import product

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
    torch.save(dict(format=3, model=model.state_dict(), progress=dict(step=step, best_val_loss=9.0 - step),
                    config=config, tokenizer=tokenizer), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with out/best.pt in it."""
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


def test_the_variables_of_a_launcher_are_ignored(write, monkeypatch):
    """sample.py does not wait for other ranks."""
    expected = write()
    for key, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(key, value)
    assert write() == expected


# The cache

@contextlib.contextmanager
def attention_to_the_last(count):
    """Each query attends to its own and the `count` - 1 positions before it, in every layer."""
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
    """Greedy tokens, each from a forward pass over its window."""
    size, start = model.config.block_size, max(0, len(prompt) - model.config.block_size)
    ids = list(prompt)
    with attention_to_the_last(size):
        for _ in range(count):
            ids.append(model(torch.tensor([ids[start:]]))[0][0, -1].argmax().item())
            if model.config.position == "learned" and len(ids) - start > size:
                start = len(ids) - max(1, size // 2)
    return ids[len(prompt):]


MODELS = [dict(position=position, **rest) for position, rest in product(("rope", "learned", "none"), (
    dict(), dict(norm="layernorm", norm_affine=True, bias=True, qk_norm=False, tie_weights=True), dict(ngram=3),
    dict(ngram=5), dict(residual=False), dict(n_layer=0), dict(block_size=1), dict(block_size=2),
    dict(block_size=7, n_head=4, vocab_multiple=64)))]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: "-".join(map(str, config.values())))
def test_greedy_text_is_the_same_with_and_without_the_cache(config):
    model = random_model(**config)
    for prompt in ([3], [5, 9, 2, 7, 7], list(range(20))):  # the last one is longer than block_size
        assert tokens_of(model, [prompt], 24, temperature=0)[0].tolist() == uncached(model, prompt, 24)


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_sequences_of_a_batch_are_independent(position):
    model, prompts = random_model(position=position), [[1, 2, 3], [9, 8, 7], [4, 4, 4]]
    together = tokens_of(model, prompts, 20, num_samples=2, temperature=0).tolist()
    alone = [tokens_of(model, [prompt], 20, temperature=0)[0].tolist() for prompt in prompts]
    assert together == [alone[0], alone[0], alone[1], alone[1], alone[2], alone[2]]


# Sampling

def softmax(row):
    e = np.exp(np.asarray(row, np.float64) - np.max(row))
    return e / e.sum()


def most_likely_first(row):
    return sorted(range(len(row)), key=lambda i: -row[i])  # sorted() is stable: of equal ones the first


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2),
    dict(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)], ids=str)
def test_samples_follow_the_reference_distribution(options):
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
    found = sample.sample_next(torch.tensor([row] * n), **options, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(found.numpy(), minlength=6)
    assert not counts[expected == 0].any()
    assert np.all(abs(counts / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9)


@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_the_filters_are_those_of_transformers(seed, p):
    process = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    for ours, reference in ((sample.keep_top_k(logits, 7), process.TopKLogitsWarper(7)),
                         (sample.keep_top_p(logits, p), process.TopPLogitsWarper(p)),
                         (sample.keep_min_p(logits, p), process.MinPLogitsWarper(p))):
        torch.testing.assert_close(ours, reference(None, logits.clone()))
    equal = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert sample.keep_top_k(equal, 2).isfinite().sum() == 2, "two of three equal ones"


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 1e-5])
def test_temperatures_near_zero_are_greedy(temperature):
    logits = torch.tensor([[1.0, 30.0, 2.0], [5.0, 5.0, -100.0]])
    assert sample.sample_next(logits, temperature=temperature).tolist() == [1, 0]


def test_same_seed_same_text(write):
    first = write("--start=the ", "--seed=1", "--num_samples=3")
    assert write("--start=the ", "--seed=1", "--num_samples=3") == first
    assert write("--start=the ", "--seed=2", "--num_samples=3") != first
    texts = first.split(SEPARATOR)
    assert texts[3] == "" and len(set(texts[:3])) == 3, "the samples of one prompt differ"


# Text, stop strings, prompts

@given(st.lists(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from(["é", "€", "😀", "ab", "aab"]).map(
    str.encode)), max_size=8).map(b"".join), st.sampled_from(["", "b", "ab", "aab", "é€", "\ufffd", "abaab"]))
def test_streamed_pieces_join_to_the_text_before_the_stop_string(data, stop):
    text, pieces = sample.StreamDecoder(prepare.ByteTokenizer(), stop), []
    for token in data:
        pieces.append(text.push(token))
    pieces.append(text.finish())
    expected = data.decode("utf-8", errors="replace")
    if stop and stop in expected:
        at = expected.index(stop)
        # an incomplete character at the end is U+FFFD, which does not stop
        assert "".join(pieces) in (expected[:at], expected)
    else:
        assert "".join(pieces) == expected


def test_an_incomplete_character_is_replaced_at_the_end_only():
    text = sample.StreamDecoder(prepare.ByteTokenizer())
    assert [text.push(token) for token in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert text.push("€".encode()[0]) == "" and text.finish() == "\ufffd" and text.finish() == ""


def test_no_beginning_of_the_stop_string_is_printed():
    text = sample.StreamDecoder(prepare.ByteTokenizer(), "END")
    assert [text.push(ord(c)) for c in "xENxEEND more"] == ["x", "", "", "ENx", "", "E", "", ""] + [""] * 5
    assert text.ended and text.finish() == ""


def test_end_of_text_ends_every_sample(write, folder, byte_level_gpt2, monkeypatch):
    """An empty prompt is end-of-text."""
    save(folder / "out" / "best.pt", random_model(vocab_size=257), dict(kind="tiktoken", encoding="gpt2"))
    prompts, steps, generate = [], [], sample.generate

    def counted(model, idx, *args, **options):
        prompts.append(idx.tolist())
        for token in generate(model, idx, *args, **options):
            steps.append(token)
            yield token

    monkeypatch.setattr(sample, "generate", counted)
    out = write("--max_new_tokens=5000", "--num_samples=3", "--temperature=9")
    assert prompts == [[[256]]] and len(steps) < 5000
    assert out.count(SEPARATOR) == 3 and "<|endoftext|>" not in out


def test_the_prompt_comes_first_and_the_text_ends_with_a_line_end(write):
    assert write("--start=abc", "--max_new_tokens=0") == "abc\n"
    assert write("--start=abc\n", "--max_new_tokens=0") == "abc\n"
    assert write("--max_new_tokens=0") == "\n"
    out = write("--start=é€😀", "--max_new_tokens=30")
    assert out.startswith("é€😀") and out.endswith("\n") and len(out) in (33, 34)


def test_the_text_ends_before_the_stop_string(write):
    text = write("--start=ab", "--seed=3")
    stop = text[20:22]
    assert write("--start=ab", "--seed=3", f"--stop={stop}") == text[:text.index(stop, 2)] + "\n"
    first, *rest = text.split("\n")
    assert rest and write("--start=ab", "--seed=3", r"--stop=\n") == first + "\n"


def test_a_prompt_longer_than_block_size_is_printed_and_its_end_continued(write):
    start = "the quick brown fox jumps over it" * 40
    out = write(f"--start={start}", "--temperature=0", "--max_new_tokens=20")
    tail = write(f"--start={start[-8:]}", "--temperature=0", "--max_new_tokens=20")
    assert out.startswith(start) and out[len(start):] == tail[8:]


@pytest.mark.parametrize("data", ["abc\né".encode(), "abc\r\né".encode(), b"\xef\xbb\xbf" + "abc\né".encode()],
                         ids=["plain", "windows", "byte order mark"])
def test_the_prompt_of_a_file_or_standard_input(data, write, folder, monkeypatch):
    (folder / "prompt.txt").write_bytes(data)
    expected = write("--start=abc\né")
    assert write("--start=FILE:prompt.txt") == expected
    typed(monkeypatch, data)
    assert write("--start=-") == expected


def test_each_line_of_a_file_is_a_prompt(write, folder):
    lines = ["abc", "d", "xyz", "a line longer than the block size", "q", "the same", "abc"]
    (folder / "prompts.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    greedy = ("--temperature=0", "--max_new_tokens=20")
    expected = [write(f"--start={line}", *greedy) + SEPARATOR for line in lines]
    assert write("--start=FILE:prompts.txt", "--per_line", *greedy) == "".join(expected)
    twice = "".join(text for text in expected for _ in range(2))
    assert write("--start=FILE:prompts.txt", "--per_line", "--num_samples=2", *greedy) == twice


def test_an_unknown_character_does_not_end_an_interactive_session(folder, monkeypatch, capsys):
    typed(monkeypatch, b"abc\nQ\n\nxyz")
    assert sample.main(["--interactive", "--temperature=0", "--max_new_tokens=5", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abc") and "xyz" in out and err.count("\n") == 1 and "Q" in err
    assert out.count(SEPARATOR) == 3


def test_the_checkpoint_is_the_named_one_or_best_or_the_latest(write, folder):
    best, latest = folder / "out" / "best.pt", folder / "out" / "ckpt.pt"
    save(latest, random_model(seed=1))
    from_best, from_latest = write("--start=a"), write("--start=a", "--ckpt=out/ckpt.pt")
    assert from_best != from_latest
    best.unlink()
    assert write("--start=a") == from_latest


# The samples of a run

def test_follow_prints_a_line_for_each_checkpoint_and_ends_with_the_run(write, folder, monkeypatch):
    path, steps = folder / "new" / "ckpt.pt", iter((1, 2, 5))

    def save_next(seconds):  # instead of sleeping
        step = next(steps)
        save(path, random_model(seed=step), step=step, max_iters=5)
        os.utime(path, (step, step))

    monkeypatch.setattr(sample.time, "sleep", save_next)
    lines = write("--follow", "--out_dir=new", "--start=ab", "--max_new_tokens=500").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n}, best val loss {9 - n:.4f}" for n in (1, 2, 5)]
    text = write("--start=ab", "--ckpt=new/ckpt.pt", "--max_new_tokens=60")[2:62]
    assert lines[-1].endswith(f": {text!r}") and len(text) == 60


# Processes

def process(folder, *argv):
    """Start sample.py with a sample that does not end."""
    return subprocess.Popen(
        [sys.executable, ROOT / "sample.py", "--max_new_tokens=100000000", "--device=cpu", *argv], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_closed_pipe_is_no_error(folder):
    child = process(folder, "--start=abc")
    with child:
        assert child.stdout.read(3) == b"abc"
        child.stdout.close()
        assert child.wait(60) == 0 and child.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to send Ctrl-C to one process alone")
def test_ctrl_c_is_status_130_without_a_traceback(folder):
    child = process(folder, "--start=abc")
    with child:
        assert child.stdout.read(20)
        child.send_signal(signal.SIGINT)
        rest, err = child.communicate(timeout=60)
        assert child.returncode == 130 and err == b""


def test_sampling_does_not_use_cudnn_attention(write):
    """cuDNN plans anew for each length of the cache, for 30 ms."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    write("--start=a")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
