"""A merge that stops half way: the model answers as before, and a second call finishes."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowrank
from layer_cases import chain
from lowrank import LoraConfig
from snapshots import same_bits


class Tied(nn.Module):
    """An embedding and a head of one weight, and a config that says so, as transformers models have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True, model_type="mine")
        self.all_tied_weights_keys = {"head.weight": "embed.weight"}
        self.embed = nn.Embedding(9, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next token."""
        return self.head(torch.tanh(self.middle(self.embed(ids))))


@pytest.mark.parametrize("targets", [["head", "middle"], ["embed"], ["embed", "head"]])
@pytest.mark.parametrize("stop", [None, 0, 1])
def test_a_tied_weight_becomes_two_also_when_the_merge_was_interrupted(
    targets: list[str], stop: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = Tied(), torch.arange(9)
    table = model.embed.weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights="random")
    with pytest.warns(lowrank.LowrankWarning, match="shares? its weight"):
        lowrank.inject(model, config)
    adapted = model(ids)
    real, calls = lowrank.core.merging.merge_weight, itertools.count()

    def interrupted(*args: object) -> Tensor:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("lowrank.layers.base.merge_weight", interrupted)
        lowrank.merge_and_unload(model)
    assert torch.allclose(model(ids), adapted, atol=1e-5)
    if lowrank.adapter_configs(model):
        lowrank.merge_and_unload(model)
    assert torch.allclose(model(ids), adapted, atol=1e-5)
    assert model.head.weight is not model.embed.weight
    assert not model.config.tie_word_embeddings
    for name in {"embed", "head"} - set(targets):
        assert same_bits(getattr(model, name).weight.detach(), table)


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_an_interrupted_merge_answers_the_same_and_can_be_finished(
    stop: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = chain("one", "two")
    lowrank.set_active(model, names)
    adapted = model(x)
    real, done = lowrank.core.merging.merge_weight, []

    def interrupted(*args: object) -> Tensor:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr("lowrank.layers.base.merge_weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lowrank.merge_and_unload(model)
    assert torch.allclose(model(x), adapted, atol=1e-5)
    assert lowrank.active_adapters(model) == names
    lowrank.merge_and_unload(model)
    assert torch.allclose(model(x), adapted, atol=1e-5)
    assert [type(layer) for layer in model.children()] == [nn.Linear] * 3
    assert lowrank.adapter_configs(model) == {}
    assert all(p.requires_grad for p in model.parameters())
