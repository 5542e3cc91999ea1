"""mlx-lm's names for modules: right, or refused. What mlx-lm itself makes of them is in test_convert_peers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.convert import convert_adapter
from lowrank.adapters.convert.mlx_names import mlx_names, path_of
from lowrank.checkpoint.read import read_adapter
from lowrank.errors import CheckpointError
from merge_disk_models import linear_factors, write_adapter

GPT2 = "transformer.h.0.attn.c_attn"


def config(folder, **fields):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def written(folder):
    tensors = load_file(folder / "adapters.safetensors")
    parameters = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    assert {name.rpartition(".")[0] for name in tensors} == set(parameters["keys"])
    return tensors, parameters["scale"]


def test_gpt2s_names_need_the_architecture_and_come_back(tmp_path):
    made = write_adapter(tmp_path / "in", linear_factors(GPT2, 12, 4))
    with pytest.raises(CheckpointError, match="give the base, --model"):
        convert_adapter(made, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()
    base = config(tmp_path / "base", architectures=["GPT2LMHeadModel"])
    convert_adapter(made, tmp_path / "out", to="mlx", model=base)
    assert set(written(tmp_path / "out")[0]) == {f"model.h.0.attn.c_attn.lora_{role}" for role in "ab"}
    convert_adapter(tmp_path / "out", tmp_path / "back")
    assert set(read_adapter(tmp_path / "back").low_rank) == {GPT2}


@pytest.mark.parametrize(
    ("architecture", "path", "name"),
    [
        (None, "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"),
        (None, "lm_head", "lm_head"),
        (None, "gpt_neox.layers.1.attention.dense", "model.h.1.attention.dense"),
        (None, "transformer.h.1.mlp.fc_in", "model.h.1.mlp.fc_in"),
        ("GPTBigCodeForCausalLM", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc"),
        ("GPTNeoXForCausalLM", "embed_out", "model.embed_out"),
        ("GPT2LMHeadModel", "transformer.wte", "model.wte"),
    ],
)
def test_names_there_and_back(architecture, path, name):
    assert mlx_names([path], architecture) == {path: (name, None)}
    assert path_of(name) == path


def test_names_that_mlx_lm_does_not_have_are_refused(tmp_path):
    for path in ("layers.0.self_attn.q_proj", "transformer.h.0.self_attention.query_key_value", "blocks.0.mix",
                 "model.layers.0.self_attn.kv_b_proj", "model.language_model.layers.0.mlp.up_proj"):  # fmt: skip
        made = write_adapter(tmp_path / path, linear_factors(path, 6, 4))
        with pytest.raises(CheckpointError, match="no name for"):
            convert_adapter(made, tmp_path / "out", to="mlx")
        assert not (tmp_path / "out").exists()


def test_experts_become_one_module_whose_slices_are_theirs(tmp_path):
    stem = "model.layers.0.block_sparse_moe.experts"
    factors = {}
    for expert in range(3):
        factors |= linear_factors(f"{stem}.{expert}.w1", 6, 4, seed=expert) if expert != 1 else {}
    factors |= linear_factors(f"{stem}.2.w3", 6, 4, seed=7)
    made = write_adapter(tmp_path / "in", factors)
    with pytest.raises(CheckpointError, match="give the base, --model"):
        convert_adapter(made, tmp_path / "out", to="mlx")
    base = config(tmp_path / "base", architectures=["MixtralForCausalLM"], num_local_experts=4)
    convert_adapter(made, tmp_path / "out", to="mlx", model=base)
    tensors, scale = written(tmp_path / "out")
    files = read_adapter(made)
    for role, name in (("w1", "gate_proj"), ("w3", "up_proj")):
        a, b = (tensors[f"model.layers.0.block_sparse_moe.switch_mlp.{name}.lora_{part}"] for part in "ab")
        assert (tuple(a.shape), tuple(b.shape)) == ((4, 2, 4), (4, 6, 2))
        for expert in range(4):
            path = f"{stem}.{expert}.{role}"
            found = scale * b[expert] @ a[expert]  # LoRASwitchLinear.fuse: (scale·lora_b) @ lora_a
            if path in files.low_rank:
                factors = files.factors(path, ())
                assert torch.allclose(found, factors.scale * factors.b @ factors.a, atol=1e-6)
            else:
                assert not found.any()
    few = config(tmp_path / "few", num_local_experts=2)
    with pytest.raises(CheckpointError, match="expert 2 is adapted, and 2 experts"):
        convert_adapter(made, tmp_path / "other", to="mlx", model=few)


def test_tables_that_are_the_head_too_are_refused_and_unknown_ones_told(tmp_path):
    table = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 9),
        "model.embed_tokens.lora_embedding_B": torch.ones(4, 2),
    }
    made = write_adapter(tmp_path / "in", table)
    head = write_adapter(tmp_path / "head", linear_factors("lm_head", 9, 4))
    tied, untied = (config(tmp_path / str(tie), tie_word_embeddings=tie) for tie in (True, False))
    for adapter in (made, head):
        with pytest.raises(CheckpointError, match="embedding and head are one"):
            convert_adapter(adapter, tmp_path / "out", to="mlx", model=tied)
    assert convert_adapter(made, tmp_path / "free", to="mlx", model=untied).notes == ()
    assert "not tied" in str(convert_adapter(made, tmp_path / "unknown", to="mlx"))
