"""What of a model is trained: the adapter that the settings mean, put into it, or every weight."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank.checkpoint import load_adapter
from lowrank.data.names import read_targets
from lowrank.hub import local_folder
from lowrank.injection.adapters import lora_layers
from lowrank.injection.apply import inject
from lowrank.injection.config import LoraConfig
from lowrank.train.loftq import move_base, rounds_of, start
from lowrank.train.models import checkpoint_activations
from lowrank.train.settings import TargetSettings, TrainSettings
from lowrank.train.task import Loaded
from lowrank.train.token_rows import token_rows


def target_config(settings: TargetSettings) -> LoraConfig:
    """The targets, rank and scale that the settings mean, and nothing of what is trained beside them."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules=read_targets(settings.targets),
        exclude_modules=settings.exclude or None,
        layers_to_transform=settings.layers or None,
        use_rslora=settings.rslora,
    )


def lora_config(settings: TrainSettings, heads: tuple[str, ...]) -> LoraConfig:
    """The adapter the settings mean; a classifier's head is trained in full beside it."""
    return replace(
        target_config(settings),
        target_parameters=read_targets(settings.target_parameters),
        expert_rank=settings.expert_rank,
        lora_dropout=settings.dropout,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        modules_to_save=tuple(dict.fromkeys((*settings.modules_to_save, *heads))),
        bias=settings.bias,
        use_dora=settings.dora,
        init_lora_weights="gaussian" if rounds_of(settings.init) else settings.init,
    )


def adapt(loaded: Loaded, settings: TrainSettings, base: Path) -> str:
    """In place: choose what is trained. base: the model's folder. Returns it in words."""
    model: Any = loaded.model
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.init_from is not None:
        before = local_folder(settings.init_from)
        move_base(model, base, before)
        load_adapter(model, before, trainable=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"on from {settings.init_from}: {trained:,} trained parameters"
    if not settings.full:
        rows = token_rows(model, loaded.tokenizer, settings.trainable_tokens)
        config = replace(lora_config(settings, loaded.heads), trainable_token_indices=rows)
        done = inject(model, config).summary()
        if not (rounds := rounds_of(settings.init)):
            return done
        words = f", {rounds} rounds of LoftQ, which moved the base for this adapter alone" if rounds > 1 else ""
        started = start(model, base, rounds)
        others = sum(1 for _ in lora_layers(model)) - started
        words += f"; {others} others, stacks of experts or not quantised, start from nothing" if others else ""
        return f"{done}; {started} layers start from what quantising took off{words}"
    model.requires_grad_(True)
    return f"every weight: {sum(p.numel() for p in model.parameters()):,} trained parameters"
