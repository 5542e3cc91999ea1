"""Adapters of stacked experts as files: PEFT answers as we do with ours, we as it does with its own."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from expert_models import FAMILIES, adapted, answer, mixture
from lowrank import LoraConfig
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
