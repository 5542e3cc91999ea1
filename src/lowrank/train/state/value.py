"""A run as one plain value, and its two files: tensors as safetensors, all else as JSON. Nothing in it is code.

state.safetensors   weights.NAME (what is trained), kept.NAME (what else an adapter holds), masters.NAME, best.NAME,
                    optimiser.KEY.NAME (Adam's averages...), buffers.NAME, random.torch, random.DEVICE,
                    random-N.torch... of the N-th process, where there are several
state.json          `Facts`
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from lowrank.checkpoint.atomic import Content, write_folder
from lowrank.errors import CheckpointError, short
from lowrank.files.json_file import read_object
from lowrank.files.safetensors import DTYPE_NAMES, build_layout, read_tensors

FORMAT = 1
TENSORS, FACTS = "state.safetensors", "state.json"
REMEDY = "delete this checkpoint to go on from the one before it"

Number = int | float | bool


class _Part(BaseModel):
    """A part of the JSON: every field there, of its own type, and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class IntervalFacts(_Part):
    """What happened since the last line of the log."""

    total: float
    trained: NonNegativeInt
    tokens: NonNegativeInt
    seconds: float


class EvaluationFacts(_Part):
    """One evaluation."""

    step: NonNegativeInt
    loss: float
    count: NonNegativeInt
    figures: dict[str, float]


class RandomFacts(_Part):
    """Where Python's and numpy's random numbers are in one process: the Mersenne twister's words and what is left over.

    python: (words, next normal number); numpy: (words, place, has one, next normal number).
    """

    python: tuple[list[int], float | None]
    numpy: tuple[list[int], int, int, float]


class LogFacts(_Part):
    """How long the log was, None where there was none, and how many seconds the run had taken."""

    length: NonNegativeInt | None
    seconds: float


class About(_Part):
    """What a run is, which going on must not change.

    steps: how many there will be; settings: as train.yaml has them; made_of: {the base, the data...: what it was known
    by}; machine: what the bits of a number may depend on beside these.
    """

    steps: int
    settings: dict[str, Any]
    made_of: dict[str, str]
    machine: dict[str, str]


class Facts(_Part):
    """Everything of a run that is no tensor.

    place: (epoch, batch in it) of the next step, and so of order and packing; halvings: of the rate; numbers:
    {module:attribute: value} that forward passes changed; optimiser: {KEY.NAME: value} beside its tensors.
    """

    format: Literal[1] = 1
    step: NonNegativeInt
    trained: NonNegativeInt
    tokens: NonNegativeInt
    place: tuple[NonNegativeInt, NonNegativeInt]
    halvings: NonNegativeInt
    interval: IntervalFacts
    evaluations: list[EvaluationFacts]
    random: list[RandomFacts]
    numbers: dict[str, Number]
    optimiser: dict[str, Number]
    log: LogFacts
    about: About


@dataclass(frozen=True, slots=True)
class RunValue:
    """tensors: by the names above, on any device; facts: the rest."""

    tensors: Mapping[str, Tensor]
    facts: Facts

    def write(self, folder: Path) -> None:
        """Write it to `folder`, new or replaced, in one step and durably. Raises OutputError where the disk refuses."""
        text = self.facts.model_dump_json(indent=1) + "\n"
        write_folder(folder, {TENSORS: _parts(self.tensors), FACTS: text.encode()})


def read(folder: Path) -> RunValue:
    """The value in a folder. Raises CheckpointError for what is missing, damaged or of a later format."""
    path = folder / FACTS
    try:
        content = read_object(path, REMEDY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): {REMEDY}") from None
    if isinstance(found := content.get("format"), int) and found > FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads up to {FORMAT}: upgrade lowrank")
    try:
        facts = Facts.model_validate_json(json.dumps(content))  # of a Python value, lists are no tuples
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise CheckpointError(f"{path}: {short(where, 80)}: {fault['msg'].lower()}: {REMEDY}") from None
    return RunValue(read_tensors(folder / TENSORS), facts)


def _parts(tensors: Mapping[str, Tensor]) -> Content:
    """A safetensors file by parts: the header, then each tensor's own memory; on a CPU nothing is copied."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layout = build_layout(((name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in here.items()), None)
    return [memoryview(layout.header), *(t.reshape(-1).view(torch.uint8).numpy().data for t in here.values())]
