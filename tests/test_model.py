"""The model compared with references."""
import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import train

pytestmark = pytest.mark.usefixtures("seeded")
V, T = 61, 16
SHAPE = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32, ngram=1)
GPT2 = dict(position="learned", norm="layernorm", norm_affine=True, bias=True, qk_norm=False, activation="gelu_tanh",
            tie_weights=True, zero_init=False, ngram=1)
VARIANTS = [{}, GPT2, dict(residual=False, zero_init=False), *({key: value} for key, values in dict(
    position=["learned", "none"], norm=["layernorm", "none"], norm_affine=[True], bias=[True], qk_norm=[False],
    activation=["gelu", "gelu_tanh", "relu"], tie_weights=[True], ngram=[2, 5], mlp=[False], zero_init=[False],
    vocab_multiple=[64], n_head=[1, 4], n_layer=[0, 1]).items() for value in values)]
each_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "gpt2" if v is GPT2 else " ".join(f"{k}={v[k]}" for k in v) or "default")


def gpt(random=True, **changes):
    """A small GPT; with `random`, no parameter has a special value such as zero."""
    model = train.GPT(train.GPTConfig(**(SHAPE | changes)))
    if random:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    if model.ngrams is not None:
        model.ngrams.count(torch.randint(8, (500,), generator=torch.Generator().manual_seed(0)))
    return model.eval()


def tokens(*shape):
    return torch.randint(V, shape or (3, T))


def changed_at(idx, t):
    """A copy of idx with other tokens at position t."""
    idx = idx.clone()
    idx[:, t] = (idx[:, t] + 1) % V
    return idx


def attention(q, k, v, is_causal=False):
    """softmax(Q K^T / sqrt(D)) V."""
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    return (scores.softmax(-1) @ v.double()).to(v.dtype)


@each_variant
def test_initial_loss_is_that_of_a_uniform_distribution(variant):
    model = gpt(random=False, **variant)
    if model.ngrams is not None:
        model.ngrams.count(torch.tensor([V, V]))  # never seen
    exact = model.config.zero_init and not model.config.tie_weights
    assert model(tokens(8, T), tokens(8, T))[1].item() == pytest.approx(math.log(V), abs=1e-5 if exact else 0.2)


@each_variant
def test_attention_is_causal(variant):
    """Logits do not depend on later tokens, whether these are changed or missing."""
    model, idx = gpt(**variant), tokens()
    before = model(idx)[0]
    for t in (1, 7, 15):
        after = model(changed_at(idx, t))[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3
        torch.testing.assert_close(model(idx[:, :t])[0], before[:, :t], rtol=1e-4, atol=1e-5)


@each_variant
def test_loss_is_the_mean_cross_entropy_of_the_logits(variant):
    """Targets of -1 are ignored."""
    model, idx, targets = gpt(**variant), tokens(), tokens()
    logits, loss = model(idx, targets)
    assert logits.shape == (*idx.shape, V) and logits.dtype == torch.float32
    log_p = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-log_p.mean().item(), rel=1e-5)
    counted = torch.rand(targets.shape) < 0.5
    loss = model(idx, torch.where(counted, targets, -1))[1]
    assert loss.item() == pytest.approx(-log_p[counted].mean().item(), rel=1e-5)
    assert model(idx)[1] is None


@pytest.mark.parametrize("position, moves", [("rope", True), ("none", False)])
def test_attention_depends_on_relative_position_alone(position, moves, monkeypatch):
    """With one token repeated, the scores of two positions are a function of their distance."""
    scores = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **kwargs: scores.append(q @ k.mT) or attention(q, k, v, **kwargs))
    gpt(position=position, n_layer=1, n_embd=64)(torch.full((1, T), 7))
    [scores] = scores  # (B, H, T, T)
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    assert moves == bool((scores[..., 15, :] - scores[..., 15, 15:]).abs().max() > 1e-2)


