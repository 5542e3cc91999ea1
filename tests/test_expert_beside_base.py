"""inspect --model of an adapter of stacked experts: every expert beside its W0, however the base's files hold it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from expert_models import adapted, mixture
from lowrank.analysis.inspection import inspect_adapter
from lowrank.analysis.report import render
from lowrank.cli import main
from lowrank.injection.adapters import lora_layers
from test_expert_merge import saved
from test_expert_merge_whole import LAYOUTS, saved_in_fp8, saved_turned


def dense(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (W0, ΔW) as maps from inputs to outputs}, each expert a module."""
    found = {}
    for path, layer in lora_layers(model):
        factors, weight = layer.factors("default"), layer.base_weight.detach()
        a, b = factors.a.detach(), factors.scale * factors.b.detach()
        if weight.dim() == 2:
            found[path] = weight, b @ a
            continue
        root, _, leaf = path.rpartition(".")
        for expert, matrix in enumerate(weight):
            found[f"{root}.{expert}.{leaf}"] = (matrix.t() if layer.transposed else matrix), b[expert] @ a[expert]
    return found


def assert_measured(adapter: Path, base: Path, wanted: dict[str, tuple[Tensor, Tensor]], rtol: float = 1e-4) -> None:
    """‖W0‖ says which expert was read, ‖UᵀW0V‖ which way round and in which order of its rows."""
    layers = {layer.measure.path: layer for layer in inspect_adapter(adapter, base).layers}
    assert layers.keys() == wanted.keys()
    for path, (weight, change) in wanted.items():
        measured = layers[path].base
        assert measured is not None and measured.amplification is not None
        u, sigma, vh = torch.linalg.svd(change)
        rank = int((sigma > 1e-5 * sigma[0]).sum())
        inner = u[:, :rank].t() @ weight.float() @ vh[:rank].t()
        assert measured.weight_norm == pytest.approx(float(weight.float().norm()), rel=rtol)
        assert measured.relative == pytest.approx(float(change.norm() / weight.float().norm()), rel=rtol)
        assert measured.amplification.along_change == pytest.approx(float(inner.norm()), rel=10 * rtol)


@pytest.mark.parametrize("original", [True, False], ids=["as files are", "the model's names"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_every_expert_is_measured_beside_its_own_weight(family: str, original: bool, tmp_path: Path) -> None:
    model = saved(family, tmp_path, target_modules=["lm_head"])
    if not original:
        mixture(family).save_pretrained(tmp_path / "base", save_original_format=False)
    assert_measured(tmp_path / "adapter", tmp_path / "base", dense(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_the_table_turns(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_turned(layout, tmp_path, monkeypatch)
    assert_measured(tmp_path / "adapter", tmp_path / "base", dense(model))


def test_the_figures_do_not_depend_on_how_the_files_hold_the_experts(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    mixture("qwen3_moe").save_pretrained(tmp_path / "whole", save_original_format=False)
    one, other = (inspect_adapter(tmp_path / "adapter", tmp_path / name) for name in ("base", "whole"))
    assert one.layers == other.layers and all(layer.base is not None for layer in one.layers)


def test_stacks_in_fp8_are_measured_as_they_are_read(tmp_path: Path) -> None:
    model = mixture("qwen3_moe").bfloat16()
    saved_in_fp8(model, tmp_path / "base")
    adapted(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    assert_measured(tmp_path / "adapter", tmp_path / "base", dense(model))


def test_the_page_has_maps_of_experts_beside_the_base_and_one_row_for_all_of_a_projection(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path, target_modules=["q_proj"])
    page = render(inspect_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter"))
    beside = page[page.index("<h2>Beside the base") : page.index("<h2>Beside the other adapter")]
    maps = re.findall(r"<svg.*?</svg>", beside, re.DOTALL)
    assert [len(set(re.findall(r"experts\.(\d)\.\w+: ", drawn))) for drawn in maps] == [0, 4, 4] * 2
    rows = re.findall(r"<td[^>]*>([\w.]*_proj)</td>", beside)
    assert rows == ["experts.N.down_proj", "experts.N.gate_up_proj", "q_proj"]


def test_a_base_of_other_experts_is_refused_in_one_sentence(tmp_path: Path, capsys: Any) -> None:
    saved("granitemoe", tmp_path)
    mixture("granitemoe", num_local_experts=3).save_pretrained(tmp_path / "three")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--model", str(tmp_path / "three")]) == 2
    said = capsys.readouterr()
    assert "3 experts of 32×48, want [9, 48] and [32, 9]" in said.err and said.err.count("\n") == 1 and not said.out
