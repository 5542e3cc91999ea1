"""Where a rising curve of scores reaches a share of what full fine-tuning reaches: d90."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Crossing:
    """d: the dimension, or None where no d of the ladder reaches `threshold`.

    at_most: true where the smallest d of the ladder is there already, so that the answer may be smaller still.
    """

    threshold: float
    d: float | None
    at_most: bool = False


def crossing(scores: Mapping[int, float], threshold: float) -> Crossing:
    """The first d whose score reaches the threshold, between two steps of the ladder linearly in log2 d.

    scores: {d: score}, higher is better.
    """
    before: tuple[int, float] | None = None
    for d in sorted(scores):
        if scores[d] >= threshold:
            if before is None:
                return Crossing(threshold, float(d), at_most=True)
            share = (threshold - before[1]) / (scores[d] - before[1])
            return Crossing(threshold, 2 ** (math.log2(before[0]) + share * math.log2(d / before[0])))
        before = d, scores[d]
    return Crossing(threshold, None)