def test_default_model_equals_a_reference():
    """Without positions: RMSNorm, normalized queries and keys, squared ReLU, an output layer of its own."""
    model, idx, H = gpt(position="none"), tokens(), SHAPE["n_head"]
    weights = [p.detach().double() for p in model.parameters()]

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    x = weights.pop(0)[idx]
    B, T, C = x.shape
    for _ in range(SHAPE["n_layer"]):
        qkv, out, up, down = (weights.pop(0) for _ in range(4))
        q, k, v = ((norm(x) @ w.T).view(B, T, H, C // H).transpose(1, 2) for w in qkv.split(C))
        x = x + attention(norm(q), norm(k), v, is_causal=True).transpose(1, 2).reshape(B, T, C) @ out.T
        x = x + (norm(x) @ up.T).relu().square() @ down.T
    [head] = weights
    torch.testing.assert_close(model(idx)[0].double(), norm(x) @ head.T, rtol=1e-4, atol=1e-3)


def kneser_ney(text, n, context, vocab_size, without=None):
    """Probabilities (n - 1, V) after `context`, by the n-grams of a text but the one that ends after `without`."""
    padded = [-1] * (n - 2) + text
    found = [tuple(padded[i:i + n]) for i in range(len(text) - 1) if i != without]
    levels = [Counter(found)]  # of n-grams, then the number of different tokens before each shorter one
    for _ in range(n - 2):
        levels.append(Counter(gram[1:] for gram in levels[-1]))
    p, orders = torch.full((vocab_size,), 1 / vocab_size), []
    for length, level in enumerate(reversed(levels), 1):
        counts = torch.tensor([float(level[*context[-length:], token]) for token in range(vocab_size)])
        if counts.any():
            p = ((counts - 0.75).clamp(min=0) + 0.75 * (counts > 0).sum() * p) / counts.sum()
        orders.append(p)
    return torch.stack(orders)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_ngram_probabilities_are_those_of_kneser_ney_smoothing(n):
    text, model = torch.randint(5, (120,)), gpt(ngram=n)
    model.ngrams.count(text)
    idx = torch.randint(6, (2, 10))
    p = model.ngrams(idx, 7)  # the first three are context
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 7, n - 1))
    for b, t in product(range(2), range(7)):
        context = [-1] * n + idx[b, :3 + t + 1].tolist()
        torch.testing.assert_close(p[b, t], kneser_ney(text.tolist(), n, context, V))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_leave_one_out_counts_are_those_of_the_text_without_the_target(n):
    text, model = torch.randint(5, (120,)), gpt(ngram=n)
    model.ngrams.count(text)
    p, padded = model.ngrams(text[None, :-1], 119, text[None, 1:]), [-1] * n + text.tolist()
    for t in range(119):
        torch.testing.assert_close(p[0, t], kneser_ney(text.tolist(), n, padded[:n + t + 1], V, without=t))


def test_ngrams_depend_on_the_last_tokens_alone():
    """A 3-gram model without blocks predicts from the last two tokens alone, at any position."""
    model, idx = gpt(n_layer=0, ngram=3), torch.randint(8, (1, T))
    logits = model(idx)[0][0, -1]
    torch.testing.assert_close(model(idx[:, 14:])[0][0, -1], logits)
    for t, matters in ((13, False), (14, True), (15, True)):
        assert ((model(changed_at(idx, t))[0][0, -1] - logits).abs().max() > 1e-3) == matters, t


def test_tokens_before_the_window_are_context_for_ngrams_alone():
    model, idx = gpt(ngram=4), torch.randint(8, (3, 2 + T + 1))
    x, y = idx[:, :-1], idx[:, 3:]
    loss, cut = model(x, y)[1], model(x[:, 2:], y)[1]
    assert not torch.isclose(loss, cut)
    model.ngrams = None
    assert torch.equal(model(x, y)[1], model(x[:, 2:], y)[1])


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
@torch.no_grad()
def test_queries_and_keys_are_normalized_by_their_root_mean_square_whatever_the_norm(norm):
    model, idx = gpt(norm=norm), tokens(2, 16)
    before = model(idx)[0]
    for block in model.h:
        block.attn.c_attn.weight[:2 * SHAPE["n_embd"]] *= 7
    torch.testing.assert_close(model(idx)[0], before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [dict(dropout=0.5), GPT2 | dict(dropout=0.5)], ids=["default", "gpt2"])
