"""What a user may say of a run's checkpoints and of its end."""

import re
from typing import Literal

from pydantic import Field, field_validator

from lowrank.data.settings import Settings

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
SPAN = re.compile("".join(rf"(?:(\d+){unit})?" for unit in UNITS))


class CheckpointSettings(Settings):
    """When a run is written down, so that it can go on, and when it stops by itself."""

    save_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; ten minutes of training where not given"
    )
    keep_checkpoints: int | None = Field(
        None,
        ge=1,
        description="Keep the last so many, and that of the best evaluation, also after the end; where not given, 2 "
        "while the run lasts",
    )
    on_divergence: Literal["stop", "back"] = Field(
        "stop", description="A loss that is no number ends the run; or go back to the last checkpoint, at half the rate"
    )
    stop_after: str | None = Field(
        None, description="Stop with a checkpoint after this time, as in 3h55m (exit status 75)"
    )

    @field_validator("stop_after")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value):
            raise ValueError("a time is said as in 3h55m, 45m, 1d12h or 90s")
        return value


def seconds_of(text: str) -> int:
    """The seconds in 3h55m; 0 for what is no time."""
    found = SPAN.fullmatch(text.strip().lower())
    return sum(int(part) * unit for part, unit in zip(found.groups("0"), UNITS.values(), strict=True)) if found else 0
