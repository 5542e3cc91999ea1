"""Numbers and names as people write them."""

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return (
        f"{value:.3g}" if 1e-4 <= abs(value) < 1e3 else f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.2e}"
    )


def percent(share: float) -> str:
    """0.973 → "97 %", 0.0042 → "0.42 %"."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def count(n: int, noun: str) -> str:
    """3, module → "3 modules"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def span(values: Sequence[float]) -> str:
    """[3, 1, 2] → "1 to 3"; one value where all are alike."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def spans(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] → "1–3, 7"; the numbers ascending."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n <= found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)
