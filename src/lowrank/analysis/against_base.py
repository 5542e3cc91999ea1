"""ΔW of one module beside the weight W0 that it changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.analysis.changes import Change
from lowrank.core.amplification import Amplification, amplification
from lowrank.core.dora import row_gain, row_norms
from lowrank.core.finite import require_finite
from lowrank.core.intruders import LEADING, Intruders, find_intruders
from lowrank.core.krylov import BLOCK, Sum, Triplets, leading, random_block
from lowrank.core.merging import row_blocks
from lowrank.core.spectrum import DeltaSVD, delta_svd

SEED = 0


@dataclass(frozen=True, slots=True)
class BaseMeasure:
    """weight_norm: ‖W0‖_F; relative: ‖ΔW‖_F/‖W0‖_F; amplification: None where ΔW is zero.

    error: the largest ‖Wᵀ·u − σ·v‖/σ₁ among the leading singular triplets that were compared, of W0 and of W0 + ΔW.
    dora_change: ‖W − W0‖_F/‖W0‖_F of the whole DoRA change, row gains included; dora_gain: the mean of those gains.
    """

    weight_norm: float
    relative: float
    amplification: Amplification | None
    intruders: Intruders
    error: float
    dora_change: float | None = None
    dora_gain: float | None = None


@torch.no_grad()
def measure_against_base(change: Change, base: Tensor) -> BaseMeasure:
    """base: W0 (d, k), as stored. For DoRA, W0 + ΔW is the whole diag(m/‖W0 + s·B·A‖)·(W0 + s·B·A)."""
    weight = base.to(torch.promote_types(torch.float32, base.dtype))
    require_finite(weight, "the base's weight")
    svd = delta_svd(change.a, change.b, change.scale)
    known = _leading(weight, keep=max(2 * LEADING, svd.rank))
    gain = None if change.magnitude is None else _gain(change, weight)
    tuned = leading(_tuned(change, weight, gain), LEADING, _guess(known, svd, weight))
    weight_norm = float(torch.linalg.vector_norm(weight))
    norm = float(torch.linalg.vector_norm(svd.sigma))
    return BaseMeasure(
        weight_norm=weight_norm,
        relative=norm / weight_norm if weight_norm > 0 else 0.0,
        amplification=amplification(weight, svd, known.sigma, weight_norm) if svd.rank else None,
        intruders=find_intruders(weight, known, tuned),
        error=float(torch.cat([known.error[:LEADING], tuned.error[:LEADING]]).amax()),
        dora_change=None if gain is None else _whole_change(change, weight, gain) / max(weight_norm, 1e-300),
        dora_gain=None if gain is None else _mean_gain(change, weight),
    )


def _leading(weight: Tensor, keep: int) -> Triplets:
    return leading(Sum(weight), LEADING, random_block(BLOCK, weight.shape[1], SEED, weight), keep=keep)


def _guess(known: Triplets, svd: DeltaSVD, weight: Tensor) -> Tensor:
    """A start near the leading directions of W0 + ΔW, which are W0's or ΔW's or between them: (k, l)."""
    own, new = known.v[:, : BLOCK // 2], svd.v[:, : BLOCK // 2].to(weight)
    rest = BLOCK - own.shape[1] - new.shape[1]
    return torch.cat([own, new, random_block(rest, weight.shape[1], SEED + 1, weight)], dim=1)


def _gain(change: Change, weight: Tensor) -> Tensor:
    assert change.magnitude is not None
    return row_gain(weight, change.a, change.b, change.scale, change.magnitude).unsqueeze(1).to(weight)  # (d, 1)


def _tuned(change: Change, weight: Tensor, gain: Tensor | None) -> Sum:
    a, b = change.a.to(weight), change.b.to(weight) * change.scale
    return Sum(weight, a, b) if gain is None else Sum(weight * gain, a, b * gain)


def _whole_change(change: Change, weight: Tensor, gain: Tensor) -> float:
    """‖diag(g)·(W0 + s·B·A) − W0‖_F, by blocks of rows."""
    a, b = change.a.to(weight), change.b.to(weight)
    squares = 0.0
    for rows in row_blocks(*weight.shape):
        tuned = torch.addmm(weight[rows], b[rows], a, alpha=change.scale) * gain[rows]
        squares += float((tuned - weight[rows]).double().square().sum())
    return float(squares**0.5)


def _mean_gain(change: Change, weight: Tensor) -> float:
    """The mean of m/‖W0‖ over the rows: 1 where DoRA left the length of W0's rows as it was."""
    assert change.magnitude is not None
    before = row_norms(weight, change.a[:0], change.b[:, :0], 0.0)
    kept = before > 0
    return float((change.magnitude.to(before)[kept] / before[kept]).mean()) if kept.any() else 1.0
