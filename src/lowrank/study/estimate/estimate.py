"""What a training will take: bytes by kind, the largest micro-batch that fits, and the time of a step."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.hub import JSON
from lowrank.injection.apply import inject
from lowrank.injection.quantise import quantisable
from lowrank.stages import stage
from lowrank.study.empty import empty_model
from lowrank.study.estimate.machines import Machine, machine_of, named_gpu, rates_of
from lowrank.study.estimate.rehearse import Rehearsed, rehearse
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adamw import bytes_of
from lowrank.train.adapting import lora_config
from lowrank.train.attention import attention_options
from lowrank.train.config_file import check
from lowrank.train.models import LONGEST, checkpoint_activations, device_of, dtype_of, find_model
from lowrank.train.settings import AdapterSettings, TrainSettings

STARTS = ("pissa", "olora")  # whose start factors are kept beside the factors
MOST_ROWS = 4096  # in a micro-batch: more is no gain
MOST_TOKENS = 1 << 24  # of a pass: beyond any machine, and each part of them takes time here too
TRIES = 5
PASSES = 7  # of an AdamW step over its tensors: four read, three written


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: weights, factors, gradients, optimiser stand all the time; activations are kept for the backward pass.

    logits: what the loss has beyond them; height: of all together at the most, in the pass `height_in`; needed: with
    the runtime's own. parameters, trained: how many numbers. largest: rows of the largest micro-batch that fits, 0
    where none does. seconds: of a step, about.
    """

    model: str
    machine: Machine
    dtype: str
    parameters: int
    trained: int
    rows: int
    micro_batch: int
    length: int
    weights: int
    factors: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    height: int
    height_in: str
    needed: int
    largest: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the machine holds it."""
        return self.needed <= self.machine.memory

    def as_json(self) -> dict[str, Any]:
        """Everything in JSON's types."""
        return asdict(self) | {"fits": self.fits, "tokens_per_second": self.rows * self.length / self.seconds}


def estimate(settings: EstimateSettings) -> Estimate:
    """From the config alone. Raises ConfigError for what cannot be meant, and for models that cannot be rehearsed."""
    gpu = None if settings.gpu is None else named_gpu(settings.gpu)
    device = torch.device("cuda") if gpu else device_of(settings)
    dtype = dtype_of(settings, device)
    machine = machine_of(gpu, device)
    stage("building the model without weights")
    if gpu is None:
        attention_options(settings, device, dtype)
    plain_attention = "eager" if settings.attention == "eager" else None  # all others hold what is kept in pieces
    model = empty_model(find_model(settings.model, JSON), dtype, plain_attention)
    length = _length(model, settings)
    parameters = sum(p.numel() for p in model.parameters())
    weights, copied = _weights(model, settings, dtype)
    plain = _bytes(model)
    _adapt(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers, gradients = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    factors = (_bytes(model) - plain) * (2 if settings.init.startswith(STARTS) else 1)
    masters = 4 * sum(p.numel() for p in trained if p.dtype != torch.float32)
    optimiser = bytes_of(settings.optimizer, trained) + masters
    micro = min(settings.micro_batch or settings.batch_size, settings.batch_size)
    parts = math.ceil(settings.batch_size / micro)
    if micro * length > MOST_TOKENS:
        raise ConfigError(
            f"{micro:,} rows of {length:,} tokens in one pass are more than any machine holds: give fewer by "
            "--micro-batch"
        )
    rates = rates_of(gpu, device, dtype)
    standing = weights + factors + optimiser
    updating = gradients + masters  # when the activations are gone: gradients, and those of the masters

    def height(found: Rehearsed) -> int:
        beside = gradients if parts > 1 else 0  # of earlier micro-batches; else they are in what was counted
        return standing + max(found.height + copied + beside, updating)

    def rehearsed(rows: int) -> Rehearsed:
        stage(f"rehearsing {rows} × {length} tokens")
        return rehearse(model, rows, length, parts > 1, rates, machine.kind)

    found = rehearsed(micro)
    rest = machine.memory - machine.room
    return Estimate(
        model=settings.model,
        machine=machine,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trained=numbers,
        rows=settings.batch_size,
        micro_batch=micro,
        length=length,
        weights=weights,
        factors=factors,
        gradients=gradients,
        optimiser=optimiser,
        activations=found.kept + copied,
        logits=found.logits,
        height=height(found),
        height_in=found.height_in,
        needed=height(found) + rest,
        largest=largest_rows(lambda rows: height(rehearsed(rows)), machine.room),
        seconds=parts * found.seconds + PASSES * 4 * numbers / rates.bandwidth,
    )


def largest_rows(height: Callable[[int], int], room: int) -> int:
    """The most rows whose height fits into `room`, 0 where one does not.

    Heights grow by nearly as much with each row, so a few are looked at and a line is drawn through them.
    """
    one, two = height(1), height(2)
    if one > room:
        return 0
    if two > room:
        return 1
    fits, too_many, at, reached = 2, MOST_ROWS + 1, 2, two
    for _ in range(TRIES):
        if too_many - fits == 1:
            break
        line = 1 + int((room - one) * (at - 1) / max(1, reached - one))
        at = max(fits + 1, min(too_many - 1, line))
        reached = height(at)
        fits, too_many = (at, too_many) if reached <= room else (fits, at)
    return fits


def _length(model: Any, settings: EstimateSettings) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    if settings.max_length is not None and positions is not None and settings.max_length > positions:
        raise ConfigError(f"--max-length {settings.max_length}: this model holds {positions} tokens")
    return settings.max_length or min(LONGEST, positions or LONGEST)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _weights(model: nn.Module, settings: EstimateSettings, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of the base as it is held, bytes of the largest matrix that is read from a stored form)."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ConfigError(f"model {settings.model} comes quantised: give the model it was made from, and --quantise")
    if settings.quantise is None:
        return _bytes(model), 0
    if settings.full:
        raise ConfigError("full trains every weight, and quantised ones are frozen: leave quantise out")
    held = quantisable(model, settings.modules_to_save)
    numbers = [layer.weight.numel() for layer in held.values()]
    scales = sum(4 * layer.out_features for layer in held.values())
    if settings.quantise == "int8":
        stored = sum(numbers) + scales
    else:  # a scale for 64 numbers: four bytes, or quantised one, with four bytes for 256 of them
        each = 0.5 + (1 / 64 + 4 / (64 * 256) if settings.double else 4 / 64)
        stored = round(each * sum(numbers))
    return _bytes(model) - dtype.itemsize * sum(numbers) + stored, dtype.itemsize * max(numbers, default=0)


def _adapt(model: nn.Module, settings: EstimateSettings) -> None:
    """In place: what is trained, as `lowrank train` would choose it."""
    model.train()
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.full:
        model.requires_grad_(True)
        return
    named = {name: getattr(settings, name) for name in (*AdapterSettings.model_fields, "quantise", "double")}
    asked = check(TrainSettings, named | {"model": settings.model, "data": "", "out": ""})
    # other starts are made of numbers, and dropout draws some: its masks are one bit an entry, or none on a GPU
    inject(model, replace(lora_config(asked, ()), init_lora_weights="gaussian", lora_dropout=0.0))
