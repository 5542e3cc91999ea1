"""DoRA on stacked experts as files and on disk: the same adapter again, memory's bits, each expert as a module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from expert_models import FAMILIES, answer, mixture
from expert_models import adapted_by_dora as adapted
from lowrank.analysis.inspection import inspect_adapter
from lowrank.injection.adapters import lora_layers
from test_expert_merge import ONE_BY_ONE, tensors
from test_expert_merge_whole import LAYOUTS, SQUARE, WHOLE, as_in_files, assert_as_in_memory, saved_turned

pytestmark = pytest.mark.filterwarnings("ignore:.*refuses DoRA .* on stacked experts")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", [True, "pissa"])
def test_load_after_save_is_the_identity_and_peft_refuses_the_file(family: str, init: object, tmp_path: Path) -> None:
    import peft

    model = adapted(mixture(family), init_lora_weights=init, target_modules=["lm_head"])
    with pytest.warns(lowrank.errors.LowrankWarning, match="for lowrank alone: .* refuses DoRA .* on stacked experts"):
        lowrank.save_adapter(model, tmp_path)
    other = mixture(family)
    lowrank.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(answer(other), answer(model))
    for (path, layer), (same, loaded) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert path == same
        one, two = (dict(each.factors("default").named_parameters()) for each in (layer, loaded))
        assert one.keys() == two.keys() and all(torch.equal(one[part], two[part]) for part in one)
    with pytest.raises(ValueError, match="does not work with use_dora=True"):
        peft.PeftModel.from_pretrained(mixture(family), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", [*ONE_BY_ONE, *WHOLE])
def test_merged_on_disk_it_has_the_bits_of_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture(family).to(dtype)
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model, target_modules=["lm_head"]), tmp_path / "adapter")
    assert_as_in_memory(tmp_path, family, model)


@pytest.mark.parametrize("family", SQUARE)
def test_square_matrices_are_rescaled_by_their_outputs(family: str, tmp_path: Path) -> None:
    model = mixture(family, **SQUARE[family])
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model, target_parameters=["experts.down_proj"]), tmp_path / "adapter")
    assert_as_in_memory(tmp_path, family, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_the_table_turns(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_turned(layout, tmp_path, monkeypatch, adapt=adapted)
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    monkeypatch.undo()
    lowrank.merge_and_unload(model)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    got, wanted = tensors(tmp_path / "out"), as_in_files(layout, tensors(tmp_path / "memory"))
    assert got.keys() == wanted.keys() and all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_inspect_measures_the_whole_change_of_every_expert(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model), tmp_path / "adapter")
    layers = {layer.measure.path: layer for layer in inspect_adapter(tmp_path / "adapter", tmp_path / "base").layers}
    for path, stack in lora_layers(model):
        root, _, leaf = path.rpartition(".")
        base, merged = stack.base_weight.detach(), stack.merged_weight(("default",))
        for expert in range(4):
            layer = layers[f"{root}.{expert}.{leaf}"]
            wanted = float((merged[expert] - base[expert]).norm() / base[expert].norm())
            assert layer.measure.dora and layer.base.dora_change == pytest.approx(wanted, rel=1e-4)


def test_resize_keeps_every_experts_magnitude_and_others_say_what_they_cannot(tmp_path: Path) -> None:
    model = adapted(mixture("qwen3_moe"))
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.resize_adapter(tmp_path / "adapter", tmp_path / "same", energy=1.0)
    other = mixture("qwen3_moe")
    lowrank.load_adapter(other, tmp_path / "same")
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(lowrank.LowrankError, match=r"is a DoRA adapter, whose change .* is not linear"):
        lowrank.combine_adapters([(tmp_path / "adapter", 0.5), (tmp_path / "same", 0.5)], tmp_path / "not")
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    for name in ("vllm", "sglang"):
        with pytest.raises(lowrank.LowrankError, match="a DoRA adapter cannot be written as an adapter for"):
            lowrank.convert_adapter(tmp_path / "adapter", tmp_path / "not", to=name, model=tmp_path / "base")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("save_original_format", [True, False])
def test_magnitudes_of_another_shape_are_refused_by_every_reader(save_original_format: bool, tmp_path: Path) -> None:
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "base", save_original_format=save_original_format)
    lowrank.save_adapter(adapted(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    key = next(key for key in held if key.endswith("experts.lora_magnitude_vector"))
    assert held[key].shape == (4, 32)
    before = answer(other := mixture("mixtral"))
    for wrong in (held[key][:3], held[key].flatten(), held[key][:, :31]):
        save_file(held | {key: wrong.contiguous()}, file)
        for read in (
            lambda: lowrank.load_adapter(other, tmp_path / "adapter"),
            lambda: lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
            lambda: inspect_adapter(tmp_path / "adapter"),
        ):
            with pytest.raises(lowrank.LowrankError, match=r"lora_magnitude_vector .*want(ed)? \[4, 32\]"):
                read()
    save_file({name: tensor for name, tensor in held.items() if name != key}, file)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_dora"]
    with pytest.raises(lowrank.LowrankError, match=r"missing .*lora_magnitude_vector"):
        lowrank.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(answer(other), before) and not (tmp_path / "out").exists()
