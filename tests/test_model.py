"""The model: what it computes, against references written here or taken from elsewhere."""
import doctest
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import train

pytestmark = pytest.mark.usefixtures("seeded")
SHAPE = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, ngram=1)
GPT2 = dict(position="learned", norm="layernorm", norm_weight=True, bias=True, qk_norm=False, activation="gelu_tanh",
            tied_head=True, zero_init=False, ngram=1)
VARIANTS = [{}, GPT2, *({key: value} for key, values in dict(
    position=["learned", "none"], norm=["layernorm", "none"], norm_weight=[True], bias=[True], qk_norm=[False],
    activation=["gelu", "gelu_tanh", "relu"], tied_head=[True], ngram=[2, 5], mlp=[False], zero_init=[False],
    vocab_multiple=[64], n_head=[1, 4],
    n_layer=[0, 1]).items() for value in values), dict(residual=False, zero_init=False)]


def each_variant(test):
    return pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(f"{k}={v[k]}" for k in v) or "default")(
        test)


def gpt(random=True, **changes):
    """A small GPT; with `random`, no parameter has a special value such as zero."""
    model = train.GPT(train.GPTConfig(**(SHAPE | changes)))
    if random:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def tokens(*shape):
    return torch.randint(SHAPE["vocab_size"], shape or (3, SHAPE["block_size"]))


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """softmax(Q K^T / sqrt(D)) V."""
    scores = q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)
    visible = torch.ones_like(scores, dtype=torch.bool).tril() if is_causal else attn_mask
    scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v.double()).to(v.dtype)


@each_variant
def test_initial_loss_is_that_of_a_uniform_guess(variant):
    model, idx = gpt(random=False, **variant), tokens(8, 16)
    loss = model(idx, tokens(8, 16))[1].item()
    if model.config.zero_init and not model.config.tied_head:
        assert loss == pytest.approx(math.log(SHAPE["vocab_size"]), abs=1e-5)
    assert loss == pytest.approx(math.log(SHAPE["vocab_size"]), abs=0.2)


@each_variant
def test_the_future_never_changes_the_past(variant):
    model, idx = gpt(**variant), tokens()
    before = model(idx)[0]
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % SHAPE["vocab_size"]
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@each_variant
def test_a_shorter_text_gives_the_same_logits(variant):
    model, idx = gpt(**variant), tokens()
    whole = model(idx)[0]
    for t in (1, 5):
        torch.testing.assert_close(model(idx[:, :t])[0], whole[:, :t], rtol=1e-4, atol=1e-5)


@each_variant
def test_loss_is_the_mean_cross_entropy_of_the_logits(variant):
    model, idx, targets = gpt(**variant), tokens(), tokens()
    logits, loss = model(idx, targets)
    assert logits.shape == (*idx.shape, SHAPE["vocab_size"]) and logits.dtype == torch.float32
    likelihood = logits.double().log_softmax(-1).gather(-1, targets[..., None])
    assert loss.item() == pytest.approx(-likelihood.mean().item(), rel=1e-5)
    assert model(idx)[1] is None


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = gpt(), tokens(), tokens()
    counted = torch.rand(targets.shape) < 0.5
    logits = model(idx)[0]
    loss = model(idx, torch.where(counted, targets, -1))[1]
    torch.testing.assert_close(loss, F.cross_entropy(logits[counted], targets[counted]))


@each_variant
def test_fused_attention_is_softmax_attention(variant, monkeypatch):
    model, idx = gpt(**variant), tokens()
    fused, calls = model(idx)[0], []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kwargs: calls.append(1) or plain_attention(*args, **kwargs))
    torch.testing.assert_close(model(idx)[0], fused, rtol=1e-4, atol=1e-4)
    assert len(calls) == model.config.n_layer


