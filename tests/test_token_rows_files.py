"""Single rows of a table in files: PEFT's format both ways, merging on disk, and files that are wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from checkpoint_models import WIDE, answer, gpt2, llama
from lowrank import LoraConfig
from lowrank.analysis import inspect_adapter
from lowrank.errors import CheckpointError, MergeError
from merge_disk_models import assert_same_bits, load_base, save_base, tensors_of


def tied():
    """A small Llama whose head is its table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        initializer_range=WIDE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def targets(make):
    return ["c_attn"] if make is gpt2 else ["q_proj"]


def trained(make, rows, folder, name="default", seed=1):
    """A model with rows and factors that are not the base's, saved to `folder`."""
    model = make()
    lowrank.inject(
        model, LoraConfig(r=3, lora_alpha=7, target_modules=targets(make), trainable_token_indices=rows), name
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    lowrank.set_active(model, [name])
    lowrank.save_adapter(model, folder, name)
    return model


CASES = {
    "untied": (llama, [3, 9, 20]),
    "tied": (tied, [20, 3, 7]),
    "gpt2": (gpt2, [20, 3, 7]),
    "table and head": (llama, {"embed_tokens": [4, 2], "lm_head": [9]}),
    "tied, other rows": (tied, {"embed_tokens": [4, 2], "lm_head": [9]}),
    "tied, both named": (tied, {"embed_tokens": [4, 9], "lm_head": [4, 9]}),
    "tied, the head alone": (tied, {"lm_head": [4, 9]}),
}


@pytest.mark.parametrize("case", CASES)
def test_pefts_rows_answer_as_in_peft(tmp_path, case):
    peft = pytest.importorskip("peft")
    make, rows = CASES[case]
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets(make), init_lora_weights=False, trainable_token_indices=rows
    )
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "trainable_tokens" in name:
                parameter += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make()
    base = answer(ours)
    report = lowrank.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(answer(ours), answer(theirs), atol=2e-5)
    assert not torch.allclose(answer(ours), base, atol=0.1) and not report.unknown_fields
    again = lowrank.load_adapter(other := make(), save(ours, tmp_path / "ours"))
    assert torch.equal(answer(other), answer(ours)) and not again.changes_nothing
    read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.allclose(answer(read), answer(theirs), atol=2e-5)


def save(model, folder):
    lowrank.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_merged_on_disk_as_in_memory(tmp_path, case, dtype):
    make, rows = CASES[case]
    trained(make, rows, tmp_path / "adapter")
    base = save_base(make(), tmp_path / "base", dtype)
    report = lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    assert report.replaced >= 1
    model = load_base(make(), tmp_path / "base", dtype)
    lowrank.load_adapter(model, tmp_path / "adapter")
    wanted = lowrank.merge_and_unload(model)
    merged = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    assert_same_bits(dict(merged.state_dict()), dict(wanted.state_dict()))
    assert merged.config.tie_word_embeddings == wanted.config.tie_word_embeddings


