"""The optimizers compared with references, and the learning rate schedule."""
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train

pytestmark = pytest.mark.usefixtures("seeded")
SHAPE = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, ngram=1)
MODELS = {
    "default": {}, "bigram": dict(n_layer=0), "tied": dict(tie_weights=True), "gains": dict(norm_affine=True),
    "gpt2": dict(position="learned", norm="layernorm", norm_affine=True, bias=True, tie_weights=True, zero_init=False)}


def newton_schulz(G):
    """Five steps of Jordan's quintic on one matrix, in float32."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def reference_muon(weight, gradients, lr, momentum, weight_decay):
    """One matrix after Muon's steps, written as published."""
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


@pytest.mark.parametrize("lr, momentum, weight_decay", [(1e-2, 0.95, 0.1), (0.1, 0.0, 0.0), (1e-3, 0.8, 1.0)])
def test_muon_is_the_published_algorithm(lr, momentum, weight_decay):
    """Square, wide and tall matrices, two of one shape, and three matrices in one parameter."""
    weights = [torch.randn(shape) for shape in [(32, 32), (32, 32), (32, 128), (128, 32), (32, 48)]]
    stacked = torch.randn(96, 32)
    params = [torch.nn.Parameter(w.clone()) for w in (*weights, stacked)]
    muon = train.Muon([dict(params=params[:-1]), dict(params=params[-1:], chunks=3)], lr=lr, momentum=momentum,
                      weight_decay=weight_decay)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    steps([muon], params, gradients)
    expected = [reference_muon(weight, [g[i] for g in gradients], lr, momentum, weight_decay)
                for i, weight in enumerate(weights)]
    expected.append(torch.cat([reference_muon(part, parts, lr, momentum, weight_decay) for part, *parts in
                               zip(stacked.split(32), *(g[-1].split(32) for g in gradients), strict=True)]))
    for p, weight in zip(params, expected, strict=True):
        torch.testing.assert_close(p.data, weight, rtol=1e-4, atol=1e-2 * lr)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_exactly_one_group(optimizer, model):
    """Gains and biases have no weight decay."""
    s = train.Settings(**(SHAPE | MODELS[model]), optimizer=optimizer)
    model = train.GPT(s)
    groups = [group for each in train.configure_optimizers(model, s) for group in each.param_groups]
    found = sorted(id(p) for group in groups for p in group["params"])
    assert found == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all(group["weight_decay"] == (s.weight_decay if p.ndim > 1 else 0) for p in group["params"])


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Queries, keys and values are three matrices, each with an update whose singular values are near one."""
    s = train.Settings(**(SHAPE | MODELS["gpt2"]), weight_decay=0.0, learning_rate=1e-2)
    model = train.GPT(s)
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    gradients = [torch.randn_like(p) for p in params]
    for gradient in gradients:
        if gradient.shape == (96, 32):  # of different sizes, but full rank
            for i, part in enumerate(gradient.split(32)):
                part.copy_(torch.linalg.qr(part)[0] * 10.0 ** -i)
    steps(train.configure_optimizers(model, s), params, [gradients])
    matrices = {id(p) for p in model.h.parameters() if p.ndim == 2}
    assert len(matrices) == 4 * s.n_layer
    for p, old in zip(params, before, strict=True):
        if id(p) in matrices:
            for part in (p - old).chunk(3 if p.shape == (96, 32) else 1):
                values = torch.linalg.svdvals(part) / (s.learning_rate * 0.2 * math.sqrt(max(part.shape)))
                assert values.max() < 1.3 and values.median() > 0.6
        else:  # AdamW's first step is the learning rate, in the gradient's direction
            torch.testing.assert_close((p - old).abs(), torch.full_like(p, s.learning_rate), rtol=1e-2, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_adamw_is_torchs_adamw(model):
    s = train.Settings(**(SHAPE | MODELS[model]), optimizer="adamw", beta1=0.8, beta2=0.95, weight_decay=0.3)
    model = train.GPT(s)
    params = list(model.parameters())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = torch.optim.AdamW(
        [dict(params=[p for p in copies if p.ndim >= 2], weight_decay=0.3),
         dict(params=[p for p in copies if p.ndim < 2], weight_decay=0.0)],
        lr=s.learning_rate, betas=(0.8, 0.95), foreach=False, fused=False)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(5)]
    steps(train.configure_optimizers(model, s), params, gradients)
    steps([reference], copies, gradients)
    for p, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(p, copy, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped(project):
    """The log has the norm before clipping; the optimizer gets at most grad_clip."""
    norms = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: norms.append(
        math.sqrt(sum(p.grad.square().sum().item() for group in optimizer.param_groups for p in group["params"]))))
    try:
        for clip in (0, 1e6, 0.05):
            norms.clear()
            project.train("--optimizer=adamw", f"--grad_clip={clip}", "--log_interval=1", "--learning_rate=1e-3")
            logged = [line["grad_norm"] for line in project.log()]
            assert len(logged) == 20 and max(logged) > 0.1
            assert norms == pytest.approx([min(norm, clip or math.inf) for norm in logged], rel=1e-3)
    finally:
        hook.remove()


@pytest.mark.parametrize("overflow", ["wte.weight", "h.0.attn.c_attn.weight"], ids=["AdamW", "Muon"])
def test_an_overflow_in_one_optimizers_gradients_steps_neither(overflow):
    s = train.Settings(**SHAPE, zero_init=False)
    model, idx = train.GPT(s), torch.randint(61, (4, 17))
    model.compute_dtype = torch.float16
    optimizers, scaler = train.configure_optimizers(model, s), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    for spoiled in (True, False):
        scaler.scale(model(idx[:, :-1], idx[:, 1:])[1]).backward()
        if spoiled:
            model.get_parameter(overflow).grad[0, 0] = math.inf
        grad_norm = train.optimizer_step(model, optimizers, scaler, lr=1e-2, grad_clip=1.0)
        assert grad_norm.isfinite() != spoiled and scaler.get_scale() == 512
        assert [bool(each.state) for each in optimizers] == [not spoiled] * 2
        assert {torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)} == {spoiled}


# Schedule

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
    assert [train.get_lr(step, s) for step in range(1001)] == pytest.approx(
        [nanogpt_learning_rate(step, s) for step in range(1001)], rel=1e-9)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_decay_ends_at_max_iters_by_default(schedule):
    s = train.Settings(schedule=schedule, learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=200)
    values = [train.get_lr(step, s) for step in range(201)]
    assert values[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert all(a > b for a, b in zip(values[11:], values[12:], strict=False))
    assert values[200] == pytest.approx(0.1)


@pytest.mark.parametrize("frac", [1.0, 0.5, 0.1])
def test_wsd_is_constant_and_then_linear(frac):
    s = train.Settings(schedule="wsd", learning_rate=1.0, warmup_iters=20, max_iters=220, cooldown_frac=frac)
    values = [train.get_lr(step, s) for step in range(221)]
    turn = 220 - round(frac * 200)
    assert values[20:turn + 1] == pytest.approx([1.0] * (turn - 19))
    assert values[turn:] == pytest.approx([1 - i / (220 - turn) for i in range(221 - turn)])


def test_decay_lr_false_is_constant_without_warmup_as_in_nanogpt():
    s = train.Settings(decay_lr=False, learning_rate=0.3, warmup_iters=10, max_iters=100)
    assert {train.get_lr(step, s) for step in range(100)} == {0.3}


def test_a_run_follows_the_schedule(project):
    project.train("--log_interval=1", "--warmup_iters=5")
    s = project.settings("--warmup_iters=5")
    assert [line["lr"] for line in project.log()] == pytest.approx([train.get_lr(i, s) for i in range(20)])


def test_ranks_exchange_updates_in_the_dtype_they_were_computed_in(monkeypatch):
    """Rank 0 of two: bfloat16 halves the bytes of the all-gather."""
    gathered = []

    def all_gather(parts, done):
        gathered.append(done.dtype)
        for part in parts:
            part.copy_(done)

    for name, value in dict(is_initialized=True, get_world_size=2, get_rank=0).items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    updates = train.orthogonalize([torch.randn(8, 16), torch.randn(8, 16)], torch.bfloat16)
    assert gathered == [torch.bfloat16] and [u.dtype for u in updates] == [torch.float32] * 2
