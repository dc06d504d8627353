"""GPT-2 from files in Hugging Face's layout: the same numbers as transformers', by path and by name, and finetuning it.

Every model here is made on the spot, and the hub is a server on this machine.
"""
import doctest
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import same

import prepare
import sample
import train

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parent.parent
GPT2 = dict(kind="tiktoken", encoding="gpt2")
SHAPES = [dict(), dict(n_layer=1, n_head=1, n_embd=8), dict(n_layer=3, n_head=4, n_embd=24, n_positions=9),
          dict(activation_function="gelu"), dict(activation_function="gelu_pytorch_tanh"),
          dict(tie_word_embeddings=False), dict(n_inner=128), dict(reorder_and_upcast_attn=True), dict(vocab_size=7)]
pytestmark = pytest.mark.usefixtures("torch_state")


def gpt2(**config):
    """A random GPT-2 of transformers, wide enough that its choices differ from one context to the next."""
    defaults = dict(vocab_size=50, n_positions=24, n_layer=2, n_head=2, n_embd=32, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**defaults | config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.fixture
def hub_folder(tmp_path):
    """A folder as transformers writes it."""
    gpt2().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def ours_from(folder):
    return train.model_from_checkpoint(sample.read_gpt2(str(folder)))


def change(folder, remove=(), **changes):
    """Rewrite the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in safetensors.load_file(path).items() if k not in remove}
    safetensors.save_file(tensors | changes, path)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(name):
    with pytest.raises(train.UserError) as caught:
        sample.read_gpt2(str(name))
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_logits_loss_and_greedy_text_are_those_of_transformers(shape, tmp_path):
    theirs = gpt2(**shape)
    theirs.save_pretrained(tmp_path / "hf")
    ours, c = ours_from(tmp_path / "hf"), theirs.config
    idx = torch.randint(c.vocab_size, (3, c.n_positions), generator=torch.Generator().manual_seed(2))
    logits, loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    torch.testing.assert_close(logits, theirs(idx[:, :-1]).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, atol=1e-5, rtol=0)
    prompt, new = idx[:, :4], c.n_positions - 4
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    drawn = torch.stack(list(sample.generate(ours, prompt, new, temperature=0)), 1)
    assert torch.equal(drawn, expected[:, 4:])


def without_prefix(folder):
    tensors = {k.removeprefix("transformer."): v.clone() for k, v in
               safetensors.load_file(folder / "model.safetensors").items()}
    safetensors.save_file(tensors, folder / "model.safetensors")


def as_pickle(folder, zipped=True):
    tensors = safetensors.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def with_buffers(folder):
    change(folder, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24), "transformer.h.1.attn.masked_bias":
                      torch.tensor(-1e4), "lm_head.weight":
                      safetensors.load_file(folder / "model.safetensors")["transformer.wte.weight"].clone()})


def padded(folder):
    wte = safetensors.load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change(folder, **{"transformer.wte.weight": torch.cat([wte, torch.ones(14, 32)])})


LAYOUTS = dict(plain=lambda folder: None, without_prefix=without_prefix, pickle=as_pickle, padded=padded,
               old_pickle=lambda folder: as_pickle(folder, False), with_buffers=with_buffers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_model(layout, hub_folder):
    expected = sample.read_gpt2(str(hub_folder))["model"]
    LAYOUTS[layout](hub_folder)
    assert same(sample.read_gpt2(str(hub_folder))["model"], expected)
    weights = next(path for path in hub_folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    assert same(sample.read_gpt2(str(weights))["model"], expected), "the path of the file instead of its folder"


def test_half_precision_files_become_float32(hub_folder):
    gpt2().half().save_pretrained(hub_folder)
    ours, theirs = ours_from(hub_folder), gpt2().half().float()
    idx = torch.arange(20)[None]
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size, vocabulary, positions, count", [
    ("gpt2", 50257, 1024, 124_439_808), ("gpt2-medium", 50257, 1024, 354_823_168),
    ("gpt2-large", 50257, 1024, 774_030_080), ("gpt2-xl", 50257, 1024, 1_557_611_200),
    ("openai-gpt", 40478, 512, 116_534_784 + 2 * 768),  # GPT-1 has no last normalization
    ("gopher-44m", 50257, 1024, None), ("gpt-mini", 50257, 1024, None), ("gpt-micro", 50257, 1024, None),
    ("gpt-nano", 50257, 1024, None)])
def test_every_size_of_the_zoo_has_the_published_number_of_parameters(size, vocabulary, positions, count):
    s = train.override(train.Settings(), [str(ROOT / "config" / "gpt2.py"), f"--size={size}"])
    s.vocab_size, s.block_size = vocabulary, positions
    with torch.device("meta"):
        model = train.GPT(s)
    L, C = s.n_layer, s.n_embd
    formula = vocabulary * C + positions * C + L * (12 * C * C + 13 * C) + 2 * C
    assert sum(p.numel() for p in model.parameters()) == formula == (count or formula)


def test_the_zoo_is_all_there():
    assert len(train.SIZES) == 9


# ----------------------------------------------------------------------------------------------------------------------
# Wrong files: one line that names the tensor or the setting


@pytest.mark.parametrize("key, value", [
    ("model_type", "llama"), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("n_inner", 100),
    ("activation_function", ["gelu"]), ("n_layer", 0.5), ("n_layer", -1), ("n_head", 5), ("n_embd", 10**30),
    ("vocab_size", "many"), ("n_positions", None)])
def test_a_config_that_cannot_be_had_is_refused_by_name(key, value, hub_folder):
    configure(hub_folder, **{key: value})
    assert key.replace("n_positions", "block_size") in refusal(hub_folder)


def test_a_wrong_tensor_is_named_with_both_shapes(hub_folder):
    original = (hub_folder / "model.safetensors").read_bytes()

    def line(**how):
        (hub_folder / "model.safetensors").write_bytes(original)
        change(hub_folder, **how)
        return refusal(hub_folder)

    name = "transformer.h.1.mlp.c_fc.weight"
    assert re.search(r"h\.1\.mlp\.c_fc\.weight.*\(32, 128\)", line(remove=[name]))
    assert re.search(r"h\.1\.mlp\.c_fc\.weight.*\(128, 32\).*\(32, 128\)", line(**{name: torch.ones(128, 32)}))
    assert re.search(r"h\.1\.mlp\.c_fc\.weight.*\(5,\).*\(32, 128\)", line(**{name: torch.ones(5)}))
    assert re.search(r"c_fc\.weight.*int64", line(**{name: torch.ones(32, 128, dtype=torch.int64)}))
    assert re.search(r"wte\.weight.*\(49, 32\).*\(50, 32\)", line(**{"transformer.wte.weight": torch.ones(49, 32)}))
    assert re.search(r"wpe\.weight.*\(23, 32\).*\(24, 32\)", line(**{"transformer.wpe.weight": torch.ones(23, 32)}))
    assert re.search(r"h\.2\.ln_1\.weight.*\(32,\)", line(**{"transformer.h.2.ln_1.weight": torch.ones(32)}))
    assert "lm_head.weight is not wte.weight" in line(**{"lm_head.weight": torch.ones(50, 32)})


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


HOSTILE = {
    "config.json": [b"", b"[]", b"7", b"{", b"[" * 10**5, b'{"n_layer": 1' + b"0" * 5000 + b"}", b"\xff", b"{}",
                    b"null"],
    "model.safetensors": [b"", b"x", b"\xff" * 8 + b"{}", (10**9).to_bytes(8, "little") + b"{}",
                          b'\x02\0\0\0\0\0\0\0{}', b"PK\3\4"],
}


@pytest.mark.parametrize("file, data", [(file, data) for file, rows in HOSTILE.items() for data in rows],
                         ids=lambda value: str(value)[:30])
def test_a_damaged_or_hostile_file_is_one_line(file, data, hub_folder):
    (hub_folder / file).write_bytes(data)
    assert str(hub_folder) in refusal(hub_folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_whatever_bytes_change_a_file_is_read_or_refused(file, hub_folder, recwarn):
    if file == "pytorch_model.bin":
        as_pickle(hub_folder, zipped=False)
    path, draw = hub_folder / file, random.Random(1)
    good, refused = path.read_bytes(), 0
    for _ in range(150):
        data = bytearray(good[:draw.choice([len(good), draw.randrange(len(good))])])
        for _ in range(draw.randrange(4)):  # near the beginning, where the structure is
            where = draw.randrange(max(1, min(len(data), 2000)))
            data[where:where + 1] = bytes([draw.randrange(256)])
        path.write_bytes(data)
        try:
            train.model_from_checkpoint(sample.read_gpt2(str(hub_folder)))
        except train.UserError as error:
            assert len(str(error)) < 1000
            refused += 1
    assert 20 < refused and not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_runs_code(zipped, hub_folder, monkeypatch):
    monkeypatch.chdir(hub_folder)
    as_pickle(hub_folder)
    torch.save({"wte.weight": Trap()}, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "nothing was run" in refusal(hub_folder)
    assert not Path("trapped").exists()


def test_a_pickle_with_a_flipped_bit_is_refused(hub_folder):
    as_pickle(hub_folder)
    path = hub_folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "wrong checksum" in refusal(hub_folder)


def test_a_view_that_claims_more_than_the_file_holds_is_refused(hub_folder):
    as_pickle(hub_folder)
    torch.save({"wte.weight": torch.ones(1).expand(10**6, 10**6)}, hub_folder / "pytorch_model.bin")
    assert "more than there is" in refusal(hub_folder)


def test_what_is_no_such_folder_is_one_line(tmp_path, hub_folder):
    assert "did you mean gpt2-xl?" in refusal("gpt2-xxl") and "did you mean resume?" in refusal("Resume")
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    (hub_folder / "config.json").unlink()
    assert "config.json" in refusal(hub_folder)
    (tmp_path / "hollow").mkdir()
    assert "hollow" in refusal(tmp_path / "hollow")


def test_without_safetensors_the_line_says_what_to_install(hub_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(hub_folder)
    monkeypatch.undo()


# ----------------------------------------------------------------------------------------------------------------------
# By name, from a hub on this machine


class Hub(http.server.ThreadingHTTPServer):
    """Serves files as huggingface.co does: large ones by a redirection that says their SHA-256."""
    daemon_threads = True

    def __init__(self, folder, repository):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.prefix, self.seen, self.drop, self.lie = folder, f"/{repository}/resolve/main/", [], 0, False


class HubHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server
        hub.seen.append((self.command, self.path, self.headers.get("Range")))
        name = self.path.rpartition("/")[2]
        if not (self.path.startswith((hub.prefix, "/cdn/"))) or not (hub.folder / name).exists():
            return self.send_error(404)
        data = (hub.folder / name).read_bytes()
        if name.endswith(".safetensors") and not self.path.startswith("/cdn/"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{hub.server_port}/cdn/{name}")
            sha256 = hashlib.sha256(data + b"!" * hub.lie).hexdigest()
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        if self.command == "GET":
            cut = hub.drop and name.endswith(".safetensors")
            hub.drop -= bool(cut)
            self.wfile.write(data[start:(start + len(data)) // 2] if cut else data[start:])
            self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def hub(project, hub_folder, monkeypatch):
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0, 0))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with Hub(hub_folder, "openai-community/gpt2-medium") as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}/")
        yield running
        running.shutdown()


def test_a_name_is_fetched_once_and_then_needs_no_network(hub, hub_folder, monkeypatch):
    expected = sample.read_gpt2(str(hub_folder))
    assert same(sample.read_gpt2("gpt2-medium")["model"], expected["model"])
    seen = len(hub.seen)
    assert sorted(p.name for p in Path("data/hub/gpt2-medium").iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert same(sample.read_gpt2("gpt2-medium")["model"], expected["model"]) and len(hub.seen) == seen


def test_every_name_asks_for_its_repository(hub, monkeypatch):
    for name, repository in prepare.GPT2S.items():
        hub.prefix = f"/{repository}/resolve/main/"
        sample.find_gpt2(name)
    assert len(prepare.GPT2S) == 5 and hub.seen[-1][1] == "/cdn/model.safetensors"


def test_a_broken_download_goes_on_where_it_stopped(hub):
    hub.drop = 2
    sample.read_gpt2("gpt2-medium")
    ranges = [asked for command, path, asked in hub.seen if command == "GET" and path.startswith("/cdn/")]
    assert ranges[0] is None and len(ranges) == 3 and all(ranges[1:])


def test_a_file_with_another_checksum_is_refused(hub):
    hub.lie = True
    assert "SHA-256" in refusal("gpt2-medium")
    assert not Path("data/hub/gpt2-medium/model.safetensors").exists()


def test_no_network_and_no_such_file_are_one_line(hub, project, monkeypatch):
    assert "404" in refusal("gpt2") and "--init_from=FOLDER" in refusal("gpt2")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for main, argv in ((train.main, project.tiny), (sample.main, [])):
        project.capsys.readouterr()
        assert main([*argv, "--init_from=gpt2-xl"]) == 2
        line = project.capsys.readouterr().err
        assert line.count("\n") == 1 and "gpt2-xl" in line and "--init_from=FOLDER" in line


def test_one_process_of_a_machine_fetches_and_the_others_wait_for_the_whole_file(hub, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = []
    waiting = threading.Thread(target=lambda: found.append(sample.find_gpt2("gpt2-medium")), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not hub.seen
    monkeypatch.delenv("LOCAL_RANK")
    sample.find_gpt2("gpt2-medium")
    waiting.join(10)
    assert found == [Path("data/hub/gpt2-medium")]


# ----------------------------------------------------------------------------------------------------------------------
# Finetuning

SHAPE = ["--ngram=1", "--ngram_rows=32768", "--n_layer=2", "--dataset=words"]  # GPT-2's own, against the fixture's
FINETUNE = [*SHAPE, "--init_from=hf", "--optimizer=adamw", "--learning_rate=1e-3"]


@pytest.fixture
def words(project, hub_folder):
    """A project with a GPT-2 in hf/ and data that say they are in GPT-2's tokens."""
    project.dataset("words", project.text, tokenizer=GPT2)
    return project


def test_step_0_is_said_and_logged_and_is_the_loss_of_the_files(words):
    out = words.train(*FINETUNE, "--max_iters=5", "--dropout=0.1").out
    first = words.log()[0]
    assert first["step"] == 0 and re.search(rf"^ +0 +{first['val_loss']:.4f}$", out, re.MULTILINE)
    measured = words.train(*FINETUNE, "--eval_only").out
    assert f"validation loss {first['val_loss']:.4f}" in measured
    model = ours_from("hf")
    split, s = words.split("val"), words.settings("--block_size=16")
    assert train.evaluate(model, split, s, train.World()) == pytest.approx(first["val_loss"], abs=1e-5)
    after = words.log()[-1]["val_loss"]
    assert after < first["val_loss"] and words.checkpoint(name="best.pt")["best_step"] == 5


@pytest.mark.parametrize("extra", [[], ["--train_last=1"], ["--train_last=2", "--optimizer=muon"]], ids=str)
def test_a_stopped_finetuning_goes_on_bit_for_bit_without_the_files(words, extra):
    run = [*FINETUNE, "--dropout=0.1", *extra]
    words.train(*run, "--out_dir=whole")
    words.train(*run, "--out_dir=parts", "--max_iters=10", "--lr_decay_iters=20")
    shutil.rmtree("hf")
    words.train("--init_from=resume", "--out_dir=parts", "--max_iters=20", *SHAPE, *extra,
                *([] if any("muon" in word for word in extra) else ["--optimizer=adamw"]))
    whole, parts = words.checkpoint("whole"), words.checkpoint("parts")
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert words.log("whole") == [*words.log("parts")]


def test_an_earlier_run_is_set_aside(words):
    words.train(*FINETUNE, "--max_iters=2")
    words.train(*FINETUNE, "--max_iters=3")
    assert words.checkpoint()["step"] == 3 and words.checkpoint("out/previous")["step"] == 2


def test_a_shorter_context_padded_rows_and_dropout_are_free(words):
    words.train(*FINETUNE, "--max_iters=1", "--block_size=8", "--vocab_multiple=64", "--dropout=0.2",
                "--learning_rate=0")
    model, files = words.checkpoint()["model"], sample.read_gpt2("hf")["model"]
    assert torch.equal(model["wpe.weight"], files["wpe.weight"][:8])
    assert torch.equal(model["wte.weight"][:50], files["wte.weight"]) and len(model["wte.weight"]) == 64
    train.model_from_checkpoint(words.checkpoint())


@pytest.mark.parametrize("flag, named", [
    ("--n_embd=64", "n_embd=64"), ("--n_head=4", "n_head=4"), ("--n_layer=3", "n_layer=3"), ("--position=rope", "rope"),
    ("--qk_norm", "qk_norm"), ("--bias=False", "bias"), ("--activation=relu2", "relu2"), ("--size=gpt2", "n_layer=12"),
    ("--block_size=25", "block_size=25"), ("--vocab_size=60", "vocab_size=60"), ("--tied_head=False", "tied_head"),
    ("--dataset=tiny", "--tokenizer=gpt2"), ("--init_from=gpt3", "gpt2"), ("--train_last=3", "--train_last=2"),
    ("--init_from=data", "data")])
def test_what_contradicts_the_files_is_refused(flag, named, words):
    assert named in words.refuse(*FINETUNE, flag)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_last_blocks_learn_and_only_they_have_optimizer_state(words, optimizer):
    words.train(*FINETUNE, f"--optimizer={optimizer}", "--train_last=1", "--max_iters=3", "--weight_decay=0.1")
    after, before = words.checkpoint(), sample.read_gpt2("hf")["model"]
    before["wpe.weight"] = before["wpe.weight"][:16]
    moved = {name for name, weight in after["model"].items() if not torch.equal(weight, before[name])}
    expected = {name for name in before if name.startswith(("blocks.1.", "norm."))}
    assert moved == expected
    assert set(after["optimizer"]) == expected


def test_frozen_blocks_also_go_with_a_new_model_and_cannot_be_changed_on_resume(project):
    run = ["--n_layer=2", "--train_last=1", "--tied_head"]  # no parameter is left for AdamW
    project.train(*run, "--max_iters=3")
    assert set(project.checkpoint()["optimizer"]) == {f"blocks.1.{name}.weight" for name in (
        "attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}
    project.train(*run, "--init_from=resume", "--max_iters=5")
    assert "train_last=2" in project.refuse("--n_layer=2", "--tied_head", "--init_from=resume", "--train_last=2")


def test_what_is_frozen_takes_no_memory_but_its_own():
    def gib(*argv):
        s = train.override(train.Settings(), [str(ROOT / "config" / "gpt2.py"), "--vocab_size=50257", *argv])
        return float(re.search(r"take ([\d.]+) GiB", train.out_of_memory(s))[1])

    block = 12 * 768**2 + 13 * 768
    assert gib() == pytest.approx(16 * 124_439_808 / 2**30, abs=0.01)
    assert gib("--train_last=2") == pytest.approx((4 * 124_439_808 + 12 * 2 * block) / 2**30, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--parallel=fsdp", "--compile=True", "--recompute=True"])
def test_frozen_blocks_in_several_processes_and_compiled(words, extra):
    if "compile" in extra and not shutil.which("g++"):
        pytest.skip("no compiler")
    run = [*words.tiny, *FINETUNE, "--train_last=1", "--max_iters=4", "--gradient_accumulation_steps=2"]
    words.train(*run[len(words.tiny):], "--out_dir=one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if extra in (
        "", "--parallel=fsdp") else [sys.executable]
    done = subprocess.run([*launch, str(ROOT / "train.py"), *run, "--out_dir=two", *extra.split()], timeout=300,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    assert done.returncode == 0 and "compile failed" not in done.stderr, done.stderr
    one, two = words.checkpoint("one")["model"], words.checkpoint("two")["model"]
    assert words.log("one")[-1]["val_loss"] == pytest.approx(words.log("two")[-1]["val_loss"], abs=1e-3)
    assert torch.equal(one["blocks.0.attn.qkv.weight"], two["blocks.0.attn.qkv.weight"])


def test_a_path_needs_the_other_scripts_but_not_the_network(words):
    def finetune():
        offline = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_ENDPOINT": "http://127.0.0.1:1"}
        return subprocess.run([sys.executable, "train.py", *words.tiny, *FINETUNE, "--max_iters=1"], env=offline,
                              capture_output=True, text=True, timeout=120)

    shutil.copy(ROOT / "train.py", "train.py")
    alone = finetune()
    assert alone.returncode == 2 and "needs sample.py" in alone.stderr and alone.stderr.count("\n") == 1
    for name in ("sample.py", "prepare.py"):
        shutil.copy(ROOT / name, name)
    done = finetune()
    assert done.returncode == 0, done.stderr


def test_the_config_file_finetunes_what_the_hub_has(hub, words, monkeypatch):
    hub.prefix = "/openai-community/gpt2/resolve/main/"
    tiny = ["--dataset=words", "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=2", "--block_size=16"]
    assert train.main([str(ROOT / "config" / "finetune_gpt2.py"), *tiny, "--gradient_accumulation_steps=2"]) == 0
    assert words.checkpoint()["config"]["init_from"] == "gpt2" and words.checkpoint()["config"]["n_layer"] == 2
    hub.shutdown()
    shutil.rmtree("data/hub")
    words.train(*SHAPE, "--init_from=resume", "--optimizer=adamw", "--max_iters=3", "--batch_size=1")


# ----------------------------------------------------------------------------------------------------------------------
# Talking to it


@pytest.fixture
def letters(monkeypatch):
    """A tiktoken encoding that says it is GPT-2's and has a token for each byte."""
    import tiktoken
    small = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                              special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)


def test_text_goes_in_and_comes_out_as_from_transformers(letters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = gpt2(vocab_size=257)
    with torch.no_grad():
        theirs.transformer.wte.weight[256] = 0  # so that no text ends
    theirs.save_pretrained("hf")
    ids = torch.tensor([list(b"The sea")])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    text = bytes(expected.tolist()).decode("utf-8", "replace")
    assert sample.main(["--init_from=hf", "--start=The sea", "--temperature=0", "--max_new_tokens=12", "--device=cpu",
                        "--dtype=float32"]) == 0
    assert capsys.readouterr().out in (text, text + "\n")


def test_past_the_context_gpt2_goes_on(letters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpt2(vocab_size=257).save_pretrained("hf")
    assert sample.main(["--init_from=hf", "--max_new_tokens=100", "--device=cpu", "--start=" + "abc" * 20]) == 0
    assert len(capsys.readouterr().out) > 60


def test_a_checkpoint_and_gpt2_at_once_are_refused(capsys):
    for argv in (["--init_from=scratch"], ["--init_from=gpt2", "--ckpt=out/best.pt"]):
        assert sample.main(argv) == 2
        assert "--ckpt=PATH" in capsys.readouterr().err


def test_the_architecture_written_out_agrees_with_the_files(words):
    words.train(*FINETUNE, str(ROOT / "config" / "gpt2.py"), "--dataset=words", "--n_layer=2", "--n_head=2",
                "--n_embd=32", "--block_size=16", "--max_iters=1", "--batch_size=2", "--warmup_iters=0")
    assert words.log()[0]["step"] == 0


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(train).failed == 0
