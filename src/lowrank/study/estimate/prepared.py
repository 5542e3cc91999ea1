"""The model of an estimate: without numbers, held and adapted as a training would have it, and what of it stands."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.hub import JSON
from lowrank.injection.apply import inject
from lowrank.study.empty import empty_model
from lowrank.study.estimate.held import hold
from lowrank.study.estimate.parted import WHOLE, Parts, parts_of
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adamw import bytes_of
from lowrank.train.adapting import lora_config
from lowrank.train.config_file import check
from lowrank.train.dealt_out import whole_of
from lowrank.train.models import LONGEST, checkpoint_activations, find_model, load_tokenizer
from lowrank.train.settings import AdapterSettings, TrainSettings
from lowrank.train.token_rows import token_rows

STARTS = ("pissa", "olora")  # whose start factors are kept beside the factors


@dataclass(frozen=True, slots=True)
class Prepared:
    """model: on the meta device; length: tokens of a row; parameters: how many numbers the base has; parts: of it, in
    `processes`.

    Bytes of one process: weights, factors and optimiser (masters in float32 of narrower tensors included) stand all the
    time; gradients and masters' gradients when the model is updated.
    """

    model: nn.Module
    length: int
    parameters: int
    parts: Parts
    processes: int
    weights: int
    factors: int
    optimiser: int
    gradients: int
    masters: int

    @property
    def trained(self) -> list[nn.Parameter]:
        """What requires gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def standing(self) -> int:
        """Bytes that are there from step to step."""
        return self.weights + self.factors + self.optimiser

    @property
    def updating(self) -> int:
        """Bytes beside them when the activations are gone; several processes add gradients up in one flat tensor."""
        flat = self.gradients if self.processes > 1 else 0
        return self.gradients + max(flat, self.masters)


def prepared(settings: EstimateSettings, dtype: torch.dtype) -> Prepared:
    """From the config alone. Raises ConfigError for what cannot be meant."""
    plain_attention = "eager" if settings.attention == "eager" else None  # all others hold what is kept in pieces
    base = find_model(settings.model, JSON)
    model = empty_model(base, dtype, plain_attention)
    length = _length(model, settings)
    parameters = sum(p.numel() for p in model.parameters())
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ConfigError(f"model {settings.model} comes quantised: give the model it was made from, and --quantise")
    if settings.quantise is not None:
        hold(model, settings, settings.modules_to_save, dtype)
    named = {name: getattr(settings, name) for name in (*AdapterSettings.model_fields, "quantise", "double")}
    asked = None if settings.full else check(TrainSettings, named | {"model": settings.model, "data": "", "out": ""})
    parts = parts_of(model, whole_of(asked, "text"), settings.processes) if settings.shard and asked else WHOLE
    plain = _bytes(model)
    _adapt(model, base, settings, asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = 4 * sum(p.numel() for p in trained if p.dtype != torch.float32)
    return Prepared(
        model=model,
        length=length,
        parameters=parameters,
        parts=parts,
        processes=settings.processes,
        weights=plain - parts.away,
        factors=(_bytes(model) - plain) * (2 if settings.init.startswith(STARTS) else 1),
        optimiser=bytes_of(settings.optimizer, trained) + masters,
        gradients=sum(p.nbytes for p in trained),
        masters=masters,
    )


def _length(model: nn.Module, settings: EstimateSettings) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    if settings.max_length is not None and positions is not None and settings.max_length > positions:
        raise ConfigError(f"--max-length {settings.max_length}: this model holds {positions} tokens")
    return settings.max_length or min(LONGEST, positions or LONGEST)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _adapt(model: nn.Module, base: Path, settings: EstimateSettings, asked: TrainSettings | None) -> None:
    """In place: what is trained, as `lowrank train` would choose it. asked: of its adapter; None trains all."""
    model.train()
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if asked is None:
        model.requires_grad_(True)
        return
    # other starts are made of numbers, and dropout draws some: its masks are one bit an entry, or none on a GPU
    config = replace(lora_config(asked, ()), init_lora_weights="gaussian", lora_dropout=0.0)
    if words := settings.trainable_tokens:
        config = replace(config, trainable_token_indices=token_rows(model, load_tokenizer(base), words))
    inject(model, config)
