"""Quantising a float base before training: what is held, LoftQ's start, what is remembered, and refusals."""

import builtins
import json
from typing import Any

import pytest
import torch

import lowrank
import models
from lowrank import LoraConfig
from lowrank.core.init.loftq import loftq
from lowrank.errors import ConfigError, LowrankWarning
from lowrank.injection.adapters import lora_layers
from lowrank.injection.quantise import what_is_held
from lowrank.train.models import find_model
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


def test_loftq_is_nearer_to_the_float_model(tmp_path):
    from lowrank.train.loftq import LoftqStarts

    plain, model, other = small(), small(), small()
    config, starts = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), LoftqStarts()
    starts.plan(model, config)
    lowrank.quantise(model, "nf4", watch=starts)
    lowrank.quantise(other, "nf4")
    lowrank.inject(model, config)
    assert starts.put(model) == len(list(lora_layers(model))) == 14
    with torch.no_grad():
        wanted = plain(IDS).logits
        assert (model(IDS).logits - wanted).norm() < 0.9 * (other(IDS).logits - wanted).norm()


def test_what_cannot_be_meant_is_refused(tmp_path):
    for options, sentence in (
        ({"quantise": None, "double": True}, "double means the scales of nf4 or fp4: say quantise too"),
        ({"quantise": "int8", "double": True}, "double means the scales of nf4 or fp4"),
        ({"quantise": None, "init": "loftq"}, "init loftq starts from what quantising takes off"),
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
