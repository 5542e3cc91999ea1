"""The columns of the per-module table: the same in the terminal and in the report."""

from collections.abc import Callable
from dataclasses import dataclass

from lowrank.analysis.against_base import BaseMeasure
from lowrank.analysis.compare import Comparison, Similarity
from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.measure import SHARES
from lowrank.analysis.words import number


@dataclass(frozen=True, slots=True)
class Column:
    """title; meaning: a phrase for a legend; value: the cell of a layer, "–" where there is no such figure."""

    title: str
    meaning: str
    value: Callable[[Layer], str]


def columns(inspection: Inspection) -> list[Column]:
    """What can be said of every module of this inspection."""
    chosen = [*CHANGE]
    if inspection.base is not None:
        chosen += BASE
        if any(layer.measure.dora for layer in inspection.layers):
            chosen.append(DORA)
    if inspection.other is not None:
        chosen += AGAINST
    return chosen


def _rank(layer: Layer) -> str:
    parts = f" × {','.join(layer.measure.parts)}" if layer.measure.parts else ""
    return f"{layer.measure.rank}{parts}"


def _optional(value: float | None) -> str:
    return "–" if value is None else number(value)


def _factor(base: BaseMeasure) -> float | None:
    return None if base.amplification is None else base.amplification.factor


def _whole(similarity: Similarity | None) -> float | None:
    return None if similarity is None else similarity.whole


def _intruders(layer: Layer) -> str:
    if layer.base is None:
        return "–"
    more = f"+{layer.base.intruders.undecided}?" if layer.base.intruders.undecided else ""
    return f"{layer.base.intruders.certain}{more}"


def _rank_for(share: float) -> Column:
    return Column(
        f"{share:.0%}", f"rank that keeps {share:.0%} of ‖ΔW‖²", lambda layer: str(layer.measure.rank_for[share])
    )


def _of_base(figure: Callable[[BaseMeasure], float | None]) -> Callable[[Layer], str]:
    return lambda layer: _optional(None if layer.base is None else figure(layer.base))


def _of_pair(figure: Callable[[Comparison], float | None]) -> Callable[[Layer], str]:
    return lambda layer: _optional(None if layer.against is None else figure(layer.against))


CHANGE = [
    Column("module", "path in the model", lambda layer: layer.measure.path),
    Column("d×k", "outputs × inputs of the weight", lambda layer: "×".join(map(str, layer.measure.shape))),
    Column("rank", "r as given; × the parts of a fused projection that are adapted", _rank),
    Column("scale", "s in ΔW = s·B·A", lambda layer: number(layer.measure.scale)),
    Column("‖ΔW‖", "Frobenius norm of the change", lambda layer: number(layer.measure.norm)),
    Column("eff.", "effective rank: exp of the entropy of σ/Σσ", lambda layer: f"{layer.measure.effective_rank:.1f}"),
    Column("stable", "stable rank: ‖ΔW‖²/σ₁²", lambda layer: f"{layer.measure.stable_rank:.1f}"),
    *map(_rank_for, SHARES),
]
BASE = [
    Column("/‖W0‖", "‖ΔW‖/‖W0‖", _of_base(lambda base: base.relative)),
    Column("amplif.", "‖ΔW‖/‖UᵀW0V‖ in the directions U, V of ΔW", _of_base(_factor)),
    Column("intr.", "intruder dimensions among the leading ones of W0 + ΔW; +n? undecided", _intruders),
]
DORA = Column("DoRA", "whole change, row gains included, over ‖W0‖", _of_base(lambda base: base.dora_change))
AGAINST = [
    Column("cos", "cosine of the two ΔW", _of_pair(lambda pair: pair.cosine)),
    Column("φ in", "φ of all right (input) directions of both", _of_pair(lambda pair: _whole(pair.right))),
    Column("φ out", "φ of all left (output) directions of both", _of_pair(lambda pair: _whole(pair.left))),
    Column("disturbed", "what the other adds on the inputs this one reads", _of_pair(lambda pair: pair.disturbed_by)),
]
