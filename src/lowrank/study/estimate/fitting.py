"""The largest micro-batch that a machine holds."""

from collections.abc import Callable

MOST_ROWS = 4096  # in a micro-batch: more is no gain
TRIES = 5


def largest_rows(height: Callable[[int], int], room: int) -> int:
    """The most rows whose height fits into `room`, 0 where one does not.

    Heights grow by nearly as much with each row, so a few are looked at and a line is drawn through them.
    """
    one, two = height(1), height(2)
    if one > room:
        return 0
    if two > room:
        return 1
    fits, too_many, at, reached = 2, MOST_ROWS + 1, 2, two
    for _ in range(TRIES):
        if too_many - fits == 1:
            break
        line = 1 + int((room - one) * (at - 1) / max(1, reached - one))
        at = max(fits + 1, min(too_many - 1, line))
        reached = height(at)
        fits, too_many = (at, too_many) if reached <= room else (fits, at)
    return fits
