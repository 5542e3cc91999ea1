"""The singular values of ΔW, one line a layer."""

import math
from collections.abc import Sequence

from lowrank.analysis.figures.svg import line, picture, polyline, text
from lowrank.analysis.inspection import Layer
from lowrank.analysis.words import number

WIDTH, HEIGHT = 270.0, 170.0
LEFT, BOTTOM, TOP = 46.0, 24.0, 22.0
DEPTHS = 6  # steps of colour from the first to the last layer
DECADES = 4  # at most so many below the largest


def spectra(layers: Sequence[Layer], name: str, low: float, high: float) -> str:
    """σ_1, σ_2, ... of every layer's module `name`, on a logarithmic axis from low to high; deeper layers stronger."""
    own = [layer for layer in layers if layer.place.module == name and layer.measure.norm > 0]
    longest = max((len(layer.measure.sigma) for layer in own), default=1)
    depth = max((layer.place.layer or 0 for layer in own), default=0)
    parts = [text(LEFT, 14, name, "panel")]
    for value in _ticks(low, high):
        y = _y(value, low, high)
        parts += [line(LEFT, y, WIDTH - 8, y, "grid"), text(LEFT - 6, y + 4, number(value), "tick end")]
    for i in range(0, longest, max(1, math.ceil(longest / 8))):
        parts.append(text(_x(i, longest), HEIGHT - 6, str(i + 1), "tick middle"))
    for layer in own:
        step = round((layer.place.layer or 0) / depth * (DEPTHS - 1)) if depth else DEPTHS - 1
        points = [(_x(i, longest), _y(s, low, high)) for i, s in enumerate(layer.measure.sigma) if s >= low]
        parts.append(polyline(points, f"spectrum s{step}", layer.measure.path))
    return picture(WIDTH, HEIGHT, parts, f"singular values of {name}")


def common_range(layers: Sequence[Layer]) -> tuple[float, float]:
    """(low, high) for the axes of all panels."""
    values = [value for layer in layers for value in layer.measure.sigma if value > 0]
    high = max(values) * 1.3
    low = max(min(values) / 1.3, high * 10.0**-DECADES)
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and where they are too few to read from, their doubles and fivefolds too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    return [value for exponent in exponents for step in steps if low <= (value := step * 10.0**exponent) <= high]


def _x(i: int, n: int) -> float:
    return LEFT + 8 + i * (WIDTH - LEFT - 24) / max(n - 1, 1)


def _y(value: float, low: float, high: float) -> float:
    share = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)
