"""nn.MultiheadAttention: in_proj and out_proj adapted exactly, in train() and eval(), in torch's fast path too."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from layer_cases import DTYPES
from lowrank import LoraConfig
from lowrank.errors import LowrankWarning, TargetError
from snapshots import assert_same, same_bits, snapshot

E, HEADS = 8, 2


class Block(nn.Module):
    """As in CLIP: a norm, attention, and a head."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) → (N, L, 3)."""
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


class Encoder(nn.Module):
    """torch's encoder, whose fast path reads the attention's weights past its forward."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) → (N, L, E)."""
        return self.encoder(x)


MODELS = {"block": Block, "block, no bias": lambda: Block(bias=False), "encoder": Encoder}
X = torch.linspace(-2, 2, 2 * 5 * E).sin().view(2, 5, E)


def targets(model: nn.Module) -> list[str]:
    return ["self_attn", "self_attn.out_proj"] if isinstance(model, Encoder) else ["attn", "attn.out_proj"]


def made(name: str, dtype: str = "float32", adapters: int = 1, names: list[str] | None = None, **options) -> nn.Module:
    """A model with adapters whose ΔW is not zero."""
    torch.manual_seed(0)
    model = MODELS[name]().to(DTYPES[dtype]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    for number in range(adapters):
        config = LoraConfig(
            r=2 + number,
            lora_alpha=5,
            target_modules=names or targets(model),
            init_lora_weights="random",
            **options,
        )
        lowrank.inject(model, config, f"a{number}")
    if adapters:
        lowrank.set_active(model, [f"a{number}" for number in range(adapters)], [f"a{adapters - 1}"])
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_adapted_is_merged(name: str, dtype: str, grad: bool, training: bool) -> None:
    model, x = made(name, dtype, adapters=2).train(training), X.to(DTYPES[dtype])
    with torch.set_grad_enabled(grad):
        answer = model(x)
        with lowrank.merged(model):
            merged = model(x)
        with lowrank.disabled(model):
            base = model(x)
    tolerance = {"float32": 1e-5, "bfloat16": 0.08}[dtype]
    assert torch.allclose(answer, merged, atol=tolerance, rtol=tolerance)
    assert (answer - base).abs().max() > 2 * tolerance
    plain = lowrank.merge_and_unload(copy.deepcopy(model))
    with torch.set_grad_enabled(grad):
        assert torch.allclose(plain(x), merged, atol=tolerance, rtol=tolerance)
    assert {type(module) for module in plain.modules()} == {type(module) for module in MODELS[name]().modules()}


@pytest.mark.parametrize("name", MODELS)
def test_the_base_comes_back_bit_for_bit(name: str) -> None:
    model = made(name, adapters=0).requires_grad_(False)  # torch's own answers differ in a bit with the flag
    with torch.no_grad():
        before, base = snapshot(model), model(X)
        config = LoraConfig(r=2, target_modules=targets(model))
        lowrank.inject(model, config)
        assert torch.allclose(model(X), base, atol=1e-6)  # W0 + 0, by the path that torch takes then
        with lowrank.disabled(model):
            assert same_bits(model(X), base)
        lowrank.unload(model)
        assert_same(model, before)
        assert same_bits(model(X), base)


def test_gradients_are_those_of_the_formed_weight() -> None:
    model = made("block").train()
    layer = model.attn
    (a, b), scale = layer.factors("a0").effective(), layer.factors("a0").scale
    model(X).square().sum().backward()
    plain = lowrank.merge_and_unload(copy.deepcopy(model)).requires_grad_(True)
    plain(X).square().sum().backward()
    whole = plain.attn.in_proj_weight.grad
    factors = layer.factors("a0")
    assert torch.allclose(factors.a.grad, scale * b.detach().t() @ whole, atol=1e-4, rtol=1e-4)
    assert torch.allclose(factors.b.grad, scale * whole @ a.detach().t(), atol=1e-4, rtol=1e-4)
    assert layer.in_proj_weight.grad is None and model.attn.out_proj.factors("a0").b.grad.any()


def test_parts_of_in_proj_are_rows_of_it() -> None:
    model = made("block", names=["attn[q,v]"])
    merged = lowrank.merge_and_unload(copy.deepcopy(model)).attn.in_proj_weight
    moved = (merged - lowrank.unload(model).attn.in_proj_weight).abs().amax(1).view(3, E)
    assert moved[0].all() and not moved[1].any() and moved[2].all()
    with pytest.raises(TargetError, match="has no part gate; its parts are q, k, v"):
        made("block", names=["attn[gate]"])


def test_dropout_and_dora_that_cannot_be_had_are_said() -> None:
    with pytest.warns(LowrankWarning, match="lora_dropout is not applied"):
        made("block", lora_dropout=0.5).train()(X)
    with pytest.raises(TargetError, match=r"use_dora works for whole weights of Linear, .* not for attn"):
        made("block", use_dora=True)


def test_other_widths_of_keys_are_refused_by_a_sentence() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, HEADS, kdim=4)})
    with pytest.raises(TargetError, match="attn: its keys or values have another width"):
        lowrank.inject(model, LoraConfig(target_modules=["attn"]))


@pytest.mark.parametrize("name", MODELS)
def test_files_both_ways_and_merged_on_disk(name: str, tmp_path) -> None:
    model = made(name)
    with torch.no_grad():
        answer = model(X)
        lowrank.save_adapter(model, tmp_path / "adapter", "a0")
        other = made(name, adapters=0)
        (tmp_path / "base").mkdir()
        save_file(other.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        lowrank.load_adapter(other, tmp_path / "adapter")
        assert torch.allclose(other(X), answer, atol=1e-6)
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
        from safetensors.torch import load_file

        merged = load_file(tmp_path / "out" / "model.safetensors")
        wanted = lowrank.merge_and_unload(other).state_dict()
        assert merged.keys() == wanted.keys() and all(torch.equal(merged[key], wanted[key]) for key in wanted)


def test_pefts_attention_is_read(tmp_path) -> None:
    """in_proj as PEFT merges it. PEFT 0.21.2 adds out_proj's ΔW twice: what its config says is once, as here."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(made("block", adapters=0), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, base = made("block", adapters=0), made("block", adapters=0).attn
    lowrank.load_adapter(ours, tmp_path / "theirs")
    one, other = lowrank.merge_and_unload(ours).attn, theirs.merge_and_unload().attn
    assert torch.allclose(one.in_proj_weight, other.in_proj_weight, atol=1e-5)
    assert not torch.allclose(one.in_proj_weight, base.in_proj_weight, atol=1e-2)
    twice = base.out_proj.weight + 2 * (one.out_proj.weight - base.out_proj.weight)
    assert torch.allclose(twice, other.out_proj.weight, atol=1e-5)
