"""Which tensor an adapter's module means: by structure, reported, and never by a guess."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import (
    embedding_factors,
    linear_factors,
    pair,
    tensors_of,
    write_adapter,
    write_base,
)

Q = "self_attn.q_proj"
SCALE = 3 / 2


def merge(tmp_path: Path, shapes: dict[str, tuple[int, ...]], factors: dict[str, Tensor], **config: object) -> tuple:
    """(report, base's tensors, result's tensors)."""
    base = write_base(tmp_path / "base", shapes)
    adapter = write_adapter(tmp_path / "adapter", factors, **config)
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    return report, tensors_of(base), tensors_of(tmp_path / "out")


def assert_changed(before: dict[str, Tensor], after: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Exactly these tensors differ, by exactly these changes."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in changes:
            torch.testing.assert_close(after[name], tensor + changes[name])
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name


def delta(d: int, k: int, seed: int = 1) -> Tensor:
    a, b = pair(d, k, seed)
    return SCALE * b @ a


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("model.layers", "layers"),
        ("layers", "model.layers"),
        ("transformer.h", "h"),
        ("language_model.model.layers", "model.language_model.layers"),
        ("model.language_model.layers", "language_model.model.layers"),
        ("model.layers", "model.language_model.layers"),
        ("base.model.layers", "model.layers"),
    ],
)
def test_leading_parts_are_exchanged_and_reported(stem: str, said: str, tmp_path: Path) -> None:
    shapes = {f"{stem}.{i}.{Q}.weight": (4, 3) for i in range(12)}
    factors = {k: v for i in (0, 3, 11) for k, v in linear_factors(f"{said}.{i}.{Q}", 4, 3, seed=i).items()}
    report, before, after = merge(tmp_path, shapes, factors)
    assert_changed(before, after, {f"{stem}.{i}.{Q}.weight": delta(4, 3, i) for i in (0, 3, 11)})
    assert len(report.renamed) == 1 and "→" in report.renamed[0]


def test_equal_names_need_no_report(tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 3), "layers.0.self_attn.q_proj.weight": (4, 3)}
    report, before, after = merge(tmp_path, shapes, linear_factors(f"layers.0.{Q}", 4, 3))
    assert_changed(before, after, {f"layers.0.{Q}.weight": delta(4, 3)})
    assert report.renamed == ()


def test_a_vision_tower_with_the_same_layers_is_told_apart_by_shape(tmp_path: Path) -> None:
    shapes = {f"language_model.model.layers.{i}.{Q}.weight": (4, 3) for i in range(3)}
    shapes |= {f"vision_tower.encoder.layers.{i}.{Q}.weight": (5, 3) for i in range(3)}
    _, before, after = merge(tmp_path, shapes, linear_factors(f"layers.2.{Q}", 4, 3))
    assert_changed(before, after, {f"language_model.model.layers.2.{Q}.weight": delta(4, 3)})


def test_a_vision_tower_is_told_apart_by_how_many_layers_there_are(tmp_path: Path) -> None:
    shapes = {f"language_model.model.layers.{i}.{Q}.weight": (4, 3) for i in range(4)}
    shapes |= {f"vision_tower.encoder.layers.{i}.{Q}.weight": (4, 3) for i in range(2)}
    factors = linear_factors(f"model.layers.1.{Q}", 4, 3) | linear_factors(f"model.layers.3.{Q}", 4, 3, seed=3)
    _, before, after = merge(tmp_path, shapes, factors)
    wanted = {f"language_model.model.layers.{i}.{Q}.weight": delta(4, 3, i) for i in (1, 3)}
    assert_changed(before, after, wanted)


def test_towers_are_renamed_each_by_its_own_stem(tmp_path: Path) -> None:
    shapes = {f"language_model.model.layers.0.{Q}.weight": (4, 3), f"vision_tower.layers.0.{Q}.weight": (4, 3)}
    factors = linear_factors(f"model.language_model.layers.0.{Q}", 4, 3)
    factors |= linear_factors(f"model.vision_tower.layers.0.{Q}", 4, 3, seed=2)
    report, before, after = merge(tmp_path, shapes, factors)
    first, second = shapes
    assert_changed(before, after, {first: delta(4, 3), second: delta(4, 3, 2)})
    assert len(report.renamed) == 2


def test_two_places_that_fit_are_refused(tmp_path: Path) -> None:
    shapes = {f"encoder.layers.0.{Q}.weight": (4, 3), f"decoder.layers.0.{Q}.weight": (4, 3)}
    with pytest.raises(CheckpointError, match="means two places"):
        merge(tmp_path, shapes, linear_factors(f"layers.0.{Q}", 4, 3))
    assert not (tmp_path / "out").exists()


def test_two_modules_for_one_tensor_are_refused(tmp_path: Path) -> None:
    factors = linear_factors(f"model.layers.0.{Q}", 4, 3) | linear_factors(f"layers.0.{Q}", 4, 3)
    with pytest.raises(CheckpointError, match="both mean"):
        merge(tmp_path, {f"model.layers.0.{Q}.weight": (4, 3)}, factors)


def test_names_that_mean_nothing_are_listed_with_the_nearest(tmp_path: Path) -> None:
    factors = linear_factors("model.layers.0.self_attn.q_porj", 4, 3) | linear_factors(f"model.layers.7.{Q}", 4, 3)
    with pytest.raises(CheckpointError) as caught:
        merge(tmp_path, {f"model.layers.0.{Q}.weight": (4, 3)}, factors)
    assert "q_porj is nowhere" in str(caught.value) and "nearest: " in str(caught.value)
    assert f"model.layers.7.{Q} is nowhere" in str(caught.value)


def test_a_hundred_faults_are_one_sentence_that_counts_them(tmp_path: Path) -> None:
    factors = {}
    for layer in range(100):
        factors |= linear_factors(f"model.layers.{layer}.mlp.{'x' * 400}", 4, 3)
    with pytest.raises(CheckpointError, match=r" and 99 more$") as caught:
        merge(tmp_path, {f"model.layers.0.{Q}.weight": (4, 3)}, factors)
    assert len(str(caught.value)) < 500


def test_a_list_of_layers_keeps_its_name(tmp_path: Path) -> None:
    """`blocks.0.q_proj` is not `layers.0.q_proj`, though they end alike."""
    with pytest.raises(CheckpointError, match="nowhere"):
        merge(tmp_path, {"model.layers.0.q_proj.weight": (4, 3)}, linear_factors("model.blocks.0.q_proj", 4, 3))


def test_old_names_of_a_normalisation(tmp_path: Path) -> None:
    """Checkpoints of 2018 say gamma and beta where modules have weight and bias."""
    shapes = {"encoder.layer.0.query.weight": (4, 3), "encoder.layer.0.LayerNorm.beta": (4,)}
    shapes |= {"encoder.layer.0.LayerNorm.gamma": (4,)}
    factors = linear_factors("encoder.layer.0.query", 4, 3)
    bias = torch.arange(4.0)
    factors |= {"encoder.layer.0.LayerNorm.bias": bias}
    _, before, after = merge(tmp_path, shapes, factors, bias="all", target_modules=["query"])
    change = bias - before["encoder.layer.0.LayerNorm.beta"]
    assert_changed(
        before, after, {"encoder.layer.0.query.weight": delta(4, 3), "encoder.layer.0.LayerNorm.beta": change}
    )


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None, "somebodys"])
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_square_matrices(model_type: str | None, fan_in_fan_out: bool, tmp_path: Path) -> None:
    """The architecture decides; without one we know, the adapter's other targets do, whatever fan_in_fan_out says."""
    path = "h.0.attn.c_proj"
    shapes = {f"{path}.weight": (4, 4), "h.0.attn.c_attn.weight": (4, 12)}
    factors = linear_factors(path, 4, 4)
    if model_type in (None, "somebodys"):
        factors |= linear_factors("h.0.attn.c_attn", 12, 4, seed=2)
    config = {} if model_type is None else {"model_type": model_type}
    base = write_base(tmp_path / "base", shapes, config)
    adapter = write_adapter(tmp_path / "adapter", factors, fan_in_fan_out=fan_in_fan_out, target_modules=["c_proj"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    change = tensors_of(tmp_path / "out")[f"{path}.weight"] - tensors_of(base)[f"{path}.weight"]
    wanted = delta(4, 4) if model_type == "llama" else delta(4, 4).t()
    torch.testing.assert_close(change, wanted)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_square_matrices_alone_go_by_the_adapters_word(fan_in_fan_out: bool, tmp_path: Path) -> None:
    shapes = {"layers.0.q_proj.weight": (4, 4)}
    _, before, after = merge(tmp_path, shapes, linear_factors("layers.0.q_proj", 4, 4), fan_in_fan_out=fan_in_fan_out)
    wanted = delta(4, 4).t() if fan_in_fan_out else delta(4, 4)
    assert_changed(before, after, {"layers.0.q_proj.weight": wanted})


def test_a_square_table_is_an_embedding_by_its_keys(tmp_path: Path) -> None:
    shapes = {"embed_tokens.weight": (4, 4)}
    _, before, after = merge(tmp_path, shapes, embedding_factors("embed_tokens", 4, 4))
    assert_changed(before, after, {"embed_tokens.weight": delta(4, 4).t()})


def test_a_head_for_a_task_comes_with_the_adapter(tmp_path: Path) -> None:
    """A classifier that the base has none of is brought along, in the base's dtype, and reported."""
    shapes = {f"layers.0.{Q}.weight": (4, 3)}
    base = write_base(tmp_path / "base", shapes, dtype=torch.bfloat16)
    score = torch.randn(2, 4)
    factors = linear_factors(f"model.layers.0.{Q}", 4, 3) | {"score.weight": score}
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["score"])
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after["score.weight"], score.bfloat16())
    assert any("score.weight is new" in note for note in report.notes)


def test_a_full_tensor_that_is_no_saved_module_must_exist(tmp_path: Path) -> None:
    factors = linear_factors(f"layers.0.{Q}", 4, 3) | {"layers.0.mlp.bias": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.bias is nowhere"):
        merge(tmp_path, {f"layers.0.{Q}.weight": (4, 3)}, factors, bias="all")
