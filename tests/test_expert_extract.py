"""extract of a tuned mixture of experts: every expert's change from checkpoints that keep the experts one by one."""

from pathlib import Path

import pytest
import torch

import lowrank
from expert_models import adapted, answer, mixture


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "nemotron_h"])
def test_what_is_extracted_answers_as_the_tuned_model_did(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "base")
    adapted(model, r=2)
    wanted = answer(model).detach()
    lowrank.merge_and_unload(model)
    model.save_pretrained(tmp_path / "tuned")
    lowrank.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    other = mixture(family)
    before = answer(other)
    lowrank.load_adapter(other, tmp_path / "out")
    torch.testing.assert_close(answer(other), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, wanted, rtol=1e-2, atol=1e-2)


def test_stacks_that_changed_are_named_where_files_hold_them_whole(tmp_path: Path) -> None:
    model = mixture("granitemoe")
    model.save_pretrained(tmp_path / "base")
    lowrank.merge_and_unload(adapted(model, r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "tuned")
    report = lowrank.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert "input_linear" in str(report)
