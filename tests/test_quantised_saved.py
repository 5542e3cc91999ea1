"""modules_to_save over quantised layers: the adapter's copy is numbers, trained and kept; the base keeps its form."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank
import quantised_models
from lowrank import LoraConfig
from lowrank.errors import LowrankWarning, MergeError
from quantised_models import load

pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).view(2, 12)
SAVED = "model.layers.0.mlp.up_proj"
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["layers.0.mlp.up_proj"])


def trained(model: Any, steps: int = 2) -> Any:
    """In place: some steps of training on what the adapter owns."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("scheme", ["nf4 double", "int8"])
def test_the_copy_is_the_matrix_is_trained_and_leaves_the_base_s_bits(scheme, tmp_path):
    model = quantised_models.llama(scheme)
    plain, before = copy.deepcopy(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.warns(LowrankWarning, match=rf"modules_to_save: {SAVED} is quantised; what .* is numbers, 8,192 of"):
        plan = lowrank.inject(model, CONFIG)
    assert plan.full_parameters == 128 * 64
    matrix = quantised_models.oracle(plain.model.layers[0].mlp.up_proj)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, matrix) and layer.weight.requires_grad
    trained(model)
    assert not torch.equal(layer.weight, matrix)
    with torch.no_grad():
        wanted = model(IDS).logits
    lowrank.save_adapter(model, tmp_path / "adapter")
    for name in ("one", "two"):
        lowrank.load_adapter(plain, tmp_path / "adapter", name)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, wanted)
    for one in (model, plain):
        lowrank.unload(one)
        now = one.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], t) for name, t in before.items())
        assert type(one.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_merged_onto_16bit_it_is_the_copy_in_memory_and_on_disk(scheme, tmp_path):
    root = quantised_models.checkpoint(tmp_path, scheme)
    model = load(root / "base")
    lowrank.inject(model, CONFIG)
    trained(model)
    copied = model.get_submodule(SAVED).weight.detach().clone()
    lowrank.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"onto quantised: .* brings {SAVED}.* in full, and it is quantised"):
        lowrank.merge_and_unload(model, onto="quantised", anyway=True)
    with pytest.raises(MergeError, match=rf"onto quantised: .* brings {SAVED}.* in full, and it is quantised"):
        lowrank.merge_checkpoint(root / "base", tmp_path / "adapter", tmp_path / "no", onto="quantised", anyway=True)
    lowrank.merge_checkpoint(root / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    lowrank.merge_and_unload(model)
    wanted = model.state_dict()
    assert type(model.get_submodule(SAVED)) is torch.nn.Linear
    assert torch.equal(wanted[f"{SAVED}.weight"], copied.bfloat16())
    got = load_file(tmp_path / "out" / "model.safetensors") if (tmp_path / "out" / "model.safetensors").exists() else {}
    for shard in (tmp_path / "out").glob("model-*.safetensors"):
        got |= load_file(shard)
    assert got and all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())
