"""What a training will take: bytes by kind, the largest micro-batch that fits, and the time of a step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowrank.errors import ConfigError
from lowrank.stages import stage
from lowrank.study.estimate.fitting import largest_rows
from lowrank.study.estimate.machines import Machine, machine_of, named_gpu, pace_of
from lowrank.study.estimate.prepared import prepared
from lowrank.study.estimate.rehearse import Rehearsed, rehearse
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.study.estimate.updating import update_of
from lowrank.train.attention import attention_options
from lowrank.train.models import device_of, dtype_of

MOST_TOKENS = 1 << 24  # of a pass: beyond any machine, and each part of them takes time here too


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process: weights, factors, gradients, optimiser stand all the time; activations are kept for the
    backward pass.

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
    processes: int
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
    made = prepared(settings, dtype)
    micro = settings.rows_in_a_pass
    passes = math.ceil(settings.rows_here / micro)
    if micro * made.length > MOST_TOKENS:
        raise ConfigError(
            f"{micro:,} rows of {made.length:,} tokens in one pass are more than any machine holds: give fewer by "
            "--micro-batch"
        )

    def height(found: Rehearsed) -> int:
        beside = made.gradients if passes > 1 else 0  # of earlier micro-batches; else they are in what was counted
        most = max(made.parts.beginning, *(bytes + gathered(phase) for phase, bytes in found.heights.items()))
        return made.standing + max(most + beside, made.updating)

    def gathered(phase: str) -> int:
        return made.parts.outside if phase == "loss" else made.parts.passing

    def rehearsed(rows: int) -> Rehearsed:
        stage(f"rehearsing {rows} × {made.length} tokens")
        return rehearse(made.model, rows, made.length, passes > 1, machine.kind, settings.preferences)

    found = rehearsed(micro)
    rest = machine.memory - machine.room
    pace = pace_of(gpu, device, dtype)
    return Estimate(
        model=settings.model,
        machine=machine,
        dtype=str(dtype).removeprefix("torch."),
        parameters=made.parameters,
        trained=sum(p.numel() for p in made.trained),
        rows=settings.batch_size,
        processes=settings.processes,
        micro_batch=micro,
        length=made.length,
        weights=made.weights,
        factors=made.factors,
        gradients=made.gradients,
        optimiser=made.optimiser,
        activations=found.kept,
        logits=found.logits,
        height=height(found),
        height_in=max(found.heights, key=lambda phase: found.heights[phase] + gathered(phase)),
        needed=height(found) + rest,
        largest=largest_rows(lambda rows: height(rehearsed(rows)), machine.room),
        seconds=passes * pace(found.done) + update_of(made.trained, settings.optimizer, pace, machine.kind),
    )
