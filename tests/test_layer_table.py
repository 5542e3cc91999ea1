"""What docs/layers.md says of a layer is what injecting does with it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from layer_cases import Holder
from lowrank import LoraConfig
from lowrank.errors import TargetError
from lowrank.layers.kinds import KINDS, REFUSED

ROOT = Path(__file__).parents[1]

LAYERS = {  # one of every class that is refused
    nn.RNNBase: (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (5, 3)),
    nn.RNNCellBase: (lambda: nn.GRUCell(3, 4), (5, 3)),
    nn.Bilinear: (lambda: nn.Bilinear(3, 3, 4), None),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(7, 3), None),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(3, 4, 2), (2, 3, 6)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 6, 5)),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(3, 4, 2), (1, 3, 4, 4, 4)),
}


def test_the_page_is_todays() -> None:
    spec = importlib.util.spec_from_file_location("layer_table", ROOT / "scripts" / "layer_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run python scripts/layer_table.py"


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_is_refused_says_why_in_a_sentence(cls: type[nn.Module]) -> None:
    layer = LAYERS[cls][0]()
    with pytest.raises(TargetError) as caught:
        lowrank.inject(Holder(layer), LoraConfig(target_modules=["layer"]))
    said = str(caught.value)
    assert f"layer: a {type(layer).__name__} is not adapted: {REFUSED[cls]}" in said and "\n" not in said
    assert cls not in KINDS


@pytest.mark.parametrize("cls", [cls for cls, (_, shape) in LAYERS.items() if shape], ids=lambda cls: cls.__name__)
def test_what_is_refused_can_be_trained_in_full(cls: type[nn.Module]) -> None:
    """As the sentence says: the copy is what answers, trains, and is merged; the base comes back with its bits."""
    make, shape = LAYERS[cls]
    model = nn.ModuleDict({"layer": make(), "linear": nn.Linear(shape[1], 3)}).eval()
    x = torch.randn(shape)

    def answer() -> torch.Tensor:
        found = model["layer"](x)
        return found[0] if isinstance(found, tuple) else found

    base = answer()
    lowrank.inject(model, LoraConfig(r=2, target_modules=["linear"], modules_to_save=["layer"]))
    answer().square().sum().backward()
    trained = [p for p in model["layer"].parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and any(p.grad.any() for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1
    moved = answer()
    assert not torch.allclose(moved, base, atol=1e-2)
    with lowrank.disabled(model):
        assert torch.equal(answer(), base)
    assert torch.equal(lowrank.merge_and_unload(model) and answer(), moved)
