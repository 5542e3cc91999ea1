"""DoRA on stacked experts: adapted ≡ merged ≡ the formula, by every implementation, in files and on disk."""

import pytest
import torch

import lowrank
from expert_models import EVERY_STACK, answer, dense_answer, formed, mixture
from expert_models import adapted as plainly_adapted
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers
from test_experts import CASES, nothing_formed  # noqa: F401


def adapted(model: torch.nn.Module, name: str = "default", seed: int = 1, **options: object) -> torch.nn.Module:
    """In place: a DoRA adapter on every stack, with gains that are well away from 1."""
    plainly_adapted(model, name, seed, **{"use_dora": True} | options)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            if (magnitude := layer.factors(name).magnitude) is not None:
                magnitude.abs_().add_(0.3)
    return model


@pytest.mark.parametrize(("family", "way"), CASES)
@pytest.mark.usefixtures("nothing_formed")
def test_adapted_is_the_formula_is_merged_and_so_are_the_gradients(family: str, way: str) -> None:
    model = adapted(mixture(family, way))
    factors = [p for _, layer in lora_layers(model) for p in layer.factors("default").trainable()]
    got, wanted = answer(model), dense_answer(model, formed(model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(got)
    gradients = torch.autograd.grad((got * direction).sum(), factors)
    for one, other in zip(gradients, torch.autograd.grad((wanted * direction).sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
        assert other.abs().max() > 0
    with lowrank.merged(model):
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
