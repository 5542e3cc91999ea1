"""A model is believed only where it has the shapes that the adapter was made for."""

import json

import pytest
import torch

from lowrank.adapters.convert import convert_adapter
from lowrank.errors import CheckpointError, ConfigError, LowrankError
from merge_disk_models import linear_factors, write_adapter, write_base

NAMES = {"gguf": "x.gguf", "loralib": "x.safetensors", "mlx": "x", "peft": "x", "peft-bin": "x"}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}
SHAPES = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}


def model(folder, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return folder


def adapter(folder, shapes=SHAPES, layer=1):
    factors = {}
    for name, shape in shapes.items():
        factors |= linear_factors(f"model.layers.{layer}.{name}", *shape)
    return write_adapter(folder, factors)


@pytest.mark.parametrize("to", NAMES)
def test_the_model_of_every_call_is_held_against_the_adapter(tmp_path, to):
    right, wrong = model(tmp_path / "right"), model(tmp_path / "wrong", hidden_size=16, num_attention_heads=4)
    made = adapter(tmp_path / "in")
    out = tmp_path / NAMES[to]
    with pytest.raises(CheckpointError, match=r"is not the base of this adapter: .*_proj changes .* and 4 more"):
        convert_adapter(made, out, to=to, model=wrong)
    assert not out.exists()
    convert_adapter(made, out, to=to, model=right)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("self_attn.q_proj", {"head_dim": 8}),
        ("self_attn.k_proj", {"num_key_value_heads": 2}),
        ("self_attn.v_proj", {"num_key_value_heads": 2}),
        ("self_attn.o_proj", {"head_dim": 2}),
        ("mlp.gate_proj", {"intermediate_size": 24}),
        ("mlp.down_proj", {"intermediate_size": 6}),
        ("mlp.up_proj", {"num_hidden_layers": 1}),
    ],
)
def test_every_number_of_the_config_counts(tmp_path, name, changes):
    made = adapter(tmp_path / "in", {name: SHAPES[name]})
    convert_adapter(made, tmp_path / "x.gguf", to="gguf", model=model(tmp_path / "right"))
    with pytest.raises(CheckpointError, match="is not the base of this adapter"):
        convert_adapter(made, tmp_path / "y.gguf", to="gguf", model=model(tmp_path / "wrong", **changes))
    convert_adapter(tmp_path / "x.gguf", tmp_path / "out", model=tmp_path / "right")
    if "num_hidden_layers" not in changes:
        with pytest.raises(CheckpointError):
            convert_adapter(tmp_path / "x.gguf", tmp_path / "back", model=tmp_path / "wrong")


def test_head_sizes_that_a_config_leaves_open_are_not_guessed(tmp_path):
    """Qwen3's and Gemma's heads are no equal parts of the hidden size."""
    base = model(tmp_path / "base", architectures=["Qwen3ForCausalLM"])
    made = adapter(tmp_path / "in", {"self_attn.q_proj": (32, 8)})
    convert_adapter(made, tmp_path / "x.gguf", to="gguf", model=base)


def test_gpt2s_shapes_come_from_its_own_words(tmp_path):
    words = {"architectures": ["GPT2LMHeadModel"], "n_embd": 4, "n_head": 2, "n_layer": 2, "vocab_size": 9}
    made = write_adapter(tmp_path / "in", linear_factors("transformer.h.0.attn.c_attn", 12, 4))
    for name, width in (("right", 4), ("wrong", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(words | {"n_embd": width}))
    convert_adapter(made, tmp_path / "x.gguf", to="gguf", model=tmp_path / "right")
    with pytest.raises(CheckpointError, match="is not the base"):
        convert_adapter(made, tmp_path / "y.gguf", to="gguf", model=tmp_path / "wrong")


def test_weights_at_hand_are_looked_at_for_any_architecture(tmp_path):
    made = write_adapter(tmp_path / "in", linear_factors("blocks.0.mix", 6, 4))
    right = write_base(tmp_path / "right", {"blocks.0.mix.weight": (6, 4)}, {})
    wrong = write_base(tmp_path / "wrong", {"blocks.0.mix.weight": (6, 5)}, {})
    convert_adapter(made, tmp_path / "out.bin", to="loralib", model=right)
    with pytest.raises(CheckpointError, match=r"weight of shape \[6, 4\], the model's is \[6, 5\]"):
        convert_adapter(made, tmp_path / "other.bin", to="loralib", model=wrong)


@pytest.mark.parametrize("architectures", ["x" * 9000, 1, True, [[]], [{}], ["A" * 9000] * 50, None, []])
def test_odd_architectures_are_one_short_sentence(tmp_path, architectures):
    base = model(tmp_path / "base", architectures=architectures)
    with pytest.raises(CheckpointError, match="not known for GGUF") as caught:
        convert_adapter(adapter(tmp_path / "in"), tmp_path / "x.gguf", to="gguf", model=base)
    assert len(str(caught.value)) < 2000


def test_numbers_that_the_source_does_not_need_or_nobody_can_mean(tmp_path):
    made = adapter(tmp_path / "in")
    for wrong in ({"alpha": 8.0}, {"enable_lora": [True]}):
        with pytest.raises(ConfigError, match="says its scale"):
            convert_adapter(made, tmp_path / "out", to="mlx", **wrong)
    convert_adapter(made, tmp_path / "x.safetensors", to="loralib")
    for alpha in (float("nan"), float("inf"), 0.0, -3.0):
        with pytest.raises(ConfigError, match="finite number above 0"):
            convert_adapter(tmp_path / "x.safetensors", tmp_path / "out", alpha=alpha)
    assert not (tmp_path / "out").exists()


def test_values_that_the_dtype_cannot_hold_are_not_written(tmp_path):
    factors = linear_factors("model.layers.0.mlp.up_proj", 12, 8)
    made = write_adapter(tmp_path / "in", {name: tensor * 1e5 for name, tensor in factors.items()})
    base = model(tmp_path / "base")
    for to, name in NAMES.items():
        with pytest.raises(LowrankError, match=r"not written|not finite"):
            convert_adapter(made, tmp_path / name, to=to, model=base, dtype=torch.float16)
        assert not (tmp_path / name).exists()
