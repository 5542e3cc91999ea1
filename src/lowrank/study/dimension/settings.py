"""What a user may ask of `lowrank dimension`."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lowrank.data.settings import Settings
from lowrank.train.settings import RunSettings, StepSettings


def _numbers(value: object) -> object:
    """ "8,16" as ("8", "16"), and ("8,16", "32") as three."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return tuple(n for part in parts for n in (part.replace(",", " ").split() if isinstance(part, str) else [part]))


class LadderSettings(Settings):
    """Which subspaces are tried, of which weights."""

    over: Literal["all", "targets"] = Field("all", description="Move all weights, or the targets' and the new head's")
    targets: str | tuple[str, ...] | None = Field(
        None, description="With --over targets: modules as `lowrank train` takes them; query and value if not given"
    )
    method: Literal["direct", "said"] = Field(
        "direct", description="θ0 + P·z, or one learned scale per module beside it (structure-aware)"
    )
    ladder: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field(
        (16, 64, 256, 1024, 4096), description="The subspaces' dimensions d, rising, with commas"
    )
    seeds: int = Field(3, ge=1, description="Repetitions, each with other subspaces, another order and another head")

    rates: Annotated[tuple[float, ...], BeforeValidator(_numbers)] = Field(
        (1.0,), description="Factors on the learning rate to try, with commas; of every point the best one counts"
    )

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.ladder or self.ladder[0] < 1 or list(self.ladder) != sorted(set(self.ladder)):
            raise ValueError(f"ladder must be rising dimensions, as in 16,64,256, not {self.ladder}")
        if not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise ValueError(f"rates must be positive factors, as in 1,10, not {self.rates}")
        return self


class TrainingSettings(StepSettings):
    """What every training of the ladder has in common, and the rows that it is measured on."""

    eval_data: str | None = Field(None, description="File to measure on")
    eval_split: float = Field(
        0.1, gt=0, lt=1, description="Or the share of --data to hold out and measure on, chosen by the seed"
    )
    eval_rows: int | None = Field(None, ge=1, description="Measure on so many rows, spread evenly; all if not given")


class DimensionSettings(LadderSettings, TrainingSettings, RunSettings):
    """Everything `measure_dimension` needs."""

    out: str = Field(description="The folder of finished points; what is there already is not run again")

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs cannot both be given")
        if self.eval_data is not None and "eval_split" in self.model_fields_set:
            raise ValueError("eval_data and eval_split cannot both be given")
        if self.targets is not None and self.over == "all":
            raise ValueError("targets needs --over targets")
        if self.dtype not in (None, "float32"):
            raise ValueError("the subspace is trained in float32, so dtype must be float32")
        return self

    @property
    def share_held_out(self) -> float:
        """The share of the data that is measured on."""
        return 0.0 if self.eval_data is not None else self.eval_split
