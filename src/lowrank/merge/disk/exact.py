"""What merged rows must be, computed in another way: float64, no arithmetic of `core.merging`; and how near is near.

The stated bound of a merged element w against its exact value e, with v the unit roundoff of the sums (2⁻²⁴ in float32)
and R the summed rank:

    |w − e| ≤ ½ulp(|e| + c) + c     c = 2·(R + 4)·(v + 2⁻⁵³)·(|W0| + Σ|s|·|B|·|A|)

one rounding to the result's dtype, and the accumulation of R products. DoRA's gain adds its own error to c, that of a
norm over k squares, for the part it multiplies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.merging import row_blocks
from lowrank.files.safetensors import DTYPES
from lowrank.merge.disk.adapters import Contribution
from lowrank.merge.disk.changes import compute_dtype
from lowrank.merge.disk.recipe import Recipe
from lowrank.merge.disk.stored_rows import read_rows
from lowrank.modelfiles.blocks import opened, whole
from lowrank.modelfiles.workspace import Workspace

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
FRACTION_BITS = 52  # of a float64
TINY = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150, torch.float64: 0.0}


@dataclass(frozen=True, slots=True)
class _Term:
    """One adapter's ΔW in float64: scale·left·right, and for DoRA the gain of stored rows or columns and its error."""

    left: Tensor  # (n, R), as loaded; made float64 where rows of it are used
    right: Tensor  # (R, m), float64
    scale: float
    gain: Tensor | None = None  # (n, 1) or (1, m)
    gain_error: Tensor | None = None  # relative, times the unit of the sums


class ExactRows:
    """The exact values of a merged tensor's rows, and how far from them a right answer may lie."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._unit = UNIT[DTYPES[recipe.dtype]]
        self._tiny = TINY[DTYPES[recipe.dtype]]
        wide = torch.promote_types(torch.float32, compute_dtype(recipe))
        self._sums = UNIT[wide] + UNIT[torch.float64]
        self._terms = [_term(recipe, contribution) for contribution in recipe.contributions]

    def __call__(self, base: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(exact, allowed) of the rows of these numbers, (n', m) in float64; base: those rows of W0 in float64."""
        exact, size, gain_error = base.clone(), base.abs(), torch.zeros_like(base)
        rank = 4
        for term in self._terms:
            left = term.left[rows].double()
            delta = left @ term.right * term.scale
            bound = left.abs() @ term.right.abs() * abs(term.scale)
            if term.gain is not None and term.gain_error is not None:
                gain = term.gain if term.gain.shape[0] == 1 else term.gain[rows]
                error = term.gain_error if term.gain_error.shape[0] == 1 else term.gain_error[rows]
                merged = (base + delta) * gain
                gain_error += error * merged.abs()
                delta, bound = merged - base, (base.abs() + bound) * gain.abs() + base.abs()
            exact += delta
            size += bound
            rank += left.shape[1]
        accumulated = 2 * rank * self._sums * size + 2 * self._sums * gain_error
        return exact, self._half_ulp(exact.abs() + accumulated) + accumulated

    def _half_ulp(self, values: Tensor) -> Tensor:
        """Half the distance between neighbours of the result's dtype at the given magnitudes, float64 and not negative.

        A float64 without its fraction is the power of two below it: `frexp` and `ldexp` take ten times as long.
        """
        powers = (values.view(torch.int64) >> FRACTION_BITS << FRACTION_BITS).view(torch.float64)
        return powers.mul_(self._unit).clamp_min_(self._tiny)


def _term(recipe: Recipe, contribution: Contribution) -> _Term:
    dtype = compute_dtype(recipe)
    weight = torch.empty(0, dtype=dtype)
    if contribution.reads_weight and recipe.replacement is None and recipe.source is not None:
        weight = whole(recipe.source)
    elif contribution.reads_weight and recipe.replacement is not None:
        weight = recipe.replacement.reshape(recipe.matrix)
    factors = contribution.factors(recipe.shape, weight)
    a, b = (tensor.detach() for tensor in factors.effective())
    left, right = (a.t(), b.t().double()) if contribution.transposed else (b, a.double())
    scale = factors.scale * contribution.adapter.weight
    if factors.magnitude is None:
        return _Term(left, right, scale)
    gain, error = _gain(recipe, left, right, scale, factors.magnitude.detach().double(), contribution.transposed)
    return _Term(left, right, scale, gain, error)


def _gain(
    recipe: Recipe, left: Tensor, right: Tensor, scale: float, magnitude: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """DoRA's gain from the norms of W0 + ΔW, formed block by block, and the relative error float32 norms may have."""
    along = 0 if transposed else 1
    squares, sizes = [], []
    for rows, stored in _all_rows(recipe):
        base, some = stored.double(), left[rows].double()
        squares.append((base + some @ right * scale).square().sum(along))
        sizes.append((base.abs() + some.abs() @ right.abs() * abs(scale)).square().sum(along))
    norms, size = (torch.stack(s).sum(0) if transposed else torch.cat(s) for s in (squares, sizes))
    length = recipe.matrix[along] + left.shape[1] + 8
    shape = (1, -1) if transposed else (-1, 1)
    return (magnitude / norms.sqrt()).view(shape), (length * size / norms).view(shape)


def _all_rows(recipe: Recipe) -> Iterator[tuple[slice, Tensor]]:
    workspace = Workspace()
    with opened(recipe.source) as descriptor:
        for rows in row_blocks(*recipe.matrix):
            yield rows, read_rows(recipe, descriptor, rows, workspace)