def test_dropout_is_for_training_only(variant):
    model, idx = gpt(**variant), tokens()
    without = gpt(**variant | dict(dropout=0.0)).train()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(idx)[0], without(idx)[0])
    model.train()
    assert not torch.allclose(model(idx)[0], model(idx)[0])


def test_weights_start_small():
    """0.02, less for projections into the residual stream, as in GPT-2; or zero."""
    for zero_init, expected in ((False, 0.02 / 2), (True, 0.0)):
        model = gpt(random=False, zero_init=zero_init, n_embd=128)
        for name, p in model.named_parameters():
            std = expected if name.endswith("c_proj.weight") else 0.0 if zero_init and "head" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_a_model_without_layers_is_a_bigram():
    model, idx = gpt(n_layer=0), tokens()
    table = model(torch.arange(V)[:, None])[0][:, 0]
    torch.testing.assert_close(model(idx)[0], table[idx])


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_changes_nothing(tied):
    small, padded = gpt(tie_weights=tied), gpt(tie_weights=tied, vocab_multiple=64)
    with torch.no_grad():
        for p, q in zip(small.parameters(), padded.parameters(), strict=True):
            q.fill_(1e3)
            q[:len(p)] = p
    idx, targets = tokens(), tokens()
    for model in (small, padded):
        model(idx, targets)[1].backward()
    torch.testing.assert_close(padded(idx, targets), small(idx, targets))
    for p, q in zip(small.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(q.grad[:len(p)], p.grad)
        assert not q.grad[len(p):].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@each_variant
def test_lower_precision_is_close_and_parameters_stay_float32(variant, dtype, tolerance):
    model, idx, targets = gpt(**variant), tokens(), tokens()
    expected = model(idx)[0]
    model.compute_dtype = dtype
    logits, loss = model(idx, targets)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < tolerance * expected.norm()
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer, variant", list(product(["muon", "adamw"], VARIANTS)))
def test_every_parameter_learns(optimizer, variant):
    """Projections initialized to zero hold back the layers before them for two steps, and no longer."""
    s = train.Settings(**(SHAPE | dict(optimizer=optimizer) | variant))
    model, idx, targets = train.GPT(s), tokens(8, T), tokens(8, T)
    optimizers, before = train.configure_optimizers(model, s), [p.clone() for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        model(idx, targets)[1].backward()
        for each in optimizers:
            each.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert p.grad.any() and p.grad.isfinite().all() and not torch.equal(p, old), name


def test_gradient_checkpointing_changes_only_the_memory():
    """The same loss and gradients to the last bit, with dropout; far fewer numbers kept for the backward pass."""
    config = train.GPTConfig(V, n_layer=3, n_embd=32, block_size=32, dropout=0.2, zero_init=False)
    idx, found = tokens(2, 33), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model, kept = train.GPT(replace(config, gradient_checkpointing=checkpointing)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()], sum(kept)))
    (loss, grads, kept), (loss_again, grads_again, kept_again) = found
    assert loss == loss_again and all(map(torch.equal, grads, grads_again))
    assert kept_again < kept / 3


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_step_keeps_no_float32_logits(grad):
    model, outputs = gpt(n_layer=1), []
    model.compute_dtype = torch.bfloat16

    def record(graph, inputs):
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        outputs.extend(node.meta["val"] for node in output.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
                           decompositions=select_decomp_table(), partition_fn=min_cut_rematerialization_partition)
    idx = tokens()
    with torch.set_grad_enabled(grad):
        logits, loss = torch.compile(model, backend=backend)(idx, idx)
    torch.testing.assert_close(loss, model(idx, idx)[1])
    assert logits is None and outputs
    assert not [t for t in outputs if t.dtype == torch.float32 and t.numel() == idx.numel() * V]
