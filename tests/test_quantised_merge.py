"""Merging into quantised bases: the same bits in memory and on disk, merged ≡ adapted, and a loss is said before."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
import models
import quantised_models
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankWarning, MergeError
from lowrank.injection.adapters import lora_layers
from lowrank.train.models import load_causal
from quantised_models import load

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(24).view(2, 12)
TARGETS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module", params=quantised_models.CHECKPOINTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint in two shards, and the float model beside it."""
    root = quantised_models.checkpoint(tmp_path_factory.mktemp("quantised"), request.param)
    assert len(list((root / "base").glob("*.safetensors"))) > 1
    return root


def adapted(base: Path, out: Path, size: float = 0.1, **options: Any) -> Any:
    """The model with a trained adapter, which is saved to `out`."""
    return quantised_models.adapted(base / "base", out, size, **({"target_modules": TARGETS} | options))


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_onto_16bit_has_the_same_bits_in_memory_and_on_disk(base, tmp_path, options):
    model = adapted(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        wanted = model(IDS).logits
    report = lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    lowrank.merge_and_unload(model)
    assert report.merged == 5 and min(report.surviving.values()) > 0.99
    assert not any(name for name in model.state_dict() if "absmax" in name or "SCB" in name)
    assert "quantization_config" not in model.config.to_dict()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.03 * wanted.abs().max()
    assert same(load(tmp_path / "out"), model)
    model.save_pretrained(tmp_path / "saved")
    assert same(load(tmp_path / "saved"), model)


def test_onto_quantised_is_refused_where_little_survives_and_writes_nothing(base, tmp_path):
    model = adapted(base, tmp_path / "adapter", size=1e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"modules would keep less than 50% .*\n  +\d+\.\d% left"):
        lowrank.merge_and_unload(model, onto="quantised")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(MergeError, match="would keep less than 50%"):
        lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "out", onto="quantised")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0.1, 1e-3])
def test_onto_quantised_has_the_same_bits_in_memory_and_on_disk(base, tmp_path, size):
    model = adapted(base, tmp_path / "adapter", size)
    report = lowrank.merge_checkpoint(
        base / "base", tmp_path / "adapter", tmp_path / "out", onto="quantised", anyway=True
    )
    lowrank.merge_and_unload(model, onto="quantised", anyway=True)
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    read = load(tmp_path / "out")
    assert same(read, model)
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert report.repacked == 4 and len(report.surviving) == 5  # the head is plain
    if size == 0.1:
        assert min(report.surviving.values()) > 0.5


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_onto_original_is_the_plain_model_s_merge_in_memory_and_on_disk(base, tmp_path, options):
    model = adapted(base, tmp_path / "adapter", **options)
    report = lowrank.merge_checkpoint(base / "float", tmp_path / "adapter", tmp_path / "out", onto="original")
    plain = load(base / "float")
    lowrank.load_adapter(plain, tmp_path / "adapter")
    again = copy.deepcopy(model)
    lowrank.merge_and_unload(again, onto="original", original=load(base / "float"))
    with pytest.warns(LowrankWarning, match="apart from what was trained") as said:
        lowrank.merge_and_unload(model, onto="original", original=base / "float")
    lowrank.merge_and_unload(plain)
    assert same(load(tmp_path / "out"), plain) and same(model, plain) and same(again, plain)
    assert f"\n  {report_line(report)}" in str(said[0].message)
    with pytest.raises(MergeError, match="is quantised itself: give the model that it was made from"):
        lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "no", onto="original")
    with pytest.raises(MergeError, match="no weight that the adapter changes is quantised"):
        lowrank.merge_checkpoint(base / "float", tmp_path / "adapter", tmp_path / "no", onto="quantised")


def report_line(report: Any) -> str:
    """The summary's line for the weight that is farthest from what was trained."""
    lines = report.summary().splitlines()
    return next(lines[i + 1] for i, line in enumerate(lines) if line.startswith("apart from")).split("  ")[1]


def test_the_report_says_how_far_each_weight_is_from_what_was_trained(base, tmp_path):
    """By the norms of the weights themselves, and as answers to random x show it; the plain head is not among them."""
    model, plain = adapted(base, tmp_path / "adapter"), load(base / "float")
    report = lowrank.merge_checkpoint(base / "float", tmp_path / "adapter", tmp_path / "out", onto="original")
    layers = {path: layer for path, layer in lora_layers(model) if path != "lm_head"}
    assert report.apart.keys() == {f"{path}.weight" for path in layers}
    for path, layer in layers.items():
        held, factors = layer.dense(layer).float(), layer.factors("default")
        change = (factors.scale * factors.b @ factors.a).detach()
        difference = plain.get_submodule(path).weight.detach().float() - held
        found, x = report.apart[f"{path}.weight"], torch.randn(4000, held.shape[1])
        assert found.change == pytest.approx(float(difference.norm() / change.norm()), rel=0.01)
        assert found.answers == pytest.approx(
            float((x @ difference.t()).norm() / (x @ (held + change).t()).norm()), rel=0.1
        )


