"""nanoGPT's data folders, checkpoints and config files, in the layout in which it writes them."""
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, sentences
from test_safety import CODE, Call

import sample
import train

TEXT = sentences(120)
CHARS = sorted(set(TEXT))
ITOS, V = dict(enumerate(CHARS)), len(CHARS)
NANOGPT = str(ROOT / "config" / "nanogpt.py")
CONFIG = """
import time
out_dir = 'out-letters'
eval_iters = 0
wandb_project = 'letters'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'letters' # below data/
always_save_checkpoint = False
batch_size = 2
gradient_accumulation_steps = 2 * 2
block_size = 16
n_layer = 2
dropout = 0.0
max_iters = 1
learning_rate = 1e-2
warmup_iters = 1
device = 'cpu'
compile = False
backend = 'nccl'
dtype = 'float32'
"""


def write_data(folder, itos=ITOS, ids=None):
    """train.bin and val.bin of TEXT, or of `ids`, and meta.pkl."""
    folder.mkdir(parents=True)
    ids = np.array([CHARS.index(c) for c in TEXT] if ids is None else ids, dtype=np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    if itos is not None:
        meta = dict(vocab_size=len(itos), itos=itos, stoi={c: i for i, c in itos.items()})
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def write_checkpoint(path, prefix="", bias=False, masks=False, vocab_size=V, dataset="letters", **model_args):
    """A random model with large weights. Returns its weights by nanoGPT's names."""
    C, T, layers, generator = 32, 24, 2, torch.Generator().manual_seed(0)
    shapes = {"transformer.wte.weight": (vocab_size, C), "transformer.wpe.weight": (T, C)}
    for i in range(layers):
        for name, shape in (("ln_1.weight", (C,)), ("attn.c_attn.weight", (3 * C, C)), ("attn.c_proj.weight", (C, C)),
                            ("ln_2.weight", (C,)), ("mlp.c_fc.weight", (4 * C, C)), ("mlp.c_proj.weight", (C, 4 * C))):
            shapes[f"transformer.h.{i}.{name}"] = shape
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if ".w" in name[12:]
                   and not name.endswith(("wte.weight", "wpe.weight"))}
    weights = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if masks:
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()
    args = dict(n_layer=layers, n_head=2, n_embd=C, block_size=T, bias=bias, vocab_size=vocab_size, dropout=0.2)
    checkpoint = dict(
        model={prefix + name: weight for name, weight in weights.items()}, optimizer=dict(state={}, param_groups=[]),
        model_args=args | model_args, iter_num=10, best_val_loss=torch.tensor(1.5), config=dict(dataset=dataset))
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)
    return {name: weight.requires_grad_() for name, weight in weights.items() if not name.endswith(".attn.bias")}


