"""Merging into quantised bases: the same bits in memory and on disk, merged ≡ adapted, and a loss is said before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
import models
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, MergeError
from lowrank.injection.adapters import lora_layers

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
IDS = torch.arange(24).view(2, 12)
TARGETS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module", params=SCHEMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it, quantised, in two shards, and the float model beside it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    root = tmp_path_factory.mktemp("quantised")
    plain = models.causal("llama", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    plain.save_pretrained(root / "float")
    model = AutoModelForCausalLM.from_pretrained(
        root / "float", dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**SCHEMES[request.param])
    )
    model.save_pretrained(root / "base", max_shard_size="40kB")
    assert len(list((root / "base").glob("*.safetensors"))) > 1
    return root


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def adapted(base: Path, out: Path, size: float = 0.1, **options: Any) -> Any:
    """The model with a trained adapter, which is saved to `out`."""
    model = load(base / "base")
    lowrank.inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)))
    for _, layer in lora_layers(model):
        for tensor in layer.factors("default").trainable():
            tensor.data += size * torch.randn_like(tensor)
    lowrank.save_adapter(model, out)
    return model


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_onto_16bit_has_the_same_bits_in_memory_and_on_disk(base, tmp_path, options):
    model = adapted(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        wanted = model(IDS).logits
    report = lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    lowrank.merge_and_unload(model)
    assert report.merged == 5 and min(report.surviving.values()) > 0.99
    assert not any(name for name in model.state_dict() if "absmax" in name or "SCB" in name)
    assert "quantization_config" not in model.config.to_dict()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with torch.no_grad():
        got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.03 * wanted.abs().max()
    assert same(load(tmp_path / "out"), model)
    model.save_pretrained(tmp_path / "saved")
    assert same(load(tmp_path / "saved"), model)


def test_onto_quantised_is_refused_where_little_survives_and_writes_nothing(base, tmp_path):
    model = adapted(base, tmp_path / "adapter", size=1e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"modules would keep less than 50% .*\n  +\d+\.\d% left"):
        lowrank.merge_and_unload(model, onto="quantised")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(MergeError, match="would keep less than 50%"):
        lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "out", onto="quantised")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0.1, 1e-3])
def test_onto_quantised_has_the_same_bits_in_memory_and_on_disk(base, tmp_path, size):
    model = adapted(base, tmp_path / "adapter", size)
    report = lowrank.merge_checkpoint(
        base / "base", tmp_path / "adapter", tmp_path / "out", onto="quantised", anyway=True
    )
    lowrank.merge_and_unload(model, onto="quantised", anyway=True)
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    read = load(tmp_path / "out")
    assert same(read, model)
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert report.repacked == 4 and len(report.surviving) == 5  # the head is plain
    if size == 0.1:
        assert min(report.surviving.values()) > 0.5


def test_onto_original_is_the_plain_model_s_merge(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    lowrank.merge_checkpoint(base / "float", tmp_path / "adapter", tmp_path / "out", onto="original")
    model = load(base / "float")
    lowrank.load_adapter(model, tmp_path / "adapter")
    lowrank.merge_and_unload(model)
    assert same(load(tmp_path / "out"), model)
    with pytest.raises(MergeError, match="is quantised itself: give the model that it was made from"):
        lowrank.merge_checkpoint(base / "base", tmp_path / "adapter", tmp_path / "no", onto="original")
    with pytest.raises(MergeError, match="no weight that the adapter changes is quantised"):
        lowrank.merge_checkpoint(base / "float", tmp_path / "adapter", tmp_path / "no", onto="quantised")


def test_some_of_several_adapters_are_merged_and_the_others_answer_on(base, tmp_path):
    model = adapted(base, tmp_path / "one")
    lowrank.load_adapter(model, tmp_path / "one", "two")
    lowrank.set_active(model, ["default", "two"])
    with torch.no_grad():
        wanted = model(IDS).logits
    lowrank.merge_and_unload(model, ["default"])
    assert lowrank.active_adapters(model) == ("two",)
    with torch.no_grad():
        got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_inside_of_merged_the_layers_are_dense_and_the_bits_come_back(base, tmp_path):
    model = adapted(base, tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(IDS).logits
        with lowrank.merged(model):
            got = model(IDS).logits
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def rewritten(base: Path, out: Path, change: Any) -> Path:
    """The quantised checkpoint in one file, its tensors changed."""
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((base / "base").glob("*.safetensors")):
        tensors |= load_file(shard)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((base / "base" / "config.json").read_bytes())
    return out


def test_damaged_quantised_weights_are_said_in_a_sentence(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    weight = "model.layers.0.self_attn.q_proj.weight"
    four_bit = any(name.endswith(".absmax") for name in load(base / "base").state_dict())
    scale = f"{weight}.absmax" if four_bit else "model.layers.0.self_attn.q_proj.SCB"

    def without(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[scale]

    def short(tensors: dict[str, torch.Tensor]) -> None:
        tensors[scale] = tensors[scale][:-1].clone()

    faults = [(short, rf"{scale} cannot be read: it has shape \[\d+\], wanted \[\d+\]")]
    if four_bit:
        faults.append((without, rf"weight {weight} cannot be read: its part {scale} is missing"))

        def strange(tensors: dict[str, torch.Tensor]) -> None:
            name = next(name for name in tensors if name.startswith(f"{weight}.quant_state"))
            said = json.loads(bytes(tensors[name].tolist())) | {"blocksize": 7, "shape": [1, -1]}
            tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

        faults.append((strange, "its quant_state says nothing that can be meant of shape, blocksize"))
    else:
        faults.append((without, "stored as I8, a form that is not read here"))
    for number, (change, sentence) in enumerate(faults):
        damaged = rewritten(base, tmp_path / f"damaged{number}", change)
        with pytest.raises((CheckpointError, MergeError), match=sentence):
            lowrank.merge_checkpoint(damaged, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
