"""What a user may ask of `estimate`: the settings of a training that memory and time depend on."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lowrank.train.settings import AdapterSettings, HeldSettings


class StepShape(HeldSettings):
    """How large a step is, in which numbers, on which machine."""

    max_length: int | None = Field(
        None, ge=2, description="Tokens in each row; 512, or what the model holds, where not given"
    )
    batch_size: int = Field(8, ge=1, description="Rows in one optimiser step")
    micro_batch: int | None = Field(None, ge=1, description="Rows in one forward pass; all of them where not given")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice: slower, much less memory")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit holds its moments in 8 bits")
    gpu: str | None = Field(None, description="A GPU by name, as in A100-80GB or RTX-4090; this machine if not given")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch, {self.micro_batch}, cannot be more than batch_size, {self.batch_size}")
        if self.gpu is not None and self.device is not None:
            raise ValueError("gpu names a machine that need not be here, and device one that is: give one of them")
        return self


class EstimateSettings(AdapterSettings, StepShape):
    """Everything `lowrank.study.estimate.estimate` needs."""

    model: str = Field(description='A model: its folder, its name on the Hub (org/name), or "nano"')
    full: bool = Field(False, description="Every weight is trained instead")
