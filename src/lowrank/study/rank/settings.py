"""What a user may ask of `lowrank rank`."""

from typing import Self

from pydantic import Field, model_validator

from lowrank.data.settings import DataSettings, Settings
from lowrank.train.settings import MachineSettings, TargetSettings


class GradientRows(Settings):
    """The few rows whose gradient is measured, and how closely."""

    sample: int = Field(64, ge=1, description="Rows to take the gradient of, spread evenly over the file")
    batch_size: int = Field(8, ge=1, description="Rows in one pass: less memory, same result")
    most: int = Field(64, ge=1, description="Highest rank that is measured, and that a module may get")
    seed: int = Field(0, ge=0, lt=2**63, description="Start of the sketch, and of a new classification head")


class Wanted(Settings):
    """What the ranks are to hold, or to cost."""

    energy: float = Field(0.9, gt=0, le=1, description="The share of a module's energy its rank should hold")
    budget: int | None = Field(None, ge=1, description="Numbers to give out to all A and B")


class GradientRankSettings(Wanted, GradientRows, TargetSettings, DataSettings, MachineSettings):
    """Everything `from_gradient` needs."""

    model: str = Field(description='A model: its folder, its name on the Hub (org/name), or "nano", the shipped one')
    data: str = Field(description="A file of rows, several with commas, or a folder with train.*")

    @model_validator(mode="after")
    def _means_one_budget(self) -> Self:
        if self.budget is not None and "rank" in self.model_fields_set:
            raise ValueError("budget and rank cannot both be given: a uniform rank is a budget too")
        return self


class AdapterRankSettings(Wanted):
    """Everything `from_adapter` needs. Targets and scale are the adapter's own."""

    adapter: str = Field(description="The folder of an adapter")
    rank: int | None = Field(None, ge=1, description="The uniform rank whose numbers are given out")
    allow_pickle: bool = Field(False, description="Read an old adapter's .bin file, with weights_only")

    @model_validator(mode="after")
    def _means_one_thing(self) -> Self:
        if self.budget is not None and self.rank is not None:
            raise ValueError("budget and rank cannot both be given: a uniform rank is a budget too")
        return self
