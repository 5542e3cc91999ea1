"""Quantising a float base before training: what is held, LoftQ's start, what is remembered, and refusals."""

import builtins
import copy
import itertools
import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
import models
from lowrank import LoraConfig, cli
from lowrank.core.init.loftq import loftq, taken_off
from lowrank.core.stored.held_as import held_as
from lowrank.core.stored.of_module import stored_weight
from lowrank.errors import CheckpointError, ConfigError, LowrankWarning
from lowrank.injection.adapters import lora_layers
from lowrank.injection.quantise import what_is_held
from lowrank.train.evaluator import evaluate
from lowrank.train.held import load_held, load_held_judge
from lowrank.train.models import find_model, head_modules, load_judge
from lowrank.train.settings import EvalSettings, TrainSettings
from lowrank.train.trainer import run
from quantised_models import dequantised, oracle

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).view(2, 12)


def small() -> Any:
    return models.causal("llama", hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(("scheme", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
def test_every_linear_but_the_head_is_held_as_bitsandbytes_holds_it(scheme, double):
    model, plain = small(), small()
    seen: dict[str, float] = {}

    def watch(path, weight, held):
        assert torch.equal(weight, plain.get_submodule(path).weight)
        seen[path] = float((weight - held.matrix()).norm() / weight.norm())

    held = lowrank.quantise(model, scheme, double=double, skip=["o_proj"], watch=watch)
    assert (held.layers, held.linear) == (12, 15) and held == what_is_held(model)
    assert held.bytes < held.plain_bytes / (3 if scheme == "int8" else 5)
    assert all(0 < share < (0.02 if scheme == "int8" else 0.2) for share in seen.values())
    layer, weight = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj.weight.detach()
    if scheme == "int8":
        wanted = bnb.functional.int8_vectorwise_dequant(*bnb.functional.int8_vectorwise_quant(weight.half())[:2])
    else:
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=scheme, compress_statistics=double)
        wanted = dequantised(packed, state)
    assert torch.equal(oracle(layer), wanted)
    assert (model(IDS).logits - plain(IDS).logits).abs().max() < plain(IDS).logits.abs().max()


def test_loftq_starts_at_the_best_rank_r_part_of_what_was_taken_off():
    residual, scale, rank = torch.randn(40, 30), 1.5, 6
    a, b = loftq(residual, rank, scale)
    left = torch.linalg.svdvals(residual)[rank:].norm()
    torch.testing.assert_close((residual - scale * b @ a).norm(), left)
    assert a.shape == (rank, 30) and b.shape == (40, rank)


@pytest.mark.parametrize("form", ["NF4", "NF4, double quantised", "int8"])
def test_every_round_of_loftq_leaves_less(form):
    weight, rank, scale = torch.randn(64, 128), 8, 2.0

    def held(matrix):
        return held_as(matrix, form, torch.float32).matrix()

    left = [(weight - held(weight)).norm()]
    for rounds in (1, 2, 5):
        a, b = taken_off(weight, rank, scale, rounds, held) if rounds > 1 else (torch.zeros(1, 128), torch.zeros(64, 1))
        frozen = held(weight - b @ a)
        a, b = loftq(weight - frozen, rank, scale)
        left.append((weight - frozen - scale * b @ a).norm())
    assert all(later < 0.99 * earlier for earlier, later in itertools.pairwise(left))


def settings(tmp_path, **options: Any) -> TrainSettings:
    rows = [{"prompt": f"{i} and", "completion": f" {i + 1}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = {"steps": 2, "batch_size": 4, "quantise": "nf4", "targets": "all-linear"} | options
    return TrainSettings(model="nano", data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "run"), **chosen)


def test_a_run_on_four_bits_is_said_and_remembered(tmp_path):
    lines: dict[str, str] = {}

    class Listener(lowrank.train.reporting.Reporter):
        def started(self, summary, steps):
            lines.update(summary)

    run(settings(tmp_path, double=True, init="loftq"), Listener())
    assert lines["held in"].startswith("NF4, double quantised, 28 of 29 linear layers, ")
    assert "28 layers start from what quantising took off" in lines["trained"]
    stored = json.loads((tmp_path / "run" / "lowrank.json").read_text())["stored"]
    assert stored["form"] == "NF4, double quantised" and len(stored["probe"]) == 4
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find_model("nano"), dtype=torch.float32)
    with pytest.warns(LowrankWarning, match=r"trained over a base held in NF4, double .* float32: W0 differs by \d"):
        lowrank.load_adapter(model, tmp_path / "run")
    lowrank.unload(model)
    report = lowrank.merge_checkpoint(find_model("nano"), tmp_path / "run", tmp_path / "merged", onto="original")
    assert any("from which W0 here differs by" in note for note in report.notes)
    lowrank.quantise(model, "nf4", double=True)
    report = lowrank.load_adapter(model, tmp_path / "run")
    assert not report.base_differences


def test_what_a_run_names_next_asks_the_base_that_it_trained_on(tmp_path, capsys):
    asked = settings(tmp_path, double=True, steps=1)
    line = ["train", "--model", "nano", "--data", asked.data, "--out", asked.out, "--steps", "1", "--quantise", "nf4"]
    assert cli.main([*line, "--double"]) == 0
    (following,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: lowrank ")]
    call = following.removeprefix("next: lowrank ").split(" --data ")[0].split()
    assert call[-3:] == ["--quantise", "nf4", "--double"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)  # of a base in another form than trained over
        assert cli.main([*call, "--data", asked.data]) == 0


def test_layers_without_an_adapter_say_nothing_at_every_call(tmp_path, caplog):
    """bitsandbytes' own forward of int8 layers would, as often as one is called with float32."""
    run(settings(tmp_path, quantise="int8", targets="q_proj"))
    assert "MatMul8bitLt" not in caplog.text


def test_loftq_is_nearer_to_the_float_model_by_every_round(tmp_path):
    from lowrank.train.loftq import start

    plain = small()
    plain.save_pretrained(tmp_path / "base")
    wanted, apart = plain(IDS).logits.detach(), []
    for rounds in (0, 1, 5):
        model = small()
        lowrank.quantise(model, "nf4")
        lowrank.inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        assert not rounds or start(model, tmp_path / "base", rounds) == len(list(lora_layers(model))) == 14
        with torch.no_grad():
            apart.append(float((model(IDS).logits - wanted).norm()))
    assert apart[1] < 0.9 * apart[0] and apart[2] < 0.95 * apart[1]


def test_a_base_that_loftq_moved_is_made_again_for_its_adapter(tmp_path):
    run(settings(tmp_path, double=True, init="loftq_3", targets="q_proj,up_proj"))
    stored = json.loads((tmp_path / "run" / "lowrank.json").read_text())["stored"]
    assert stored["form"] == "NF4, double quantised, moved by LoftQ"
    asked = {"model": "nano", "data": str(tmp_path / "rows.jsonl"), "adapter": str(tmp_path / "run")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)  # none says that W0 differs
        evaluate(EvalSettings(**asked, quantise="nf4", double=True))
    with pytest.raises(ConfigError, match=r"that LoftQ moved, and here is not quantised .*: say --quantise"):
        evaluate(EvalSettings(**asked))
    rows, on = str(tmp_path / "rows.jsonl"), str(tmp_path / "on")
    how = {"quantise": "nf4", "double": True, "init_from": str(tmp_path / "run")}
    run(TrainSettings(model="nano", data=rows, out=on, steps=1, batch_size=2, **how))
    moved = [load_file(tmp_path / name / "loftq.safetensors") for name in ("run", "on")]
    assert moved[0].keys() == moved[1].keys() and all(torch.equal(moved[0][n], moved[1][n]) for n in moved[0])
    tensors = moved[0]
    save_file({name: t[:-1].clone() for name, t in tensors.items()}, tmp_path / "run" / "loftq.safetensors")
    with pytest.raises(CheckpointError, match=r"loftq.safetensors does not fit .*_proj: copy the adapter again"):
        evaluate(EvalSettings(**asked, quantise="nf4", double=True))


@pytest.mark.parametrize(("scheme", "double"), [("nf4", True), ("int8", False)])
def test_a_model_quantised_as_it_is_read_is_the_one_that_was_quantised_afterwards(tmp_path, scheme, double):
    small().save_pretrained(tmp_path / "base")
    asked = EvalSettings(model="m", data="d", quantise=scheme, double=double)
    model = load_held(tmp_path / "base", asked, torch.float32, torch.device("cpu"), ["mlp"])
    wanted = small()
    held = lowrank.quantise(wanted, scheme, double=double, skip=["mlp"])
    assert held == what_is_held(model) and held.layers == 8
    one, other = model.state_dict(), wanted.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in wanted.modules()]
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("labels", [("no", "yes"), ()], ids=["two labels", "a number"])
@pytest.mark.parametrize("pooler", ["in the files", "new"])
def test_a_classifier_quantised_as_it_is_read_is_the_one_that_was_quantised_afterwards(tmp_path, labels, pooler):
    """Its head, and a pooler that the files lack, start from the same random numbers, and stay as they are."""
    plain: Any = models.build("AutoModelForSequenceClassification", "bert", num_labels=3)
    (plain if pooler == "in the files" else plain.bert).save_pretrained(tmp_path / "base")
    if pooler == "new":
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    asked = EvalSettings(model="m", data="d", quantise="nf4", double=True)
    torch.manual_seed(3)
    model, fresh = load_held_judge(tmp_path / "base", labels, asked, torch.float32, torch.device("cpu"), [])
    torch.manual_seed(3)
    wanted, also = load_judge(tmp_path / "base", labels, torch.float32)
    assert fresh == also and ("bert.pooler.dense" in fresh) is (pooler == "new")
    held = lowrank.quantise(wanted, "nf4", double=True, skip=head_modules(wanted, also))
    assert held == what_is_held(model) and held.layers == (13 if pooler == "in the files" else 12)
    one, other = model.state_dict(), wanted.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_gpt2_s_conv1d_is_quantised_as_it_is_read_adapted_and_merged(tmp_path):
    plain = models.causal("gpt2", n_embd=64).eval()
    plain.save_pretrained(tmp_path / "base")
    asked = EvalSettings(model="m", data="d", quantise="nf4")
    model = load_held(tmp_path / "base", asked, torch.float32, torch.device("cpu"), []).eval()
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer).__name__ == "Linear4bit"
    weight = plain.transformer.h[0].mlp.c_fc.weight
    packed, state = bnb.functional.quantize_4bit(weight.t().contiguous(), quant_type="nf4")
    assert torch.equal(stored_weight(layer).matrix(), dequantised(packed, state))
    lowrank.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"]))
    for _, adapted in lora_layers(model):
        adapted.factors("default").b.data.normal_(std=0.1)
    lowrank.save_adapter(model, tmp_path / "adapter")
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", onto="original")
    again = copy.deepcopy(model)
    with pytest.warns(LowrankWarning, match="apart from what was trained"):
        lowrank.merge_and_unload(again, onto="original", original=tmp_path / "base")
    float_model = copy.deepcopy(plain)
    with pytest.warns(LowrankWarning, match=r"W0 differs by \d\.\d%"):  # of its own rows, not of its columns
        lowrank.load_adapter(float_model, tmp_path / "adapter")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert type(again.transformer.h[0].mlp.c_fc).__name__ == "Conv1D" and name in report.apart
    torch.testing.assert_close(again.state_dict()[name], merged[name])


def test_what_cannot_be_meant_is_refused(tmp_path):
    for options, sentence in (
        ({"quantise": None, "double": True}, "double means the scales of nf4 or fp4: say quantise too"),
        ({"quantise": "int8", "double": True}, "double means the scales of nf4 or fp4"),
        ({"quantise": None, "init": "loftq_2"}, "init loftq starts from what quantising takes off"),
        ({"full": True, "targets": None}, "full trains every weight"),
    ):
        with pytest.raises(ValueError, match=sentence):
            settings(tmp_path, **options)
    assert EvalSettings(model="m", data="d", quantise="int8").quantise == "int8"


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"quantise nf4 needs bitsandbytes: pip install 'lowrank\[quant\]'"):
        lowrank.quantise(small(), "nf4")


def test_bitsandbytes_is_imported_without_a_word():
    """Its warning of kernels that it would fetch is none of the user's."""
    pytest.importorskip("bitsandbytes")
    code = "from lowrank.injection.quantise import require_bitsandbytes; require_bitsandbytes('this')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kernel" not in done.stderr