@pytest.mark.parametrize("position, moves", [("rope", True), ("none", False)])
def test_attention_depends_on_relative_position_alone(position, moves, monkeypatch):
    """With one token repeated, the scores of any two places must depend on their distance, and on nothing else."""
    seen = []

    def attention(q, k, v, **kwargs):
        seen.append(q @ k.mT)  # (B, H, T, T)
        return plain_attention(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    gpt(position=position, n_layer=1, n_embd=64)(torch.full((1, 16), 7))
    [scores] = seen
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    assert moves == bool((scores[..., 15, :] - scores[..., 15, 15:]).abs().max() > 1e-2)


def test_the_parts_are_what_their_names_say():
    """Without positions the default model in a few plain lines: RMSNorm, QK norm, squared ReLU, a head of its own."""
    model, idx, H = gpt(position="none"), tokens(), SHAPE["n_head"]
    weights = [p.detach().double() for p in model.parameters()]

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    x = weights.pop(0)[idx]
    B, T, C = x.shape
    for _ in range(SHAPE["n_layer"]):
        qkv, out, up, down = (weights.pop(0) for _ in range(4))
        q, k, v = ((norm(x) @ w.T).view(B, T, H, C // H).transpose(1, 2) for w in qkv.split(C))
        x = x + plain_attention(norm(q), norm(k), v, is_causal=True).transpose(1, 2).reshape(B, T, C) @ out.T
        x = x + (norm(x) @ up.T).relu().square() @ down.T
    [head] = weights
    torch.testing.assert_close(model(idx)[0].double(), norm(x) @ head.T, rtol=1e-4, atol=1e-3)


def test_gpt2_settings_are_gpt2():
    """Logits and loss of transformers' GPT-2 with the same weights: both list their parameters in the same order."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0)).eval()
    ours, idx = gpt(**GPT2), tokens()
    with torch.no_grad():
        for mine, (name, p) in zip(ours.parameters(), theirs.named_parameters(), strict=True):
            torch.nn.init.normal_(p, std=0.2)
            mine.copy_(p.T if ".c_" in name and p.ndim == 2 else p)  # Conv1D holds its weight transposed
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


@each_variant
def test_parameter_count(variant):
    model, c = gpt(**variant), train.GPTConfig(**(SHAPE | variant))
    C, rows = c.n_embd, math.ceil(c.vocab_size / c.vocab_multiple) * c.vocab_multiple
    gains = c.norm_weight * C * (2 if c.bias and c.norm == "layernorm" else 1)
    gains *= c.norm != "none"
    block = 4 * C * C + c.bias * 4 * C + gains + c.mlp * (8 * C * C + c.bias * 5 * C + gains)
    tables = (c.ngram - 1) * (c.ngram_rows + C) * (C // 4)
    places = c.block_size * C if c.position == "learned" else 0
    assert sum(p.numel() for p in model.parameters()) == (
        rows * C * (1 if c.tied_head else 2) + tables + places + c.n_layer * block + gains)


def test_ngram_tables_see_the_last_tokens_and_no_more():
    """A 3-gram model without blocks predicts from the last three tokens alone, in any window they stand in."""
    model, idx = gpt(n_layer=0, ngram=3), tokens(1, 16)
    logits = model(idx)[0][0, -1]
    torch.testing.assert_close(model(idx[:, 13:])[0][0, -1], logits)
    for t, matters in ((12, False), (13, True), (14, True), (15, True)):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % SHAPE["vocab_size"]
        assert ((model(changed)[0][0, -1] - logits).abs().max() > 1e-3) == matters, t


def test_ngram_dropout_is_for_training_and_for_ngrams_alone():
    idx = tokens()
    model = gpt(ngram=3, ngram_dropout=0.5)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    with torch.no_grad():
        model.ngrams.mix.weight.zero_()
    assert torch.equal(model(idx)[0], model(idx)[0]), "nothing else is dropped"


def test_ngram_hash_stays_inside_its_tables_and_spreads():
    model = gpt(ngram=4, ngram_rows=4096)
    idx = torch.randint(SHAPE["vocab_size"], (64, 256))
    for n, rows in enumerate(model.ngrams.ids(idx, None), 2):
        assert rows.min() >= 0 and rows.max() < 4096
        grams = len(idx.unfold(1, n, 1).flatten(0, 1).unique(dim=0))
        expected = 4096 * (1 - math.exp(-grams / 4096))  # rows hit when each n-gram falls on any of them alike
        assert 0.9 * expected < len(rows[:, n - 1:].unique()) < 1.1 * min(4096, grams), n
        assert torch.equal(rows[:1, 9:12], model.ngrams.ids(idx[:1, 9 - n + 1:12], None)[n - 2][:, n - 1:]), n


@pytest.mark.parametrize("size, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2_has_its_published_parameter_count(size, count):
    s = train.override(train.Settings(**GPT2, vocab_size=50257, block_size=1024), [f"--size={size}"])
    with torch.device("meta"):
        model = train.GPT(s)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("size", ["gpt-nano", "gpt-micro", "gpt-mini", "gopher-44m"])
def test_every_size_builds(size):
    s = train.override(train.Settings(vocab_size=65), [f"--size={size}"])
    with torch.device("meta"):
        logits, loss = train.GPT(s)(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long))
    assert logits.shape == (2, 8, 65) and loss.shape == ()


def test_no_layers_make_a_bigram():
    model, idx = gpt(n_layer=0), tokens()
    table = model(torch.arange(SHAPE["vocab_size"])[:, None])[0][:, 0]
    torch.testing.assert_close(model(idx)[0], table[idx])


@pytest.mark.parametrize("tied", [False, True])
def test_padding_rows_change_nothing(tied):
    small, padded = gpt(tied_head=tied), gpt(tied_head=tied, vocab_multiple=64)
    with torch.no_grad():
        for p, q in zip(small.parameters(), padded.parameters(), strict=True):
            q.fill_(1e3)
            q[:len(p)] = p
    idx, targets = tokens(), tokens()
    for model in (small, padded):
        model(idx, targets)[1].backward()
    torch.testing.assert_close(padded(idx), small(idx))
    torch.testing.assert_close(padded(idx, targets)[1], small(idx, targets)[1])
    for p, q in zip(small.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(q.grad[:len(p)], p.grad)
        assert not q.grad[len(p):].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@each_variant
def test_a_coarser_dtype_is_close_and_its_weights_stay_float32(variant, dtype, tolerance):
    model, idx, targets = gpt(**variant), tokens(), tokens()
    fine = model(idx, targets)
    model.compute_dtype = dtype
    coarse = model(idx, targets)
    assert coarse[0].dtype == torch.float32
    assert (coarse[0] - fine[0]).norm() < tolerance * fine[0].norm()
    coarse[1].backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", [{}, GPT2], ids=["default", "gpt2"])
def test_dropout_is_for_training_only(variant):
    with_dropout, without, idx = gpt(dropout=0.5, **variant), gpt(**variant), tokens()
    without.load_state_dict(with_dropout.state_dict())
    assert torch.equal(with_dropout(idx)[0], without(idx)[0])
    with_dropout.train()
    first, second = with_dropout(idx)[0], with_dropout(idx)[0]
    assert not torch.allclose(first, second)
    without.train()
    assert torch.equal(without(idx)[0], without(idx)[0])


@pytest.mark.parametrize("optimizer, variant", list(product(["muon", "adamw"], VARIANTS)))
def test_every_parameter_learns(optimizer, variant):
    """Zero-initialised projections hold back the layers before them for two updates, and no longer."""
    s = train.Settings(**(SHAPE | dict(optimizer=optimizer) | variant))
    model, idx, targets = train.GPT(s), tokens(8, 16), tokens(8, 16)
    optimizers, before = train.make_optimizers(model, s), [p.clone() for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        model(idx, targets)[1].backward()
        for each in optimizers:
            each.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert p.grad.any() and p.grad.isfinite().all(), name
        assert not torch.equal(p, old), name


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(train).failed == 0


def test_recomputed_activations_change_nothing_but_the_memory(seeded):
    """The same loss and gradients to the last bit, dropout included; far fewer numbers kept for the backward pass."""
    config = train.GPTConfig(65, n_layer=3, n_embd=32, block_size=32, dropout=0.2, zero_init=False)
    idx, found = torch.randint(65, (2, 33)), []
    for recompute in (False, True):
        torch.manual_seed(1)
        model, kept = train.GPT(replace(config, recompute=recompute)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()], sum(kept)))
    (loss, grads, kept), (loss_again, grads_again, kept_again) = found
    assert loss == loss_again and all(map(torch.equal, grads, grads_again))
    assert kept_again < kept / 3
