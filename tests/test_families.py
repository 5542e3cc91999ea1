"""Adapted = merged, in train() and eval(), and gradients for every factor, over the families that transformers has.

`READERS` are quick enough for every run; `-m slow` takes every family that shrinks by itself (about 200 of them).
"""

import re

import pytest
import torch
from torch import nn

import families
import lowrank
from lowrank import LoraConfig
from lowrank.injection.dead import without_gradient
from lowrank.layers.kinds import KINDS, refusal

pytestmark = pytest.mark.filterwarnings("ignore")
# What reads weights, or has layers of its own: read `layers.reading`.
READERS = (
    "mamba",
    "jamba",
    "qwen3_next",
    "wavlm",
    "wav2vec2",
    "whisper",
    "clip",
    "siglip",
    "prophetnet",
    "bart",
    "falcon",
)
WRITES = {"rwkv"}  # its forward divides its weights in place
CHANGES_ITSELF = ("mobilenet", "resnet", "regnet", "efficientnet", "levit", "poolformer", "sam3_lite")  # running means
WITHOUT_LINEAR = {"mobilenet_v2"}  # but its head, which "all-linear" leaves out


def _every_family() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(set(CONFIG_MAPPING_NAMES) - set(READERS) - WRITES)


def _adaptable(model: nn.Module) -> str:
    """Every module of a kind that can be adapted, but those that only stand for others; whole paths, as one regex."""
    return "|".join(
        re.escape(path)
        for path, module in model.named_modules()
        if isinstance(module, tuple(KINDS)) and refusal(module) is None and not path.endswith("shared")
    )


def check(model_type: str, targets: str) -> None:
    model = families.build(model_type)
    chosen = _adaptable(model) if targets == "every" else targets
    lowrank.inject(model, LoraConfig(r=1, lora_alpha=2, target_modules=chosen, init_lora_weights="random"))
    for training in (False, True):
        if training and model_type.startswith(CHANGES_ITSELF):
            continue
        model.train(training)
        model.zero_grad()
        adapted = families.answer(model)
        if adapted.requires_grad:  # else nothing adapted lies on the way to this answer, and merging may not change it
            adapted.square().sum().backward()
        dead = without_gradient(model)
        with torch.no_grad(), lowrank.merged(model):
            merged = families.answer(model)
        error = float((adapted.detach() - merged).norm() / merged.norm().clamp_min(1e-9))
        assert error < 1e-3, f"{model_type}, {targets}, train({training}): {error}"
        if model_type in READERS:
            assert not [path for path in dead if not _never_used(path)], f"{model_type}: {dead}"


def _never_used(path: str) -> bool:
    """Cross attention of a decoder alone, and what only other heads of the family call."""
    return any(
        part in path
        for part in ("encoder_attn", "cross_attn", "pooler", "head.", "embed_positions", "prophetnet.word_emb")
    )


@pytest.mark.parametrize("targets", ["all-linear", "every"])
@pytest.mark.parametrize("model_type", READERS)
def test_families_that_read_weights(model_type: str, targets: str) -> None:
    check(model_type, targets)


@pytest.mark.slow
def test_every_family_that_shrinks() -> None:
    ran, faults = 0, []
    for model_type in _every_family():
        try:
            with torch.no_grad():
                model = families.build(model_type)
                same = torch.equal(families.answer(model), families.answer(model))
        except Exception:  # its config is not to be had small by these rules: nothing is told about it
            continue
        if not same or sum(p.numel() for p in model.parameters()) > 3e6:
            continue
        for targets in ("every",) if model_type in WITHOUT_LINEAR else ("all-linear", "every"):
            try:
                check(model_type, targets)
            except (AssertionError, lowrank.errors.LowrankError, RuntimeError, TypeError) as fault:
                faults.append(f"{model_type}: {fault}")
        ran += 1
    assert ran > 150 and not faults, f"{len(faults)} of {ran}:\n" + "\n".join(faults)
