"""The optimizers against plain references, and the schedule of their learning rate."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train

pytestmark = pytest.mark.usefixtures("seeded")
SHAPE = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, ngram=1)
MODELS = {
    "default": {}, "bigram": dict(n_layer=0), "tied": dict(tied_head=True), "gains": dict(norm_weight=True),
    "gpt2": dict(position="learned", norm="layernorm", norm_weight=True, bias=True, tied_head=True, zero_init=False)}


def newton_schulz(G):
    """Five steps of Jordan's quintic on one matrix, in float32."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def plain_muon(weight, gradients, lr, momentum, weight_decay):
    """The weight after Muon's steps, as the paper writes them: one matrix, float32."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = newton_schulz((1 - momentum) * gradient + momentum * mean)
        weight = weight - lr * weight_decay * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update
    return weight


def steps(optimizers, params, gradients):
    """Take one step of the optimizers for each list of gradients."""
    for each in gradients:
        for p, gradient in zip(params, each, strict=True):
            p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (1, 8), (8, 1)])
def test_orthogonalize_keeps_directions_and_levels_sizes(shape):
    """Singular values end near one whatever they were, and the singular vectors stay."""
    rows, columns = sorted(shape)
    for spread in (1.0, 0.1):
        U, _ = torch.linalg.qr(torch.randn(5, rows, rows))
        V, _ = torch.linalg.qr(torch.randn(5, columns, columns))
        sizes = torch.rand(5, rows) * (1 - spread) + spread
        G = U @ torch.diag_embed(sizes) @ V[:, :, :rows].mT * 10 ** torch.randn(5, 1, 1)
        turned = U.mT @ train.orthogonalize(G, torch.float32) @ V[:, :, :rows]
        values = turned.diagonal(dim1=1, dim2=2)
        assert 0.6 < values.min() and values.max() < 1.3
        torch.testing.assert_close(turned, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_orthogonalize_levels_random_matrices():
    for rows, columns in ((8, 32), (24, 96), (32, 128)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(8, rows, columns), torch.float32))
        assert 0.6 < values.min() and values.max() < 1.3
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(8, rows, columns), torch.bfloat16))
        assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("lr, momentum, weight_decay", [(1e-2, 0.95, 0.1), (0.1, 0.0, 0.0), (1e-3, 0.8, 1.0)])
def test_muon_is_the_published_algorithm(lr, momentum, weight_decay):
    """Square, wide and tall matrices, two of one shape, and one that holds three."""
    weights = [torch.randn(shape) for shape in [(32, 32), (32, 32), (32, 128), (128, 32), (32, 48)]]
    stacked = torch.randn(96, 32)
    params = [torch.nn.Parameter(w.clone()) for w in (*weights, stacked)]
    muon = train.Muon([dict(params=params[:-1]), dict(params=params[-1:], chunks=3)], lr=lr, momentum=momentum,
                      weight_decay=weight_decay)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    steps([muon], params, gradients)
    for i, weight in enumerate(weights):
        expected = plain_muon(weight, [g[i] for g in gradients], lr, momentum, weight_decay)
        torch.testing.assert_close(params[i].data, expected, rtol=1e-4, atol=1e-2 * lr)
    expected = torch.cat([plain_muon(part, parts, lr, momentum, weight_decay) for part, *parts in
                          zip(stacked.split(32), *(g[-1].split(32) for g in gradients), strict=True)])
    torch.testing.assert_close(params[-1].data, expected, rtol=1e-4, atol=1e-2 * lr)


def test_muon_is_torchs_muon():
    """torch's orthogonalizes in bfloat16, one matrix at a time, so that the two agree to its precision."""
    theirs = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    shapes, lr = [(32, 32), (32, 128), (128, 32)], 0.02
    weights = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    found = []
    for make in (lambda p: train.Muon(p, lr=lr, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16),
                 lambda p: theirs(p, lr=lr, momentum=0.95, weight_decay=0.1, nesterov=True,
                                  ns_coefficients=(3.4445, -4.775, 2.0315), adjust_lr_fn="match_rms_adamw")):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        steps([make(params)], params, gradients)
        found.append(params)
    for w, ours, reference in zip(weights, *found, strict=True):
        assert (ours - reference).norm() < 0.03 * (reference - w).norm()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_exactly_one_group(optimizer, model):
    s = train.Settings(**(SHAPE | MODELS[model]), optimizer=optimizer)
    model = train.GPT(s)
    groups = [group for each in train.make_optimizers(model, s) for group in each.param_groups]
    found = sorted(id(p) for group in groups for p in group["params"])
    assert found == sorted(id(p) for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (s.weight_decay if p.ndim > 1 else 0), "gains and biases do not decay"


def test_muon_takes_the_matrices_of_the_blocks_each_as_one():
    """Queries, keys and values are three matrices, each moved by an update with singular values near one."""
    s = train.Settings(**(SHAPE | MODELS["gpt2"]), weight_decay=0.0, learning_rate=1e-2)
    model = train.GPT(s)
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    # gradients of full rank, of sizes far apart: neither q, k nor v may drown the others
    gradients = [torch.cat([torch.linalg.qr(torch.randn(part.T.shape if part.shape[0] < part.shape[1] else part.shape))
                            [0].reshape(part.shape) * 10.0 ** -i for i, part in enumerate(p.split(SHAPE["n_embd"]))])
                 if p.ndim == 2 and p.shape == (96, 32) else torch.randn_like(p) for p in params]
    steps(train.make_optimizers(model, s), params, [gradients])
    inside = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert len(inside) == 4 * s.n_layer
    for p, old in zip(params, before, strict=True):
        if id(p) in inside:
            for part in (p - old).chunk(3 if p.shape == (96, 32) else 1):
                values = torch.linalg.svdvals(part) / (s.learning_rate * 0.2 * math.sqrt(max(part.shape)))
                assert values.max() < 1.3 and values.median() > 0.6
        else:  # AdamW's first step is the learning rate, in the gradient's direction
            torch.testing.assert_close((p - old).abs(), torch.full_like(p, s.learning_rate), rtol=1e-2, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_adamw_is_adamw(model):
    s = train.Settings(**(SHAPE | MODELS[model]), optimizer="adamw", beta1=0.8, beta2=0.95, weight_decay=0.3)
    model = train.GPT(s)
    params = list(model.parameters())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = torch.optim.AdamW(
        [dict(params=[p for p in copies if p.ndim >= 2], weight_decay=0.3),
         dict(params=[p for p in copies if p.ndim < 2], weight_decay=0.0)],
        lr=s.learning_rate, betas=(0.8, 0.95), foreach=False, fused=False)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(5)]
    steps(train.make_optimizers(model, s), params, gradients)
    steps([reference], copies, gradients)
    for p, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(p, copy, rtol=1e-5, atol=1e-6)


@pytest.fixture
def norms():
    """The norm of the gradients that the optimizers are given, for each optimizer step of a run."""
    found = []

    def note(optimizer, args, kwargs):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in params)))

    hook = register_optimizer_step_pre_hook(note)
    yield found
    hook.remove()


