"""Adapters over quantised layers: the formula on the dequantised matrix, both ways, and no dense copy kept."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank
from lowrank import LoraConfig
from lowrank.core.stored import Stored
from lowrank.errors import TargetError
from lowrank.injection.adapters import lora_layers
from quantised_models import SCHEMES, Pair, llama, oracle, quantised_linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ["left", "right", "out"]


def dense_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with plain layers that hold the dequantised matrices."""
    twin = copy.deepcopy(model)
    for name in TARGETS:
        layer = getattr(model, name)
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight, plain.bias = nn.Parameter(oracle(layer).to(dtype)), nn.Parameter(layer.bias.detach().clone())
        setattr(twin, name, plain)
    return twin


def inject_same(models: list[nn.Module], **options: object) -> None:
    """The same adapter, moved off its start, into each of the models."""
    for model in models:
        torch.manual_seed(3)
        lowrank.inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)))
        for _, layer in lora_layers(model):
            for tensor in layer.factors("default").trainable():
                tensor.data += 0.1 * torch.randn_like(tensor)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The answer, x's gradient and the factors'."""
    x = x.clone().requires_grad_()
    answer = model(x)
    answer.sin().sum().backward()
    return [answer.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


VARIANTS = (
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
)


@pytest.mark.parametrize("options", VARIANTS, ids=["lora", "rslora", "dora", "pissa", "olora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_has_the_bits_of_the_dequantised_model_s(scheme, dtype, options):
    model = Pair(scheme, DTYPES[dtype])
    twin = dense_twin(model, DTYPES[dtype])
    inject_same([model, twin], **options)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if ".lora_" in n}, strict=False)
    x = torch.randn(3, 50, 64).to(DTYPES[dtype])
    for _ in range(2):  # the second step computes left and right together
        model.zero_grad(), twin.zero_grad()
        for got, wanted in zip(step(model, x), step(twin, x), strict=True):
            if "use_dora" in options and dtype == "bfloat16":  # the twin's norms are those of W0 rounded again
                assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()
            else:
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_injection_and_unloading_leave_every_bit(scheme):
    model = llama(scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    lowrank.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    names = {path.rpartition(".")[2] for path, _ in lora_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    lowrank.unload(model)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_adapters_add_and_disabled_is_the_base(scheme):
    layer = nn.Sequential(quantised_linear(scheme, 64, 48, torch.float32))
    x, weight = torch.randn(200, 64), oracle(layer[0])
    base = F.linear(x, weight, layer[0].bias)
    changes = []
    for name, rank in (("one", 3), ("two", 2)):
        lowrank.inject(layer, LoraConfig(r=rank, lora_alpha=5, target_modules=["0"]), name)
        factors = layer[0].factors(name)
        factors.b.data.normal_(std=0.1)
        changes.append(factors.scale * factors.b.detach() @ factors.a.detach())
    lowrank.set_active(layer, ["one", "two"])
    torch.testing.assert_close(layer(x), F.linear(x, weight + sum(changes), layer[0].bias))
    with lowrank.disabled(layer):
        assert torch.equal(layer(x), base)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        answer, wanted = layer(mine), F.linear(theirs, weight, layer[0].bias)
        torch.testing.assert_close(answer, wanted)
        answer.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_no_dense_copy_outlives_its_product(scheme, monkeypatch):
    """Every matrix that is read is gone when the next one is read, and none is kept for backward."""
    model = Pair(scheme, torch.float32)
    inject_same([model])
    alive: list[int] = []
    most: list[int] = []
    plain = {cls: cls.matrix for cls in _readers(model)}

    def watched(self, dtype=None):
        most.append(len(alive))
        matrix = plain[type(self)](self, dtype)
        alive.append(1)
        weakref.finalize(matrix, alive.pop)
        return matrix

    for cls in plain:
        monkeypatch.setattr(cls, "matrix", watched)
    x = torch.randn(3, 50, 64, requires_grad=True)
    for _ in range(2):
        loss = model(x).sin().sum()
        gc.collect()
        assert not alive, "a matrix is kept for the backward pass"
        loss.backward()
        assert not alive
    assert len(most) == 2 * 2 * 3 and max(most) == 0


def _readers(model: nn.Module) -> set[type[Stored]]:
    return {type(layer.held()) for _, layer in lora_layers(model)}


def test_kept_bytes_are_those_of_the_inputs_and_of_s():
    model = nn.Sequential(quantised_linear("nf4", 256, 256, torch.float32))
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(150, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x).sum().backward()
    factors = model[0].factors("default")
    assert sum(kept.values()) <= 4 * (x.numel() + 150 * 2) + 4 * (factors.a.numel() + factors.b.numel())


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_the_class_s_compute_dtype_holds(compute):
    model = nn.Sequential(quantised_linear("nf4", 64, 48, torch.float32))
    model[0].compute_dtype = compute
    x = torch.randn(140, 64)
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    wanted = F.linear(x.to(compute), oracle(model[0]).to(compute), model[0].bias.to(compute)).to(x.dtype)
    assert torch.equal(model(x), wanted)
    assert model(x.to(torch.bfloat16)).dtype is torch.bfloat16


def test_under_autocast_and_checkpointing_and_compile():
    from torch.utils.checkpoint import checkpoint

    model = Pair("nf4", torch.float32)
    inject_same([model])
    x = torch.randn(3, 50, 64, requires_grad=True)
    plain = step(model, x.detach())
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=False)
    y.sin().sum().backward()
    for got, wanted in zip(
        [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)], plain, strict=True
    ):
        assert torch.equal(got, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(x).float() - plain[0]).abs().max() < 0.1


def test_peft_reads_ours_and_we_read_peft_s(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama("nf4")
    model.is_loaded_in_4bit = True
    ids = torch.arange(24).view(2, 12)
    lowrank.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for _, layer in lora_layers(model):
        layer.factors("default").b.data.normal_(std=0.1)
    with torch.no_grad():
        ours = model(ids).logits
    lowrank.save_adapter(model, tmp_path / "ours")
    lowrank.unload(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    assert any(type(m).__name__ == "Linear4bit" and hasattr(m, "lora_A") for m in theirs.modules())
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    plain = theirs.unload()
    lowrank.load_adapter(plain, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_accelerate_covers_peft_s_quantised_layers(scheme):
    peft = pytest.importorskip("peft")
    model = llama(scheme)
    setattr(model, "is_loaded_in_8bit" if scheme == "int8" else "is_loaded_in_4bit", True)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    for name, tensor in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    ids = torch.arange(24).view(2, 12)
    wrapped.train()
    plain = wrapped(ids).logits.detach()
    report = lowrank.peft.accelerate(wrapped)
    assert len(report.fused) == len(report.layers) == 14
    fast = wrapped(ids).logits
    fast.sum().backward()
    tolerance = 0.05 if scheme == "int8" else 1e-4  # bitsandbytes' int8 layers round x to eight bits
    assert (fast - plain).abs().max() <= tolerance * plain.abs().max()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert lowrank.peft.restore(wrapped) == 14
    assert torch.equal(wrapped(ids).logits, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_nobody_holds_is_gone(scheme):
    """bitsandbytes' weights know their module: what reads them must not know them."""
    model = Pair(scheme, torch.float32)
    inject_same([model])
    step(model, torch.randn(3, 50, 64))
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert all(module() is None for module in gone)


