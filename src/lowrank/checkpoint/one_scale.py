"""One scale for all modules of an adapter: where scales differ, B takes the quotient.

s·B·A = S·((s/S)·B)·A, so whoever reads one `r` and one `lora_alpha` of a config and nothing else computes every ΔW.
B is multiplied in float64 and rounded once to its own dtype: exact where s/S is a power of two (and B stays normal),
else every element of B is within half a unit in its last place.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

Scales = Literal["one", "own"]


def written_scales(own: Mapping[str, float], scales: Scales) -> dict[str, float]:
    """The scale of every module in a file: "one", the common scale for all, or "own", each what it has."""
    return dict(own) if scales == "own" else dict.fromkeys(own, common_scale(own.values()))


def common_scale(scales: Iterable[float]) -> float:
    """The scale for all: the commonest of those that most modules have but for a power of two; 0 where all are 0."""
    counts = Counter(scale for scale in scales if scale)
    families: Counter[float] = Counter()
    for scale, count in counts.items():
        families[_mantissa(scale)] += count
    return min(counts, key=lambda s: (-families[_mantissa(s)], -counts[s], _mantissa(s), s), default=0.0)


def folded(b: Tensor, own: float, written: float) -> Tensor:
    """B' with written·B'·A = own·B·A, for a `written` scale ≠ 0; `folded(b', written, own)` is the way back."""
    factor = 1.0 if own == written else _quotient(own, written)  # an adapter may have no scale but 0
    return b if factor == 1 else (b.double() * factor).to(b.dtype)


def _mantissa(number: float) -> float:
    return abs(math.frexp(number)[0])


def _quotient(own: float, written: float) -> float:
    """own/written; the power of two where a config's alpha, one rounding off, missed it."""
    quotient = own / written
    if not math.isfinite(quotient):
        return quotient
    mantissa, exponent = math.frexp(quotient)
    near = round(2 * mantissa) / 2
    return math.ldexp(near, exponent) if math.isclose(mantissa, near, rel_tol=1e-14) else quotient