def reference_logits(weights, idx, n_head=2):
    """nanoGPT's model, written out: pre-norm, learned positions, exact GELU, tied head. (B, T) -> (B, T, V)."""
    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    (B, T), future = idx.shape, torch.ones(idx.shape[1], idx.shape[1], dtype=torch.bool).triu(1)
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    for block in ("transformer.h.0", "transformer.h.1"):
        q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2)
                   for t in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1), f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def reference_loss(weights, tokens):
    return F.cross_entropy(reference_logits(weights, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture
def nanogpt(project):
    """A project with a checkout nanoGPT/ that has a dataset and a checkpoint of `weights`, and with its config."""
    write_data(project.path / "nanoGPT" / "data" / "letters")
    project.weights = write_checkpoint(project.path / "nanoGPT" / "out" / "ckpt.pt")
    (project.path / "letters.py").write_text(CONFIG)
    return project


def run(*argv, status=0):
    assert train.main([NANOGPT, "letters.py", *argv]) == status


# Data

def test_a_data_folder_gives_the_curve_of_the_same_text_in_our_format(nanogpt):
    nanogpt.train("--max_iters=10")
    nanogpt.train("--max_iters=10", "--dataset=nanoGPT/data/letters", "--out_dir=nanoGPT/out-ours")
    ours, reference = nanogpt.log(), nanogpt.log("nanoGPT/out-ours")
    for key in ("loss", "val_loss", "train_loss", "grad_norm"):
        assert [r[key] for r in reference] == [r[key] for r in ours]
    assert reference[-1]["bits_per_byte"] is None, "the number of bytes is not known"
    assert nanogpt.checkpoint("nanoGPT/out-ours")["tokenizer"] == nanogpt.checkpoint()["tokenizer"]


def test_a_data_folder_without_characters_is_of_gpt2_tokens(nanogpt):
    write_data(nanogpt.path / "nanoGPT" / "data" / "words", None, [*range(0, 50257, 200), 50256])
    nanogpt.train("--dataset=nanoGPT/data/words", "--max_iters=1", "--n_embd=8")
    checkpoint = nanogpt.checkpoint()
    assert checkpoint["config"]["vocab_size"] == 50257
    assert checkpoint["tokenizer"] == dict(kind="tiktoken", encoding="gpt2")


@pytest.mark.parametrize("meta", [
    pickle.dumps(dict(vocab_size=2, itos=Call(eval, CODE))), pickle.dumps(Call(eval, CODE), protocol=0), b"",
    pickle.dumps(dict(itos=ITOS))[:-9], pickle.dumps(dict(itos={1: "a"}))], ids=range(5))
def test_meta_pkl_runs_no_code_and_its_damage_is_one_line(nanogpt, meta):
    path = nanogpt.path / "nanoGPT" / "data" / "letters" / "meta.pkl"
    path.write_bytes(meta)
    assert "meta.pkl" in nanogpt.refuse("--dataset=nanoGPT/data/letters")
    assert not Path("canary").exists()


# Checkpoints

@pytest.mark.parametrize("options", [
    dict(), dict(bias=True), dict(prefix="_orig_mod."), dict(bias=True, masks=True), dict(vocab_size=50304),
    dict(vocab_size=50257)], ids=str)
@torch.inference_mode()
def test_a_checkpoint_has_the_logits_of_nanogpt(options, tmp_path):
    weights = write_checkpoint(tmp_path / "out" / "ckpt.pt", **options)
    checkpoint = train.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    model = train.model_from_checkpoint(checkpoint)
    vocab_size = min(options.get("vocab_size", V), 50257)
    idx = torch.randint(vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(weights, idx)
    torch.testing.assert_close(model(idx)[0], expected[..., :vocab_size], atol=1e-4, rtol=0)
    assert len(model.wte.weight) == expected.shape[-1], "padded rows stay"
    is_gpt2 = vocab_size == 50257
    assert checkpoint["tokenizer"] == (dict(kind="tiktoken", encoding="gpt2") if is_gpt2 else None)


def test_the_validation_loss_is_that_of_nanogpt(nanogpt):
    assert train.main(["--init_from=nanoGPT/out/ckpt.pt", "--dataset=nanoGPT/data/letters", "--eval_only",
                       "--device=cpu", "--dtype=float32"]) == 0
    found = float(nanogpt.capsys.readouterr().out.split("validation loss ")[1].split()[0])
    ids = torch.tensor([CHARS.index(c) for c in TEXT[len(TEXT) * 9 // 10:]])
    windows = [ids[i:i + 25][None] for i in range(0, len(ids) - 1, 24)]
    total = sum(reference_loss(nanogpt.weights, w).item() * (w.shape[1] - 1) for w in windows)
    assert found == pytest.approx(total / (len(ids) - 1), abs=1e-4)
    assert not Path("out").exists()


def test_one_adamw_step_is_that_of_nanogpt(nanogpt):
    """Weight decay of the matrices, clipping and warmup: the same weights after a step on the same batch."""
    run("--dataset=nanoGPT/data/letters", "--init_from=nanoGPT/out/ckpt.pt")
    s = train.Settings(**nanogpt.checkpoint("out-letters")["config"])
    folder, meta = train.read_meta("nanoGPT/data/letters")
    x, y = train.get_batch(train.TokenDataset(folder, "train", meta), s, 0, 8, torch.device("cpu"))
    weights = nanogpt.weights
    del weights["lm_head.weight"]
    optimizer = torch.optim.AdamW([
        dict(params=[p for p in weights.values() if p.ndim >= 2], weight_decay=0.1),
        dict(params=[p for p in weights.values() if p.ndim < 2], weight_decay=0.0)], lr=1e-2 / 2, betas=(0.9, 0.95))
    reference_loss(weights, torch.cat([x, y[:, -1:]], 1)).backward()
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    optimizer.step()
    found = nanogpt.checkpoint("out-letters")["model"]
    for name, weight in weights.items():
        settled = weight.grad.abs()[:16 if "wpe" in name else None] > 1e-6  # Adam's first step divides g by |g|
        ours, reference = found[name.removeprefix("transformer.")][settled], weight[:len(settled)][settled].detach()
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=0)
        assert settled.float().mean() > 0.5


def test_a_run_from_a_checkpoint_lowers_the_loss_and_resumes(nanogpt):
    flags = ["--dataset=nanoGPT/data/letters", "--eval_interval=10", "--init_from=nanoGPT/out/ckpt.pt"]
    run(*flags, "--max_iters=20")
    first, *_, last = nanogpt.log("out-letters")
    assert first["step"] == 0 and last["step"] == 20 and last["val_loss"] < first["val_loss"]
    run(*flags, "--max_iters=25", "--init_from=resume")
    assert nanogpt.log("out-letters")[-1]["step"] == 25


def test_resuming_a_run_of_nanogpt_is_refused(nanogpt):
    before = nanogpt.files()
    run("--out_dir=nanoGPT/out", "--dataset=nanoGPT/data/letters", "--init_from=resume", status=2)
    assert "--init_from=nanoGPT/out/ckpt.pt" in nanogpt.capsys.readouterr().err
    assert nanogpt.files() == before


def test_a_checkpoint_of_train_py_starts_a_new_run(project):
    project.train()
    best = min(r["val_loss"] for r in project.log() if r["val_loss"])
    project.train("--init_from=out/best.pt", "--out_dir=tuned", "--max_iters=5", "--learning_rate=1e-3")
    first, *_, last = project.log("tuned")
    assert first["step"] == 0 and first["val_loss"] == best and last["step"] == 5
    assert "n_layer=2" in project.refuse("--init_from=out/best.pt", "--n_layer=2")


# Generating

GREEDY = ["--device=cpu", "--dtype=float32", "--temperature=0", "--start=the", "--max_new_tokens=9"]


def generated(project, *argv):
    project.capsys.readouterr()
    assert sample.main([*GREEDY, *argv]) == 0
    return project.capsys.readouterr().out


@torch.inference_mode()
def test_sample_py_finds_the_characters(nanogpt, monkeypatch):
    """Beside the checkpoint's folder, below data/, or where --dataset says."""
    text = "the"
    for _ in range(9):
        ids = torch.tensor([[CHARS.index(c) for c in text]])
        text += CHARS[reference_logits(nanogpt.weights, ids)[0, -1].argmax()]
    assert generated(nanogpt, "--init_from=nanoGPT/out/ckpt.pt") == text + "\n"
    assert generated(nanogpt, "--out_dir=nanoGPT/out") == text + "\n"
    shutil.copytree("nanoGPT/data/letters", "data/letters")
    shutil.rmtree("nanoGPT/data")
    assert generated(nanogpt, "--ckpt=nanoGPT/out/ckpt.pt") == text + "\n"
    shutil.move("data/letters", "elsewhere")
    assert sample.main([*GREEDY, "--init_from=nanoGPT/out/ckpt.pt"]) == 2
    assert "--dataset" in nanogpt.capsys.readouterr().err
    assert generated(nanogpt, "--init_from=nanoGPT/out/ckpt.pt", "--dataset=./elsewhere") == text + "\n"
    nanogpt.dataset("fewer", "abc" * 100)
    assert sample.main([*GREEDY, "--init_from=nanoGPT/out/ckpt.pt", "--dataset=fewer"]) == 2
    assert nanogpt.capsys.readouterr().err.count("\n") == 1


# Config files

def test_a_config_file_means_what_it_means_there(nanogpt, capsys):
    values, _ = train.parse_args(train.Settings, [NANOGPT, "letters.py"])
    expected = dict(
        out_dir="out-letters", eval_interval=2000, eval_iters=0, wandb_project="letters", wandb_run_name="gpt2",
        dataset="letters", batch_size=2, gradient_accumulation_steps=4, n_layer=2, n_head=12, learning_rate=1e-2,
        compile="False", beta2=0.95, min_lr=6e-5, lr_decay_iters=600000, optimizer="adamw", position="learned",
        activation="gelu", bias=False, tie_weights=True)
    assert {key: values[key] for key in expected} == expected


def test_model_settings_come_from_pretrained_weights(nanogpt):
    """A config file of another shape does not contradict --init_from, as in nanoGPT; a flag does."""
    Path("small.py").write_text("n_layer = 12\nbias = True\nblock_size = 1024\nmax_iters = 1\ndevice = 'cpu'\n")
    flags = ["small.py", "--init_from=nanoGPT/out/ckpt.pt", "--dataset=nanoGPT/data/letters"]
    assert train.main(flags) == 0
    config = nanogpt.checkpoint()["config"]
    assert (config["n_layer"], config["bias"], config["block_size"]) == (2, False, 24)
    assert train.main([*flags, "--n_layer=12"]) == 2
    assert "n_layer=12, but the checkpoint has" in nanogpt.capsys.readouterr().err