def test_rows_of_several_adapters(tmp_path):
    trained(tied, [3, 9], tmp_path / "one")
    trained(tied, [5, 20], tmp_path / "two", seed=2)
    trained(tied, [9], tmp_path / "three", seed=3)
    base = save_base(tied(), tmp_path / "base")
    lowrank.merge_checkpoint(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    model = tied()
    for name in ("one", "two"):
        lowrank.load_adapter(model, tmp_path / name, name)
    lowrank.set_active(model, ["one", "two"])
    wanted = lowrank.merge_and_unload(model).model.embed_tokens.weight
    assert torch.equal(tensors_of(tmp_path / "out")["model.embed_tokens.weight"], wanted)
    with pytest.raises(MergeError, match="each bring row 9 of model"):
        lowrank.merge_checkpoint(base, [tmp_path / "one", tmp_path / "three"], tmp_path / "other")
    with pytest.raises(MergeError, match="no weighted form"):
        lowrank.merge_checkpoint(base, (tmp_path / "one", 0.5), tmp_path / "other")
    with pytest.raises(MergeError, match="of its own"):
        lowrank.combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_files_made_of_it_keep_the_rows_or_are_refused(tmp_path):
    model = trained(tied, [3, 9], tmp_path / "one")
    lowrank.resize_adapter(tmp_path / "one", tmp_path / "resized", rank=5)
    lowrank.load_adapter(other := tied(), tmp_path / "resized")
    assert torch.allclose(answer(other), answer(model), atol=1e-4)
    lowrank.convert_adapter(tmp_path / "one", tmp_path / "bin", to="peft-bin")
    lowrank.load_adapter(other := tied(), tmp_path / "bin", allow_pickle=True)
    assert torch.equal(answer(other), answer(model))
    with pytest.raises(CheckpointError, match="holds factors only"):
        lowrank.convert_adapter(tmp_path / "one", tmp_path / "mlx", to="mlx")
    assert inspect_adapter(tmp_path / "one").full == {"model.embed_tokens (rows 3, 9)": (2, 16)}


def test_words_that_the_user_added(tmp_path):
    def longer():
        model = tied()
        torch.manual_seed(5)
        model.resize_token_embeddings(34)
        return model

    model = trained(longer, [33, 32], tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) >= {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    }
    torch.manual_seed(9)
    other = tied()
    other.resize_token_embeddings(34)  # with other random rows, which are replaced
    lowrank.load_adapter(other, tmp_path / "adapter")
    assert torch.allclose(answer(other), answer(model), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"no row 33, 32: .*resize_token_embeddings\(34\)"):
        lowrank.load_adapter(tied(), tmp_path / "adapter")


KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def wrong(folder, tensors=lambda tensors: None, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    path = folder / "adapter_model.safetensors"
    held = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors(held)
    save_file(held, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, config, match",
    [
        (lambda t: t.pop(KEY), {}, "missing token_adapter.trainable_tokens_delta"),
        (lambda t: None, {"trainable_token_indices": None}, "does not say which"),
        (lambda t: None, {"trainable_token_indices": [1, 2, 3]}, "names 3 rows"),
        (lambda t: None, {"trainable_token_indices": [1, 1]}, "names row 1 twice"),
        (lambda t: None, {"trainable_token_indices": [1, -1]}, "must be token ids"),
        (lambda t: None, {"trainable_token_indices": "words"}, "must be token ids"),
        (lambda t: None, {"trainable_token_indices": [1, 10**30]}, "must be token ids"),
        (lambda t: None, {"trainable_token_indices": [1, True]}, "must be token ids"),
        (lambda t: None, {"trainable_token_indices": {"": 3}}, "must be token ids"),
        (lambda t: None, {"trainable_token_indices": {"lm_head": [3, 9]}}, "does not say which"),
        (lambda t: t.update({KEY: t[KEY] / 0}), {}, "no finite numbers"),
        (lambda t: t.update({KEY: t[KEY].int()}), {}, "is torch.int32, none of float16"),
        (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), {}, "is torch.float8_e4m3fn, none of float16"),
        (lambda t: t.update({KEY: torch.ones(2, 15)}), {}, r"has shape \[2, 15\], wanted rows of 16"),
        (lambda t: t.update({KEY.replace("embed_tokens", "norm"): t.pop(KEY)}), {}, "no rows of tokens"),
        (lambda t: t.update({KEY.replace("embed_tokens", "tokens"): t.pop(KEY)}), {}, "no module model.tokens"),
    ],
)
def test_files_that_are_wrong(tmp_path, change, config, match):
    trained(llama, [3, 9], tmp_path / "adapter")
    wrong(tmp_path / "adapter", change, **config)
    model = llama()
    before = answer(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        lowrank.load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(caught.value) and torch.equal(answer(model), before)


@pytest.mark.parametrize("shard", ["50GB", "3KB"])
def test_new_words_make_the_table_of_a_checkpoint_longer(tmp_path, shard):
    def longer():
        model = tied()
        model.resize_token_embeddings(35)
        return model

    model = trained(longer, [34, 5, 33, 32], tmp_path / "adapter")
    base = save_base(tied(), tmp_path / "base", shard=shard)
    lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    merged = type(model).from_pretrained(tmp_path / "out")
    wanted = lowrank.merge_and_unload(model)
    assert_same_bits(dict(merged.state_dict()), dict(wanted.state_dict()))
    assert merged.config.vocab_size == 35 and merged.lm_head.weight is merged.model.embed_tokens.weight
    half = lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    assert half.replaced == 1 and tensors_of(tmp_path / "half")["model.embed_tokens.weight"].shape == (35, 16)


@pytest.mark.parametrize(
    "make, rows, match",
    [
        (tied, [34, 32], "not every new one up to 34 is an adapter's"),
        (llama, [33, 32], "lm_head.weight would have another length"),
        (llama, {"embed_tokens": [33, 32], "lm_head": [32]}, "would have another length"),
    ],
)
def test_new_words_that_are_not_whole_are_refused(tmp_path, make, rows, match):
    def longer():
        model = make()
        model.resize_token_embeddings(35)
        return model

    trained(longer, rows, tmp_path / "adapter")
    base = save_base(make(), tmp_path / "base")
    with pytest.raises(MergeError, match=match):
        lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_words_of_table_and_head_make_both_longer(tmp_path):
    def longer():
        model = llama()
        model.resize_token_embeddings(34)
        return model

    model = trained(longer, {"embed_tokens": [33, 32], "lm_head": [32, 33]}, tmp_path / "adapter")
    base = save_base(llama(), tmp_path / "base")
    lowrank.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    merged = type(model).from_pretrained(tmp_path / "out")
    assert_same_bits(dict(merged.state_dict()), dict(lowrank.merge_and_unload(model).state_dict()))