def test_gradients_are_clipped(project, norms):
    """The log has the norm from before the clipping; the optimizer sees no more than grad_clip."""
    for clip in (0, 1e6, 0.05):
        norms.clear()
        project.train("--optimizer=adamw", f"--grad_clip={clip}", "--log_interval=1", "--learning_rate=1e-3")
        logged = [line["grad_norm"] for line in project.log()]
        assert len(norms) == len(logged) == 20 and max(logged) > 0.1
        for given_norm, logged_norm in zip(norms, logged, strict=True):
            assert given_norm == pytest.approx(min(logged_norm, clip or math.inf), rel=1e-3)


# The schedule.


def nanogpt_learning_rate(step, s):
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step > s.lr_decay_iters:
        return s.min_lr
    ratio = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (s.learning_rate - s.min_lr)


@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_cosine_is_nanogpts(warmup):
    s = train.Settings(schedule="cosine", learning_rate=6e-4, min_lr=6e-5, warmup_iters=warmup, lr_decay_iters=900,
                       max_iters=1000)
    for step in range(1001):
        assert train.learning_rate(step, s) == pytest.approx(nanogpt_learning_rate(step, s), rel=1e-9)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_decay_ends_with_the_run_by_default(schedule):
    s = train.Settings(schedule=schedule, learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=200)
    values = [train.learning_rate(step, s) for step in range(201)]
    assert values[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert all(a > b for a, b in zip(values[11:], values[12:], strict=False))
    assert values[200] == pytest.approx(0.1)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_wsd_warms_up_stays_and_decays_linearly(share):
    s = train.Settings(schedule="wsd", learning_rate=1.0, min_lr=0.0, warmup_iters=20, max_iters=220, decay_share=share)
    values = [train.learning_rate(step, s) for step in range(221)]
    turn = 220 - round(share * 200)
    assert values[20:turn + 1] == pytest.approx([1.0] * (turn - 19))
    assert values[turn:] == pytest.approx([1 - i / (220 - turn) for i in range(221 - turn)])


def test_no_decay_holds_the_peak():
    s = train.Settings(decay_lr=False, learning_rate=0.3, warmup_iters=10, max_iters=100)
    assert [train.learning_rate(step, s) for step in range(10, 100)] == [0.3] * 90
    assert train.learning_rate(0, s) == pytest.approx(0.3 / 11)


@given(st.builds(
    train.Settings, schedule=st.sampled_from(["wsd", "cosine"]), decay_lr=st.booleans(), max_iters=st.integers(1, 50),
    warmup_iters=st.integers(0, 60), lr_decay_iters=st.integers(0, 60), learning_rate=st.floats(0, 10),
    min_lr=st.floats(0, 10), decay_share=st.floats(0, 1, exclude_min=True)))
def test_the_learning_rate_never_leaves_its_range(s):
    for step in range(70):
        assert 0 <= train.learning_rate(step, s) <= max(s.learning_rate, s.min_lr) * (1 + 1e-9)


def test_the_run_follows_the_schedule(project):
    project.train("--log_interval=1", "--warmup_iters=5")
    s = project.settings("--warmup_iters=5")
    assert [line["lr"] for line in project.log()] == pytest.approx([train.learning_rate(i, s) for i in range(20)])
