"""How far the weights of a merge onto the original are from those that were trained, over the quantised base."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.merging import Change, merge_block, row_blocks

ANOTHER = 0.5  # of ‖W0‖: four bits take off a tenth of a weight, other models differ by more than all of it


@dataclass(frozen=True, slots=True)
class Apart:
    """M the merged weight, T = Q(W0) + ΔW the trained one. answers: ‖M − T‖/‖T‖, by which answers to inputs without a

    direction of their own differ; change: ‖M − T‖/‖ΔW‖, the same in parts of what was learned.
    """

    answers: float
    change: float


# W0 and Q(W0) of a matrix as stored, (n, m), and ΔW over the one and over the other
Both = tuple[Tensor, Tensor, Sequence[Change], Sequence[Change]]


@torch.no_grad()
def apart(matrices: Iterable[Both]) -> Apart:
    """Of one weight, or of the matrices that it is merged by."""
    squares = torch.zeros(3, dtype=torch.float64)
    for original, held, changes, trained in matrices:
        for rows in row_blocks(*original.shape):
            base = held[rows].to(torch.promote_types(torch.float32, held.dtype))
            total = merge_block(base, trained, rows)
            here = merge_block(original[rows], changes, rows)
            parts = (here.to(total.dtype) - total, total, total - base)
            squares += torch.stack([part.square().sum().double() for part in parts]).cpu()
    difference, whole, change = squares.sqrt().tolist()
    return Apart(difference / whole if whole else 0.0, difference / change if change else 0.0)


def apart_table(found: Mapping[str, Apart], most: int = 5) -> str:
    """The medians, and a line for each of the weights whose answers differ most."""
    worst = sorted(found, key=lambda name: -found[name].answers)
    median = Apart(*(statistics.median(getattr(one, part) for one in found.values()) for part in Apart.__slots__))
    more = [f"  and {len(worst) - most} more"] if len(worst) > most else []
    return "\n".join(
        [
            f"apart from what was trained, since W0 is not the quantised one: {_line(median)} (median of {len(found)})",
            *(f"  {_line(found[name])}  {name}" for name in worst[:most]),
            *more,
        ]
    )


def _line(one: Apart) -> str:
    return f"answers {one.answers:.1%}, {one.change:.2f} of ‖ΔW‖"
