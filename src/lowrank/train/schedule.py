"""How the learning rate goes: linear warm-up to 1, then one of these from 1 down, as factors of the highest rate."""

import math
from collections.abc import Callable

DECAY = 0.2  # the share of the steps after warm-up in which wsd falls


def constant(_progress: float) -> float:
    """Stay at 1."""
    return 1.0


def linear(progress: float) -> float:
    """Fall to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Fall to 0 along half a cosine: (1 + cos π·progress) / 2."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Stay at 1 (stable), then fall to 0 in a straight line over the last fifth (decay): warm-up, stable, decay."""
    return min(1.0, (1.0 - progress) / DECAY)


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor of the highest learning rate in `step` (counted from 0) of `steps`, `warmup` of which rise to 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))
