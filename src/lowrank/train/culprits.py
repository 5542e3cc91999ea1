"""Which rows of a step a number that is none came from."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from lowrank.data.tokens import Example
from lowrank.errors import some
from lowrank.train.evaluation import Measure
from lowrank.train.watch import Watch


@torch.no_grad()
def culprits(model: nn.Module, measure: Measure, rows: Sequence[Example]) -> list[int]:
    """The places in `rows` of those whose own loss is not finite."""
    found = (float(measure.loss(model, measure.collate([row])).total) for row in rows)
    return [place for place, loss in enumerate(found) if not math.isfinite(loss)]


def named(watch: Watch, numbers: Sequence[int], guilty: Sequence[int]) -> str:
    """ " (by the row of FILE:LINE)": the guilty rows of a step, or all where each is finite by itself."""
    places = watch.places([numbers[place] for place in guilty] or numbers)
    if not places:
        return ""
    return f" ({'by' if guilty else 'one of'} the row{'s'[: len(places) > 1]} of {some(places)})"
