"""An adapter trained over bits that `--quantise` made, merged on disk into the float base: as training saw it."""

import builtins
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
import models
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankWarning, MergeError
from lowrank.injection.adapters import lora_layers
from lowrank.merge.disk import MergeReport
from lowrank.train.held import load_held
from lowrank.train.loftq import save_moved, start
from lowrank.train.settings import EvalSettings

pytest.importorskip("bitsandbytes")
SCHEMES = {"nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4": ("fp4", False), "int8": ("int8", False)}
TARGETS = ("q_proj", "down_proj")  # all other layers are quantised too, and are not adapted


def trained(root: Path, scheme: str, dtype: torch.dtype, rounds: int = 0, name: str = "adapter", **chosen: Any) -> Any:
    """The model as a training over `root/base` leaves it; its adapter is saved to `root/name`."""
    if not (root / "base").exists():
        models.causal("llama", hidden_size=64, intermediate_size=96).to(torch.bfloat16).save_pretrained(root / "base")
    kind, double = SCHEMES[scheme]
    asked = EvalSettings(model="m", data="d", quantise=kind, double=double)
    model = load_held(root / "base", asked, dtype, torch.device("cpu"), [])
    lowrank.inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | chosen)))
    if rounds:
        start(model, root / "base", rounds)
    for _, layer in lora_layers(model):
        for tensor in layer.factors("default").trainable():
            tensor.data += 0.1 * torch.randn_like(tensor)
    lowrank.save_adapter(model, root / name)
    save_moved(model, root / name)
    return model


def merged_alike(root: Path, model: Any, dtype: torch.dtype = torch.bfloat16) -> MergeReport:
    """The report of the merge on disk, which has the bits of that in memory, at `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)
        report = lowrank.merge_checkpoint(
            root / "base", root / "adapter", root / "out", verify="full", dtype=str(dtype).removeprefix("torch.")
        )
    lowrank.merge_and_unload(model)
    got, wanted = load_file(root / "out" / "model.safetensors"), model.state_dict()
    assert got.keys() <= wanted.keys() and wanted.keys() - got.keys() <= {"lm_head.weight"}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())
    return report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float_base_is_quantised_again_and_has_the_bits_of_the_merge_in_memory(tmp_path, scheme, dtype):
    model = trained(tmp_path, scheme, dtype)
    report = merged_alike(tmp_path, model, dtype)
    assert report.merged == 4 and report.notes[0].startswith("14 weights were quantised again as in the training")
    assert not any("differs" in note for note in report.notes)


@pytest.mark.parametrize("scheme", ["nf4 double", "int8"])
def test_a_base_that_rounds_of_loftq_moved_is_made_again(tmp_path, scheme):
    model = trained(tmp_path, scheme, torch.float32, rounds=3)
    assert "moved by LoftQ" in merged_alike(tmp_path, model, torch.float32).notes[0]
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "o", onto="original")
    assert len(report.apart) == 4 and all(one.answers > 0 for one in report.apart.values())
    tensors = load_file(tmp_path / "adapter" / "loftq.safetensors")
    save_file({name: t[:, :-1].clone() for name, t in tensors.items()}, tmp_path / "adapter" / "loftq.safetensors")
    with pytest.raises(CheckpointError, match=r"loftq.safetensors does not fit .*: copy the adapter again"):
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_dora_reads_the_norms_of_what_was_trained(tmp_path):
    merged_alike(tmp_path, trained(tmp_path, "nf4", torch.float32, use_dora=True), torch.float32)


def test_conv1d_is_the_transposed_of_what_was_quantised(tmp_path):
    """In memory GPT-2's quantised layers hold W0, (d, k), and sum in another order than the files' W0ᵀ is summed in."""
    models.causal("gpt2", n_embd=64).save_pretrained(tmp_path / "base")
    model = trained(tmp_path, "nf4", torch.float32, target_modules=["c_attn", "c_fc"])
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    assert report.notes[0].startswith("8 weights were quantised again")
    lowrank.merge_and_unload(model)
    wanted = model.state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_several_adapters_of_one_form_go_onto_it_and_of_two_onto_the_base(tmp_path):
    """W0 + Σ ΔW is what was trained for neither where their forms differ, so the base stays and a note says so."""
    for name, scheme in (("adapter", "nf4"), ("other", "nf4"), ("eight", "int8")):
        trained(tmp_path, scheme, torch.float32, name=name)
    both = [tmp_path / "adapter", (tmp_path / "other", 0.5)]
    report = lowrank.merge_checkpoint(tmp_path / "base", both, tmp_path / "both")
    assert "14 weights were quantised again" in report.notes[0]
    report = lowrank.merge_checkpoint(tmp_path / "base", [both[0], tmp_path / "eight"], tmp_path / "mixed")
    notes = [note for note in report.notes if "from which W0 here differs by" in note]
    assert len(notes) == 2 and not any("quantised again" in note for note in report.notes)


def test_another_base_is_left_as_it_is_and_said(tmp_path):
    trained(tmp_path, "nf4", torch.float32)
    tensors = {name: 1.3 * tensor for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any("from which W0 here differs by 3" in note for note in report.notes)
    assert not any("quantised again" in note for note in report.notes)


def test_without_bitsandbytes_it_says_what_to_install(tmp_path, monkeypatch):
    trained(tmp_path, "nf4", torch.float32)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MergeError, match=r"takes bitsandbytes to make again: pip install 'lowrank\[quant\]', or merge"):
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