def test_layers_of_other_makers_are_refused_by_name():
    foreign = type("QuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("proj", foreign())
    with pytest.raises(TargetError, match=r"in the form of GPTQ or AWQ \(gptqmodel\), which is not read here: load"):
        lowrank.inject(model, LoraConfig(target_modules=["proj"]))


def test_what_cannot_be_read_is_said():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 48, quant_type="nf4"))
    with pytest.raises(TargetError, match="not quantised yet: move the model to its device"):
        lowrank.inject(model, LoraConfig(target_modules=["0"]))
    model = nn.Sequential(quantised_linear("nf4", 64, 64, torch.float32))
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TargetError, match="repacked it for inference"):
        lowrank.inject(model, LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("block", [(32, 32), None])
def test_fp8_layers_are_adapted_and_merged_both_ways(block):
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = integration.FP8Linear(64, 48, block_size=block, has_bias=True).requires_grad_(False)
    layer.weight.data = torch.randn(48, 64).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) * 1e-3 + 1e-4
    layer.bias.data.normal_()
    weight = integration._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
    model = nn.Sequential(layer)
    plain = nn.Sequential(nn.Linear(64, 48))
    plain[0].weight.data, plain[0].bias.data = weight.clone(), layer.bias.data.clone()
    for one in (model, plain):
        torch.manual_seed(3)
        lowrank.inject(one, LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
        one[0].factors("default").b.data.normal_(std=0.1)
    x = torch.randn(3, 50, 64)
    for got, wanted in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    back = copy.deepcopy(model)
    for one in (model, plain):
        lowrank.merge_and_unload(one)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, plain[0].weight)
    lowrank.merge_and_unload(back, onto="quantised")
    assert type(back[0]) is integration.FP8Linear and back[0].weight.dtype is torch.float8_e4m3fn
    kept = integration._dequantize_fp8_weight(back[0].weight, back[0].weight_scale_inv, block, torch.float32)
    difference, change = (kept - plain[0].weight).norm(), (plain[0].weight - weight).norm()
    assert difference < 0.3 * change
