"""DoRA on convolutions and embeddings: PEFT's formula, its files both ways, and merging on disk."""

import copy

import pytest
import torch
from torch import nn

import lowrank
from checkpoint_models import answer, disturb, gpt2
from layer_cases import CASES as LAYERS
from layer_cases import CASES_WITH_DORA, holder, inject_all, move
from lowrank import LoraConfig
from lowrank.errors import TargetError
from merge_disk_models import assert_same_bits, load_base, save_base, tensors_of

GROUPED = ("conv2d, groups", "conv2d, depthwise", "conv3d")  # for which PEFT has no formula
OTHERS = [name for name in LAYERS if name not in (*CASES_WITH_DORA, *GROUPED)]


class Pictures(nn.Module):
    """Two convolutions, one of them in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv1d(6, 4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) → (N, 4, H·W − 1)."""
        return self.one(self.two(x).relu().flatten(2))


PICTURES = torch.linspace(-2, 2, 2 * 3 * 4 * 5).sin().view(2, 3, 4, 5)
CASES = {
    "convolutions": (Pictures, ["two", "one"], lambda model: model(PICTURES)),
    "embedding": (gpt2, ["wte", "c_attn"], answer),
}


def made(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pefts_dora_both_ways(case: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    _, targets, ask = CASES[case]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        use_dora=True,
        init_lora_weights=False,
        fan_in_fan_out=case != "convolutions",
    )
    theirs = peft.get_peft_model(made(case), config).eval()
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter *= 1 + 0.3 * torch.rand_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = made(case)
    base = ask(ours)
    lowrank.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(ask(ours), ask(theirs), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ask(ours), base, atol=1e-2)
    lowrank.save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(made(case), tmp_path / "ours").eval()
    assert torch.allclose(ask(read), ask(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_merged_on_disk_as_in_memory(case: str, tmp_path) -> None:
    make, targets, _ = CASES[case]
    model = made(case)
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=True))
    lowrank.save_adapter(disturb(model), tmp_path / "adapter")
    base = save_base(made(case), tmp_path / "base")
    lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    wanted = lowrank.merge_and_unload(model).state_dict()
    assert_same_bits(tensors_of(tmp_path / "out"), dict(wanted))
    if make is gpt2:
        assert load_base(gpt2(), tmp_path / "out").lm_head.weight.shape == wanted["lm_head.weight"].shape


@pytest.mark.parametrize("case", GROUPED)
def test_groups_are_refused(case: str) -> None:
    model, _ = holder(case)
    with pytest.raises(TargetError, match=r"use_dora works for whole weights .* not for layer"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["layer"], use_dora=True))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", OTHERS)
def test_adapted_is_merged_and_unloads_to_the_base(case: str, count: int) -> None:
    model, x = holder(case)
    base = model(x)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], use_dora=True)
    lowrank.inject(model, config)
    assert torch.allclose(model(x), base, atol=1e-6)  # a gain of 1, but for the norm's rounding
    lowrank.unload(model)
    adapters = inject_all(model, count, use_dora=True)
    move(adapters)
    answer = model(x)
    assert (answer - base).abs().mean() > 0.05
    with lowrank.merged(model):
        assert torch.allclose(model(x), answer, atol=1e-5, rtol=1e-4)
    with lowrank.disabled(model):
        assert torch.equal(model(x), base)
    lowrank.merge_and_unload(model)
    assert torch.allclose(model(x), answer, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [name for name in OTHERS if "padded" not in name and "scaled" not in name])
def test_gradients_are_those_of_the_formed_weight(case: str) -> None:
    """With the norm held constant, as DoRA's paper has it; a padding row gets none, by a lookup's own rule."""
    model, x = holder(case)
    bare = copy.deepcopy(model.layer)
    (factors,) = adapters = inject_all(model, 1, use_dora=True)
    move(adapters)
    formed = torch.func.functional_call(bare, {"weight": model.layer.adapted_weight()}, (x,))
    wanted = torch.autograd.grad(formed.square().sum(), factors.trainable())
    found = torch.autograd.grad(model(x).square().sum(), factors.trainable())
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)
