"""Did a claim hold? Decided by rule, from figures alone."""

import statistics
from collections.abc import Sequence

HELD, FAILED, UNCLEAR, MISSING = "held", "did not hold", "not distinguishable here", "not yet run"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, in percent, and how many there were."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation} (n = {len(values)})"


def larger(ours: Sequence[float], others: Sequence[float], sampling: float) -> str:
    """Whether `ours` are larger than `others`: held or failed beyond two standard errors, else not distinguishable.

    The error is that of the difference of the means, from the seeds, and at least that of scoring on so few rows.
    sampling: its variance, the sum of both sides'. More seeds do not make it smaller, since the same rows score them.
    """
    if not ours or not others:
        return MISSING
    p, q = statistics.mean(ours), statistics.mean(others)
    seeds = sum(statistics.variance(v) / len(v) if len(v) > 1 else 0.0 for v in (ours, others))
    if abs(p - q) <= 2 * max(sampling, seeds) ** 0.5:
        return UNCLEAR
    return HELD if p > q else FAILED


def at_least(ours: Sequence[float], others: Sequence[float], sampling: float) -> str:
    """Whether `ours` are on a par with `others` or better: held unless they are smaller beyond two standard errors.

    Where they are neither better nor worse beyond that, it is said so: no difference seen is no proof of none.
    """
    verdict = larger(ours, others, sampling)
    return "no difference seen" if verdict == UNCLEAR else verdict


def within(value: float, low: float, high: float) -> str:
    """Whether low ≤ value ≤ high."""
    return HELD if low <= value <= high else FAILED
