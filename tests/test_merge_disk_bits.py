"""Law: merging on disk gives the bits of merging in memory, for every layer kind, variant and dtype."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_models import answer, bert, convolutions, gpt2, llama, vit
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import assert_same_bits, load_base, merged_in_memory, save_adapter, save_base, tensors_of

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "convolutions": convolutions}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"0.mlp.down_proj": 5},
        },
    ),
    "rslora": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    "pissa": ("llama", {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": "pissa"}),
    "conv1d-linear": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-linear dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "fused": ("gpt2", {"target_modules": ["c_attn[q,v]"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "positions": ("gpt2", {"target_modules": ["wpe"]}),
    "bias": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "modules_to_save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "patches": ("vit", {"target_modules": ["q_proj", "o_proj", "projection", "fc1"]}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "three", "head"], "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, config = CASES[case]
    model = MODELS[name]()
    base = save_base(model, tmp_path / "base", dtype)
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    wanted = merged_in_memory(load_base(model, base), [adapter])
    found = tensors_of(tmp_path / "out")
    if name == "vit":  # whose files have other names than its modules
        found = load_base(model, tmp_path / "out").state_dict()
    assert_same_bits(found, wanted.state_dict())
    assert report.merged and report.rows
    assert bool(report.renamed) == (name == "vit")
    assert any(not torch.equal(found[key], tensor) for key, tensor in load_base(model, base).state_dict().items())


@pytest.mark.parametrize("case", ["linear", "conv1d-linear", "embedding", "bias", "convolutions"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, config = CASES[case]
    model = MODELS[name]()
    base = save_base(model, tmp_path / "base", dtype)
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), merged_in_memory(load_base(model, base), [adapter]).state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", ["linear", "dora"])
def test_a_wider_result_keeps_what_rounding_would_lose(
    case: str, stored: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    """--dtype to something wider is the merge of the base loaded in that dtype; everything is converted."""
    model, dtype = llama(), getattr(torch, wanted)
    base = save_base(model, tmp_path / "base", stored)
    adapter = save_adapter(model, tmp_path / "adapter", **CASES[case][1])
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=wanted, verify="full")
    found = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    wide = torch.promote_types(stored, dtype)
    reference = merged_in_memory(load_base(model, base, wide), [adapter])
    if wide == dtype:  # otherwise memory rounds twice
        assert_same_bits(found, reference.state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == wanted
    loaded = load_base(model, tmp_path / "out")
    assert next(loaded.parameters()).dtype == dtype


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -1.25)])
def test_several_adapters(weights: tuple[float, float], tmp_path: Path) -> None:
    """Different ranks, targets and scalings, summed before the one rounding."""
    model = llama()
    base = save_base(model, tmp_path / "base", torch.bfloat16)
    one = save_adapter(model, tmp_path / "one", seed=1, r=3, target_modules=["q_proj", "embed_tokens"])
    two = save_adapter(model, tmp_path / "two", seed=2, r=5, use_rslora=True, target_modules=["q_proj", "v_proj"])
    pairs = [(one, weights[0]), (two, weights[1])]
    merge_checkpoint(base, pairs, tmp_path / "out", verify="full")
    assert_same_bits(tensors_of(tmp_path / "out"), merged_in_memory(load_base(model, base), pairs).state_dict())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_shards_and_threads(threads: int, tmp_path: Path) -> None:
    """The result has the base's files, index and order, however many threads share the work."""
    model = llama(3)
    base = save_base(model, tmp_path / "base", torch.bfloat16, shard="4KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    report = merge_checkpoint(base, adapter, tmp_path / "out", threads=threads)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    assert_same_bits(tensors_of(tmp_path / "out"), merged_in_memory(load_base(model, base), [adapter]).state_dict())
    assert report.moved == len(tensors_of(base)) - 3


def test_large_layers_in_many_blocks(tmp_path: Path) -> None:
    """Layers of several blocks of rows with a ragged end, wide and tall, have the bits of memory, on any threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1500, 1111), nn.Linear(1111, 2300), nn.Linear(2300, 70)).to(torch.bfloat16)
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = save_adapter(model, tmp_path / "adapter", r=7, target_modules=["0", "1", "2"])
    wanted = merged_in_memory(model, [adapter]).state_dict()
    for threads in (1, 3):
        report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"out{threads}", threads=threads)
        assert_same_bits(tensors_of(tmp_path / f"out{threads}"), wanted)
    assert report.worst <= 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_transformers_loads_the_result(name: str, tmp_path: Path) -> None:
    """No tensor missing, none left over, and the answers of the model merged in memory."""
    model = MODELS[name]()
    base = save_base(model, tmp_path / "base")
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "wte"], "bert": ["query", "word_embeddings"]}[name]
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=targets)
    merge_checkpoint(base, adapter, tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answer(loaded.eval()), answer(merged_in_memory(load_base(model, base), [adapter])))


def test_peft_gives_the_same_model(tmp_path: Path) -> None:
    """The peer's own load and merge, in float32, agree to rounding."""
    peft = pytest.importorskip("peft")
    model = llama()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    merge_checkpoint(base, adapter, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(load_base(model, base), adapter).merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


def test_old_files_of_peft(shared: Path, tmp_path: Path) -> None:
    """Adapters saved by PEFT 0.6.1, in pickles: the merged model gives the outputs that were stored then."""
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(100, 5), "conv1d": Conv1D(1, 5), "lin0": nn.Linear(10, 2)})
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    folder = shared / "adapters" / "lora_emb_conv1d-0.6.1"
    merge_checkpoint(tmp_path / "base", folder, tmp_path / "out", allow_pickle=True)
    model.load_state_dict(tensors_of(tmp_path / "out"))
    x = torch.arange(90).reshape(9, 10)
    with torch.no_grad():
        h = model["conv1d"](model["emb"](x)).relu().flatten(1)
        output = model["lin0"](h).log_softmax(-1)
    torch.testing.assert_close(
        output, torch.load(folder / "output.pt", map_location="cpu", weights_only=True), rtol=1e-4, atol=1e-5
    )


def test_an_adapter_that_trained_from_another_start(tmp_path: Path) -> None:
    """PiSSA factors saved as PEFT saves them by default, for a base it changed: the start is taken off again."""
    peft = pytest.importorskip("peft")
    model = llama()
    base = save_base(model, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(load_base(model, base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    found = tensors_of(tmp_path / "out")
    assert_same_bits(found, merged_in_memory(load_base(model, base), [tmp_path / "adapter"]).state_dict())
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_tables_that_peft_saves_beside_an_embedding(tmp_path: Path) -> None:
    """PEFT writes the base's own table beside adapted embeddings; equal to the base's it changes nothing."""
    peft = pytest.importorskip("peft")
    model = llama()
    base = save_base(model, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"], init_lora_weights=False)
    theirs = peft.get_peft_model(load_base(model, base), config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert (report.merged, report.replaced) == (1, 0)
    merged = theirs.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(tensors_of(tmp_path / "out")["model.embed_tokens.weight"], merged)


def test_nothing_but_files_is_needed(tmp_path: Path) -> None:
    """The merge imports neither transformers nor any model class."""
    import subprocess
    import sys

    model = llama()
    base = save_base(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    code = (
        "import sys, lowrank; lowrank.merge_checkpoint(*sys.argv[1:4]); "
        "print([m for m in ('transformers', 'peft', 'pydantic', 'rich') if m in sys.modules])"
    )
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
