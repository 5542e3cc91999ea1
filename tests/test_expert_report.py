"""inspect of an adapter of stacked experts: a map of layers and experts, and which one changed most, in words."""

import re
from pathlib import Path

import pytest
import torch

from lowrank.analysis.inspection import Inspection, inspect_adapter
from lowrank.analysis.report import render
from lowrank.analysis.summary import summary
from test_expert_resize import CONFIG, EXPERTS, LAYER, WRAPPED, adapter, written

__all__ = ["adapter"]
IDLE, LOUD = 1, 2


@pytest.fixture
def inspection(tmp_path: Path) -> Inspection:
    """Expert 2 of layer 1 changed most, expert 1 of layer 0 not at all."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        stem = LAYER.replace("layers.0.", f"layers.{layer}.")
        for name, rank, (d, k) in (("experts.gate_up_proj", 3, (8, 5)), ("experts.down_proj", 2, (5, 4))):
            b = torch.randn(d, rank, EXPERTS)
            b[:, :, IDLE if layer == 0 else LOUD] *= 0 if layer == 0 else 50
            tensors[f"{stem}{WRAPPED[name]}lora_A.weight"] = torch.randn(EXPERTS * rank, k)
            tensors[f"{stem}{WRAPPED[name]}lora_B.weight"] = b.flatten(1).contiguous()
    config = {**CONFIG, "target_modules": None}
    return inspect_adapter(written(tmp_path / "experts", tensors, config))


def test_the_words_name_the_expert_that_changed_most_and_count_the_idle(inspection: Inspection) -> None:
    (sentence,) = [words for words in summary(inspection) if words.startswith("Of 8 experts in 2 layers")]
    assert f"expert {LOUD} of layer 1 changed most" in sentence and f"expert {IDLE} of layer 0 least (0)" in sentence
    assert sentence.endswith("1 expert did not change at all.")
    assert "experts.N.down_proj, experts.N.gate_up_proj" in summary(inspection)[0]


def test_the_page_has_a_map_of_layers_and_experts_for_each_projection(inspection: Inspection) -> None:
    page = render(inspection)
    section = page[page.index("<h2>Experts") : page.index("<h2>Every module")]
    maps = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert len(maps) == 2 * 2  # how much, and at what rank, for gate_up_proj and down_proj
    for drawn in maps:
        cells = set(re.findall(r"layers\.(\d)\.mlp\.experts\.(\d)\.\w+: ", drawn))
        assert cells == {(f"{layer}", f"{expert}") for layer in range(2) for expert in range(EXPERTS)}
    assert "<h2>Where it changed" not in page  # there is nothing but experts


def test_modules_beside_experts_keep_their_own_map(adapter: Path) -> None:
    page = render(inspect_adapter(adapter))
    before, experts = page[: page.index("<h2>Experts")], page[page.index("<h2>Experts") : page.index("<h2>Every")]
    assert "q_proj: " in before and "experts.0.down_proj: " not in before
    assert "experts.0.down_proj: " in experts and "q_proj: " not in experts