def test_another_model_is_no_original(base, tmp_path):
    model = adapted(base, tmp_path / "adapter")
    other = models.causal("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    for parameter in other.parameters():
        parameter.data.normal_(std=0.02)
    other.save_pretrained(tmp_path / "other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for original in (other, tmp_path / "other"):
        with pytest.raises(MergeError, match=r"not the model that the quantised one was made .* differs by 1\d\d%"):
            lowrank.merge_and_unload(model, onto="original", original=original)
    for original, fault in ((load(base / "base"), "no weight of numbers"), (base / "base", "no weight of numbers")):
        with pytest.raises(MergeError, match=fault):
            lowrank.merge_and_unload(model, onto="original", original=original)
    with pytest.raises(MergeError, match="belong together"):
        lowrank.merge_and_unload(model, onto="original")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(MergeError, match=r"other is not the model that the base of adapter was made from: W0 differs"):
        lowrank.merge_checkpoint(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", onto="original")
    assert not (tmp_path / "out").exists()


def test_some_of_several_adapters_are_merged_and_the_others_answer_on(base, tmp_path):
    model = adapted(base, tmp_path / "one")
    lowrank.load_adapter(model, tmp_path / "one", "two")
    lowrank.set_active(model, ["default", "two"])
    with torch.no_grad():
        wanted = model(IDS).logits
    lowrank.merge_and_unload(model, ["default"])
    assert lowrank.active_adapters(model) == ("two",)
    with torch.no_grad():
        got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_inside_of_merged_the_layers_are_dense_and_the_bits_come_back(base, tmp_path):
    model = adapted(base, tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(IDS).logits
        with lowrank.merged(model):
            got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def rewritten(base: Path, out: Path, change: Any) -> Path:
    """The quantised checkpoint in one file, its tensors changed."""
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((base / "base").glob("*.safetensors")):
        tensors |= load_file(shard)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((base / "base" / "config.json").read_bytes())
    return out


def test_damaged_quantised_weights_are_said_in_a_sentence(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    weight = "model.layers.0.self_attn.q_proj.weight"
    four_bit = any(name.endswith(".absmax") for name in load(base / "base").state_dict())
    scale = f"{weight}.absmax" if four_bit else "model.layers.0.self_attn.q_proj.SCB"

    def without(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[scale]

    def short(tensors: dict[str, torch.Tensor]) -> None:
        tensors[scale] = tensors[scale][:-1].clone()

    faults = [(short, rf"{scale} cannot be read: it has shape \[\d+\], wanted \[\d+\]")]
    if four_bit:
        faults.append((without, rf"weight {weight} cannot be read: its part {scale} is missing"))

        def strange(tensors: dict[str, torch.Tensor]) -> None:
            name = next(name for name in tensors if name.startswith(f"{weight}.quant_state"))
            said = json.loads(bytes(tensors[name].tolist())) | {"blocksize": 7, "shape": [1, -1]}
            tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

        faults.append((strange, "its quant_state says nothing that can be meant of shape, blocksize"))

        def unknown(tensors: dict[str, torch.Tensor]) -> None:
            name = next(name for name in tensors if name.startswith(f"{weight}.quant_state"))
            tensors[f"{name.rpartition('__')[0]}__nf9"] = tensors.pop(name)

        faults.append((unknown, rf"weight {weight} cannot be read: its four-bit kind 'nf9' is not known, only nf4 and"))
    else:
        faults.append((without, "stored as I8, a form that is not read here"))
    for number, (change, sentence) in enumerate(faults):
        damaged = rewritten(base, tmp_path / f"damaged{number}", change)
        with pytest.raises((CheckpointError, MergeError), match=sentence):
            lowrank.merge_checkpoint(damaged, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        if "not read here" not in sentence:
            with pytest.raises(CheckpointError, match=sentence):  # before transformers reads past the scales' end
                load_causal(damaged, torch.bfloat16)


def test_a_method_that_nobody_knows_is_named_before_the_model_is_loaded(base):
    folder = base / "base"
    said = json.loads((folder / "config.json").read_text())
    try:
        for method in ("superquant", 7):
            (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": method}}))
            with pytest.raises(CheckpointError, match=rf"quantised by '?{method}'?, a method that"):
                load_causal(folder, torch.bfloat16)
    finally:
        (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("method", "package", "sentence"),
    [
        ("gptq", "optimum", r"a package it needs is not installed \(.*pip install optimum"),
        ("awq", "gptqmodel", r"a package it needs is not installed \(.*pip install gptqmodel"),
        ("fbgemm_fp8", "", r"in a form that takes a GPU, or give the model that it was made from \(.*GPU"),
    ],
)
def test_a_form_that_does_not_run_here_is_said_with_what_it_takes(method, package, sentence, tmp_path):
    if (package and find_spec(package)) or torch.cuda.is_available():
        pytest.skip("it runs here")
    models.causal("llama").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    quantiser = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": quantiser}))
    with pytest.raises(CheckpointError, match=sentence):
        load_causal(tmp_path, torch.float32)


def test_layers_without_an_adapter_are_not_repacked_while_the_model_has_one():
    """bitsandbytes rounds the scales of a four-bit layer that answers in eval() on some CPUs."""
    model = quantised_models.llama("nf4").eval()
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(IDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lowrank.unload(model)
    assert len(layers) == 14 and all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_model_that_was_repacked_is_not_merged_half():
    model = quantised_models.llama("nf4")
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.quant_state.packing_format_for_cpu, weight.data = True, weight.data.clone()
    with pytest.raises(MergeError, match=r"model.layers.1.mlp.up_proj cannot be read any more, .* load the model"):
        lowrank.merge_and_unload(model)
    assert lowrank.active_adapters(model) == ("default",)
