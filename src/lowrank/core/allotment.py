"""A budget of parameters given out over modules, one rank at a time."""

import heapq
from collections.abc import Sequence


def allot(gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int, least: int = 1) -> list[int]:
    """The rank of every module: what `budget` numbers buy where the next rank gains most for its cost.

    gains[i][n]: what rank n + 1 of module i adds to the sum that is to be large, never more than rank n added (σ² of a
    spectrum are so); its length is the highest rank the module may get. costs[i]: numbers a rank of module i takes,
    d + k. Every module gets `least` first, or its highest rank where that is lower; a rank that gains nothing is not
    bought.

    Where all costs are equal no other ranks have a larger sum; where they differ, none beats it by as much as the
    largest single gain (the knapsack's greedy bound). O(R·log m) for R ranks given to m modules. Raises ValueError
    where the budget does not pay for the least ranks.
    """
    ranks = [min(least, len(gain)) for gain in gains]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if left < 0:
        raise ValueError(f"{budget - left} numbers are needed for the least ranks, and the budget is {budget}")
    heap = [entry for i in range(len(gains)) if (entry := _next(i, ranks[i], gains, costs))]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if costs[i] > left:
            continue  # never affordable again
        left -= costs[i]
        ranks[i] += 1
        if entry := _next(i, ranks[i], gains, costs):
            heapq.heappush(heap, entry)
    return ranks


def _next(i: int, rank: int, gains: Sequence[Sequence[float]], costs: Sequence[int]) -> tuple[float, int] | None:
    """The heap's entry of module i at `rank`: the best gain for its cost first, ties by the module's place."""
    if rank >= len(gains[i]) or gains[i][rank] <= 0:
        return None
    return -gains[i][rank] / costs[i], i
