"""What a user may ask of `estimate`: the settings of a training that memory and time depend on."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from lowrank.train.settings import AdapterSettings, HeldSettings


class StepShape(HeldSettings):
    """How large a step is, in which numbers, in how many processes, on which machine."""

    max_length: int | None = Field(
        None, ge=2, description="Tokens in each row; 512, or what the model holds, where not given"
    )
    batch_size: int = Field(8, ge=1, description="Rows in one optimiser step")
    micro_batch: int | None = Field(None, ge=1, description="Rows in one forward pass; all of them where not given")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice: slower, much less memory")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit holds its moments in 8 bits")
    preferences: bool = Field(
        False, description="Rows are pairs of a chosen and a rejected answer (DPO): two texts a row, and the reference"
    )
    processes: int = Field(1, ge=1, description="Of a training in several processes: what one of them takes")
    shard: bool = Field(False, description="Each process holds a part of the frozen weights, gathered in use (FSDP2)")
    gpu: str | None = Field(None, description="A GPU by name, as in A100-80GB or RTX-4090; this machine if not given")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch, {self.micro_batch}, cannot be more than batch_size, {self.batch_size}")
        if self.gpu is not None and self.device is not None:
            raise ValueError("gpu names a machine that need not be here, and device one that is: give one of them")
        if self.shard and self.processes == 1:
            raise ValueError("shard gives each of several processes a part of the base: say how many, --processes N")
        if self.shard and self.quantise:
            raise ValueError("shard deals out rows of weights, which quantised ones have not: leave one of both out")
        return self


class EstimateSettings(AdapterSettings, StepShape):
    """Everything `lowrank.study.estimate.estimate` needs."""

    model: str = Field(description='A model: its folder, its name on the Hub (org/name), or "nano"')
    full: bool = Field(False, description="Every weight is trained instead")

    @model_validator(mode="after")
    def _has_frozen_weights(self) -> Self:
        if self.full and (self.shard or self.quantise):
            raise ValueError("full trains every weight, and shard and quantise are for frozen ones: leave one out")
        return self

    @property
    def rows_here(self) -> int:
        """Rows of a step in the process that has most of them."""
        return math.ceil(self.batch_size / self.processes)

    @property
    def rows_in_a_pass(self) -> int:
        """Of those that this process has."""
        return min(self.micro_batch or self.rows_here, self.rows_here)
