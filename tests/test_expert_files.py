"""Adapters of stacked experts as files: PEFT answers as we do with ours, we as it does with its own."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from expert_models import FAMILIES, adapted, answer, dense_answer, mixture
from lowrank import LoraConfig
from lowrank.analysis.inspection import inspect_adapter
from lowrank.injection.adapters import lora_layers

READ_BY_PEFT = [family for family in FAMILIES if family != "nemotron_h"]


def peft_model(family: str, folder: Path) -> nn.Module:
    """Real PEFT's reading of an adapter over the same base."""
    import peft

    return peft.PeftModel.from_pretrained(mixture(family, "eager"), str(folder)).eval()


@pytest.mark.parametrize("family", READ_BY_PEFT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": ["experts.down_proj"]},
        {"rank_pattern": {r"1\..*\.down_proj": 2}, "alpha_pattern": {"down_proj": 7}, "target_modules": ["lm_head"]},
    ],
    ids=["both", "one", "patterns"],
)
def test_peft_answers_with_our_files_as_we_do(family: str, options: dict, tmp_path: Path) -> None:
    model = adapted(mixture(family, "eager"), **options)
    lowrank.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = answer(peft_model(family, tmp_path))
    torch.testing.assert_close(theirs, answer(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", READ_BY_PEFT)
def test_we_answer_with_pefts_files_as_it_does(family: str, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False,
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.get_peft_model(mixture(family, "eager"), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = mixture(family)
    report = lowrank.load_adapter(model, tmp_path)
    assert sum(path.endswith(("gate_up_proj", "down_proj")) for path in report.modules) >= 2
    torch.testing.assert_close(answer(model), answer(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", [True, "pissa"])
def test_load_after_save_is_the_identity(family: str, init: object, tmp_path: Path) -> None:
    model = mixture(family)
    lowrank.inject(model, LoraConfig(target_modules="all-linear", r=2, lora_alpha=5, init_lora_weights=init))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for factor in layer.factors("default").trainable():
                factor += 0.1 * torch.randn_like(factor)
    lowrank.save_adapter(model, tmp_path / "one")
    other = mixture(family)
    lowrank.load_adapter(other, tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(answer(other), answer(model))
    for (path, layer), (same, loaded) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert path == same
        for one, two in zip(layer.factors("default").parameters(), loaded.factors("default").parameters(), strict=True):
            assert torch.equal(one, two)
    lowrank.save_adapter(other, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "lowrank.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def single_experts(model: nn.Module, folder: Path, names: dict[str, tuple[str, int, int]], skip: int = -1) -> None:
    """An adapter of experts as Linear modules, of what `adapted` put into the model's stacks.

    names: {leaf: (stack, row block, of how many)}; skip: an expert that it leaves out.
    """
    import json

    from safetensors.torch import save_file

    tensors = {}
    for path, stack in lora_layers(model):
        factors = stack.factors("default")
        for leaf, (name, block, count) in names.items():
            for expert in range(factors.a.shape[0]):
                if path.endswith(name) and expert != skip:
                    own = block if factors.parts else 0
                    a, b = factors.a[expert].detach().chunk(len(factors.parts) or 1)[own], factors.b[expert].detach()
                    b = b.chunk(count)[block]
                    stem = f"base_model.model.{path.rpartition('.')[0].replace('.mlp.', '.MOE.')}.{expert}.{leaf}"
                    tensors[f"{stem}.lora_A.weight"] = a.clone()
                    tensors[f"{stem}.lora_B.weight"] = b.clone()
    folder.mkdir()
    moe = ".block_sparse_moe." if "w1" in names else ".mlp."
    save_file(
        {key.replace(".MOE.", moe): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


OLD = {
    "mixtral": {"w1": ("gate_up_proj", 0, 2), "w3": ("gate_up_proj", 1, 2), "w2": ("down_proj", 0, 1)},
    "qwen3_moe": {
        "gate_proj": ("gate_up_proj", 0, 2),
        "up_proj": ("gate_up_proj", 1, 2),
        "down_proj": ("down_proj", 0, 1),
    },
}


@pytest.mark.parametrize("apart", [False, True], ids=["one A of gate and up", "an A of each"])
@pytest.mark.parametrize("family", OLD)
def test_adapters_of_experts_as_modules_go_into_the_stacks_as_peft_puts_them(
    family: str, apart: bool, tmp_path: Path
) -> None:
    names = {"target_parameters": ["gate_up_proj[gate,up]", "down_proj"]} if apart else {}
    model = adapted(mixture(family, "eager"), **names)
    single_experts(model, tmp_path / "old", OLD[family])
    other = mixture(family)
    report = lowrank.load_adapter(other, tmp_path / "old")
    assert {layer.factors("default").rank for _, layer in lora_layers(other)} == {3} and not report.notes
    assert [len(layer.factors("default").parts) for _, layer in lora_layers(other)] == [2, 0, 2, 0]
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(peft_model(family, tmp_path / "old")), answer(model), rtol=1e-4, atol=1e-5)
    lowrank.save_adapter(other, tmp_path / "new")
    torch.testing.assert_close(answer(peft_model(family, tmp_path / "new")), answer(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [{"w1": 3}, {"w3": 3}, {"w1": 3, "w3": 2}], ids=["gate", "up", "two ranks"])
def test_gate_or_up_alone_and_of_other_ranks(left: dict[str, int], tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    model = adapted(mixture("mixtral", "eager"), target_parameters=["gate_up_proj[gate,up]"])
    single_experts(model, tmp_path / "old", {name: OLD["mixtral"][name] for name in left})
    file, config = tmp_path / "old" / "adapter_model.safetensors", tmp_path / "old" / "adapter_config.json"
    cut = {
        key: (t[: left[key.split(".")[-3]]] if "lora_A" in key else t[:, : left[key.split(".")[-3]]]).contiguous()
        for key, t in load_file(file).items()
    }
    save_file(cut, file)
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"rank_pattern": left, "alpha_pattern": {"w3": 10 / 3}})
    )
    scales = {"w1": 5 / 3, "w3": 10 / 3 / left.get("w3", 1)}
    other = mixture("mixtral")
    lowrank.load_adapter(other, tmp_path / "old")
    assert {layer.factors("default").rank for _, layer in lora_layers(other)} == {sum(set(left.values()))}
    weights = {}
    for path, stack in lora_layers(model):
        factors, blocks = stack.factors("default"), stack.base_weight.detach().clone().chunk(2, 1)
        for number, (name, block) in enumerate(zip(("w1", "w3"), blocks, strict=True)):
            a, b = factors.a.chunk(2, 1)[number].detach(), factors.b.chunk(2, 1)[number].detach()
            rank = left.get(name, 0)
            block += scales[name] * b[..., :rank] @ a[:, :rank]
        weights[path] = torch.cat(blocks, 1)
    torch.testing.assert_close(answer(other), dense_answer(model, weights), rtol=1e-4, atol=1e-5)


def test_an_expert_that_the_file_leaves_out_is_the_base(tmp_path: Path) -> None:
    model = adapted(mixture("mixtral", "eager"))
    single_experts(model, tmp_path / "old", OLD["mixtral"], skip=2)
    other = mixture("mixtral")
    lowrank.load_adapter(other, tmp_path / "old")
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.factors("default").b[2] = 0
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)


def test_files_that_fit_no_experts_are_refused_and_change_nothing(tmp_path: Path) -> None:
    import json

    lowrank.save_adapter(adapted(mixture("mixtral")), tmp_path / "four")
    single_experts(adapted(mixture("mixtral")), tmp_path / "single", OLD["mixtral"])
    few = mixture("mixtral", num_local_experts=3)
    before = answer(few)
    with pytest.raises(lowrank.LowrankError, match=r"lora_A.weight has shape \[12, 32\], wanted \[9, 32\]"):
        lowrank.load_adapter(few, tmp_path / "four")
    with pytest.raises(lowrank.LowrankError, match=r"experts.3.w. is expert 3, and there are 3"):
        lowrank.load_adapter(few, tmp_path / "single")
    config = json.loads((tmp_path / "four" / "adapter_config.json").read_text())
    for names in (["experts.down_proj"], []):
        (tmp_path / "four" / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": names}))
        with pytest.raises(lowrank.LowrankError, match=r"which is which cannot be told|no module .*base_layer"):
            lowrank.load_adapter(few, tmp_path / "four")
    assert torch.equal(answer(few), before)
    assert not any("lora" in name for name, _ in few.named_modules())


def test_single_experts_that_are_no_experts_are_refused(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    single_experts(adapted(mixture("mixtral")), tmp_path / "single", OLD["mixtral"])
    weights, config = tmp_path / "single" / "adapter_model.safetensors", tmp_path / "single" / "adapter_config.json"
    good, said = load_file(weights), json.loads(config.read_text())
    key = next(key for key in good if key.endswith("experts.1.w2.lora_B.weight"))
    model = mixture("mixtral")
    wrong = {
        r"w2 has A \[3, 48\] and B \[31, 3\], and an expert of .*down_proj at rank 3 wants \[3, 48\] and \[32, 3\]": (
            good | {key: good[key][1:].clone()}, said
        ),
        r"w2 is torch.int64, none of float16": (good | {key: good[key].long()}, said),
        r"w2 has lora_A, and an expert has A and B": ({k: t for k, t in good.items() if k != key}, said),
        r"at rank 1000000000 wants": (good, said | {"r": 10**9}),
        r"were trained from pissa on a changed base": (good, said | {"init_lora_weights": "pissa"}),
    }  # fmt: skip
    for message, (tensors, fields) in wrong.items():
        save_file(tensors, weights)
        config.write_text(json.dumps(fields))
        with pytest.raises(lowrank.LowrankError, match=message):
            lowrank.load_adapter(model, tmp_path / "single")
    assert not any("lora" in name for name, _ in model.named_modules())


READERS = {
    "load": lambda folder: lowrank.load_adapter(mixture("mixtral"), folder / "adapter"),
    "merge into single experts": lambda folder: lowrank.merge_checkpoint(
        folder / "base", folder / "adapter", folder / "out"
    ),
    "merge into whole stacks": lambda folder: lowrank.merge_checkpoint(
        folder / "whole", folder / "adapter", folder / "out"
    ),
    "resize": lambda folder: lowrank.resize_adapter(folder / "adapter", folder / "out", rank=1),
    "inspect": lambda folder: inspect_adapter(folder / "adapter"),
}


def test_biases_of_b_are_refused_by_every_reader_and_never_left_out(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole", save_original_format=False)
    lowrank.save_adapter(adapted(model), tmp_path / "adapter")
    weights, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    tensors = load_file(weights)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key.replace("lora_B.weight", "lora_B.bias")] = torch.ones(len(tensors[key]))
    save_file(tensors, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_bias": True}))
    for name, read in READERS.items():
        message = r"experts\.\w+ has lora_B.bias, .*: train it without lora_bias, "
        with pytest.raises(lowrank.LowrankError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "out").exists()


def test_trained_biases_of_experts_are_where_peft_has_them(tmp_path: Path) -> None:
    model = adapted(mixture("gpt_oss", "eager"), bias="all")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "bias" in name and tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor)
    lowrank.save_adapter(model, tmp_path)
    other = mixture("gpt_oss", "eager")
    lowrank.load_adapter(other, tmp_path)
    assert torch.equal(answer(other), answer(model))
    torch.testing.assert_close(answer(peft_model("gpt_oss", tmp_path)), answer(model), rtol=1e-4, atol=1e-5)
