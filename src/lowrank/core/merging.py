"""The one place where ΔW = s·B·A is added to a weight: blocks of rows, float32 (or wider) sums, one rounding.

Layers, merging in memory and merging on disk all come here, so they give the same bits. A weight is seen as it is
stored, a matrix of n rows and m columns. Where the layer stores W0 itself (Linear, convolutions) that is (d, k);
where it stores W0ᵀ (transformers' Conv1D, embeddings) it is (k, d) and the change is Aᵀ·Bᵀ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.dora import row_gain
from lowrank.core.factors import LoraFactors
from lowrank.core.unrounded import unrounded

BLOCK_ELEMENTS = 2**19  # a float32 block of 2 MiB: it stays in a core's cache while factors are added to it


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's ΔW, ready to be added to stored rows: s·left·right, and DoRA's gain along one of the two sides.

    left: (n, R), right: (R, m), both float32 or wider. row_gain: (n, 1) or column_gain: (1, m) for DoRA, else None.
    """

    left: Tensor
    right: Tensor
    scale: float
    row_gain: Tensor | None = None
    column_gain: Tensor | None = None

    @property
    def directed(self) -> bool:
        """True for DoRA, whose ΔW is computed from the unmerged rows."""
        return self.row_gain is not None or self.column_gain is not None

    def add_to(self, total: Tensor, base: Tensor, rows: slice | Tensor) -> None:
        """In place: total += ΔW[rows], where `base` holds the unmerged rows (n', m) in the same dtype.

        Only a directed change reads `base`, which for others may be `total` itself.
        """
        if not self.directed:
            total.addmm_(self.left[rows], self.right, alpha=self.scale)
            return
        directed = torch.addmm(base, self.left[rows], self.right, alpha=self.scale)
        if self.row_gain is not None:
            directed *= self.row_gain[rows]
        if self.column_gain is not None:
            directed *= self.column_gain
        total += directed.sub_(base)


def _as_stored(a: Tensor, b: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(left, right) with left·right = B·A as the weight is stored."""
    return (a.mT, b.mT) if transposed else (b, a)


def prepare(factors: LoraFactors, weight: Tensor, *, transposed: bool, weighting: float = 1.0) -> Change:
    """The `Change` of `factors` for `weight` as stored, (n, m); `weighting` multiplies ΔW in a weighted merge."""
    wide = torch.promote_types(torch.float32, weight.dtype)
    a, b = (t.detach().to(device=weight.device, dtype=wide) for t in factors.effective())
    left, right = _as_stored(a, b, transposed)
    scale = factors.scale * weighting
    if abs(scale) > torch.finfo(wide).max:
        raise FloatingPointError(f"its scale {scale:g} does not fit into {wide}")
    if factors.magnitude is None:
        return Change(left.contiguous(), right.contiguous(), scale)
    if weighting != 1.0:
        raise ValueError("a DoRA adapter has no weighted form: its change is not linear in the factors")
    matrix = weight.t() if transposed else weight
    gain = row_gain(matrix, a, b, scale, factors.magnitude.detach().to(weight.device))
    gains = {"column_gain": gain.unsqueeze(0)} if transposed else {"row_gain": gain.unsqueeze(1)}
    return Change(left.contiguous(), right.contiguous(), scale, **gains)


def adapted_weight(
    weight: Tensor, adapters: Sequence[LoraFactors], *, transposed: bool, expert: int | None = None
) -> Tensor:
    """W0 + Σ ΔW as stored, (n, m), differentiable in the factors: formed whole, rounded once to `weight`'s dtype.

    For a forward that reads the weight. The start factors are taken off as a layer's own forward does it. A stack of
    experts is (E, n, m), or one `expert` of it (n, m).
    """
    wide = torch.promote_types(torch.float32, weight.dtype)
    base = total = weight.to(wide)
    with unrounded(weight):
        for factors in adapters:
            a, b = (tensor.to(wide) if expert is None else tensor[expert].to(wide) for tensor in factors.moved())
            left, right = _as_stored(a, b, transposed)
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            if factors.magnitude is None:
                total = add(total, left, right, alpha=factors.scale)
                continue
            one = ... if expert is None else expert
            all_a, all_b = (tensor.detach()[one] for tensor in factors.effective())
            matrix = weight.mT if transposed else weight
            gain = row_gain(matrix, all_a, all_b, factors.scale, factors.magnitude[one])
            directed = add(base, left, right, alpha=factors.scale)
            total = total + (directed * gain.unsqueeze(-2 if transposed else -1) - base)
    return total.to(weight.dtype)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """The blocks of rows in which a (rows, columns) matrix is merged. In memory and on disk they are the same."""
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def merge_block(base: Tensor, changes: Sequence[Change], rows: slice, memory: Tensor | None = None) -> Tensor:
    """W0[rows] + Σ ΔW[rows] in float32 or wider, not yet rounded: base (n', m) are the stored rows `rows`.

    memory: where to put the answer, at least (n', m) in the wider dtype; new memory otherwise.
    """
    wide = torch.promote_types(torch.float32, base.dtype)
    total = torch.empty(base.shape, dtype=wide, device=base.device) if memory is None else memory[: base.shape[0]]
    total.copy_(base)
    original = total.clone() if any(change.directed for change in changes) else total
    for change in changes:
        change.add_to(total, original, rows)
    return total


def share_left(lost: float, changed: float, noise: float = 0.0) -> float:
    """1 − lost/changed, at least 0: of a change ‖ΔW‖² what a rounding that is off by ‖error‖² = `lost` has kept.

    1 where nothing is changed, or no more than `noise`; 0 where it cannot be said (NaN).
    """
    return 1.0 if changed <= noise else max(0.0, 1 - lost / changed)


def merge_weight(weight: Tensor, changes: Sequence[Change], merged: Tensor | None = None) -> Tensor:
    """W0 + Σ ΔW, weight (n, m) as stored, rounded once: into `merged`, to its dtype, or a new tensor of `weight`'s."""
    merged = torch.empty_like(weight) if merged is None else merged
    memory = None
    for rows in row_blocks(*weight.shape):
        memory = merge_block(weight[rows], changes, rows, memory)
        merged[rows] = memory
    return merged
