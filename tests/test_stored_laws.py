"""The laws of merging for every stored form that a layer can hold: merged ≡ adapted, and the files' bits in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import MergeError
from quantised_models import quantised_linear

D, K = 96, 64


def bnb(scheme: str) -> nn.Module:
    return quantised_linear(scheme, K, D, torch.float32)


def torchao_int8() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(K, D))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model[0]


def torchao_nf4() -> nn.Module:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(K, D)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 96), requires_grad=False)
    return layer


def fp8(block: tuple[int, int] | None) -> nn.Module:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = integration.FP8Linear(K, D, block_size=block, has_bias=True).requires_grad_(False)
    layer.weight.data = torch.randn(D, K).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) * 1e-3 + 1e-4
    layer.bias.data.normal_()
    return layer


FORMS: dict[str, Callable[[], nn.Module]] = {
    **{scheme: lambda scheme=scheme: bnb(scheme) for scheme in ("nf4", "nf4 double", "fp4", "fp4 double", "int8")},  # type: ignore[misc]
    "torchao int8": torchao_int8,
    "torchao nf4": torchao_nf4,
    "fp8 blocks": lambda: fp8((32, 32)),
    "fp8 tensor": lambda: fp8(None),
}
WRITTEN = [form for form in FORMS if not form.startswith("torchao")]


def adapted(form: str, **options: object) -> nn.Module:
    model = nn.ModuleDict({"proj": FORMS[form]()})
    lowrank.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], **options))  # type: ignore[arg-type]
    model["proj"].factors("default").b.data.normal_(std=0.1)  # type: ignore[operator, union-attr]
    return model


def in_float64(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(W0 + ΔW, ΔW) of an adapted layer, W0 as its form is read."""
    factors = layer.factors("default")  # type: ignore[operator]
    change = factors.scale * factors.b.detach().double() @ factors.a.detach().double()
    return layer.dense(layer).double() + change, change  # type: ignore[operator]


@pytest.mark.parametrize("form", FORMS)
def test_merged_onto_16bit_is_what_was_adapted_within_one_rounding(form):
    model, x = adapted(form), torch.randn(5, K)
    exact, _ = in_float64(model["proj"])
    with torch.no_grad():
        answer = model["proj"](x)
    lowrank.merge_and_unload(model)
    layer = model["proj"]
    assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    half_ulp = torch.ldexp(torch.full(exact.shape, 2.0**-24), torch.frexp(exact.float()).exponent)
    sums = 2.0**-24 * 16 * (exact.abs() + 1)
    assert ((layer.weight.double() - exact).abs() <= half_ulp + sums).all()
    torch.testing.assert_close(layer(x), answer, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", WRITTEN)
def test_onto_quantised_is_the_nearest_that_the_form_holds(form):
    """The layer is of the class it was, holds W0 + ΔW within a grid's step, and says how much of ΔW that is."""
    model = adapted(form)
    kind = type(model["proj"]).plain  # type: ignore[attr-defined]
    exact, change = in_float64(model["proj"])
    lowrank.merge_and_unload(model, onto="quantised", anyway=True)
    assert type(model["proj"]) is kind
    lowrank.inject(model, LoraConfig(r=4, target_modules=["proj"]))
    now, _ = in_float64(model["proj"])
    assert (now - exact).norm() < change.norm()


@pytest.mark.parametrize("form", ["torchao int8", "torchao nf4"])
def test_a_form_that_is_only_read_is_not_written(form):
    model = adapted(form)
    with pytest.raises(MergeError, match="stored as torchao are read here, and not written; merge onto 16bit"):
        lowrank.merge_and_unload(model, onto="quantised")
    assert lowrank.active_adapters(model) == ("default",)


@pytest.mark.parametrize("onto", ["16bit", "quantised"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("block", [(32, 32), None])
def test_fp8_has_the_same_bits_in_memory_and_on_disk(block, dora, onto, tmp_path: Path):
    """bitsandbytes' forms are held to this on whole models (`test_quantised_merge`), others on files alone."""
    model = adapted("fp8 blocks" if block else "fp8 tensor", use_dora=dora)
    layer = model["proj"]
    (tmp_path / "base").mkdir()
    parts = ("weight", "weight_scale_inv", "bias")
    tensors = {f"proj.{name}": layer._parameters[name].detach().clone() for name in parts}  # type: ignore[union-attr]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "fp8"} | ({"weight_block_size": list(block)} if block else {})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": said, "dtype": "float32"}))
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", onto=onto, anyway=True, verify="full"
    )
    lowrank.merge_and_unload(model, onto=onto, anyway=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    held = model["proj"]._parameters
    wanted = {f"proj.{name}": tensor.detach() for name, tensor in held.items() if tensor is not None}
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), wanted[name].view(-1).view(torch.uint8)), name
