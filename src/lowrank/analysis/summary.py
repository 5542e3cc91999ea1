"""The figures of an inspection in sentences, most important first. Numbers stand beside what they are measured by."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean, median

from lowrank.analysis.compare import Comparison, Similarity
from lowrank.analysis.experts import experts_in_words, kind_of_module
from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.measure import SHARES, mean_energy_kept
from lowrank.analysis.places import natural
from lowrank.analysis.words import count, number, percent, span, spans
from lowrank.errors import some

ENOUGH = 0.95  # share of energy that a smaller rank should keep to be named
TOP = 0.15  # share of modules that count as "changed most"


def summary(inspection: Inspection) -> list[str]:
    """What the adapter is, what it uses of its rank, where it changed most; then the base; then the other adapter."""
    sentences = [*_given(inspection)]
    if inspection.changes_nothing:
        sentences.append("This adapter changes nothing: every ΔW is zero.")
    else:
        sentences += [*_ranks(inspection), *_places(inspection), *experts_in_words(inspection)]
    if inspection.base is not None and not inspection.changes_nothing:
        sentences += _against_base(inspection)
    if inspection.other is not None:
        sentences += _against_other(inspection)
    return sentences


def _given(inspection: Inspection) -> Iterator[str]:
    measures = [layer.measure for layer in inspection.layers]
    ranks = span([m.rank for m in measures])
    scales = span([m.scale for m in measures])
    names = sorted({kind_of_module(layer) for layer in inspection.layers}, key=natural)
    parameters = sum(m.parameters for m in measures)
    yield (
        f"Rank {ranks} was given to {count(len(measures), 'module')} ({some(names, 8)}) at scale {scales}: "
        f"{parameters:,} trained numbers."
    )


def _ranks(inspection: Inspection) -> Iterator[str]:
    changed = [layer.measure for layer in inspection.layers if layer.measure.norm > 0]
    used = [m.rank_for[SHARES[0]] for m in changed]
    kept = mean_energy_kept(changed)
    full = max(m.rank for m in changed)
    smaller = next((r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r < full and kept[r - 1] >= ENOUGH), None)
    advice = (
        f"rank {smaller} everywhere would keep {percent(kept[smaller - 1])} of it"
        if smaller
        else f"half the rank would keep {percent(kept[max(full // 2, 1) - 1])}"
        if full > 1
        else "there is no smaller rank"
    )
    yield (
        f"{percent(SHARES[0])} of the energy ‖ΔW‖² of a module sits in {fmean(used):.1f} directions on average "
        f"({span(used)}); {advice}."
    )
    yield (
        f"The effective rank (by entropy) is {fmean(m.effective_rank for m in changed):.1f} on average, "
        f"the stable rank {fmean(m.stable_rank for m in changed):.1f}."
    )
    if idle := len(inspection.layers) - len(changed):
        yield f"{count(idle, 'module')} did not change at all (ΔW = 0)."


def _places(inspection: Inspection) -> Iterator[str]:
    with_base = inspection.base is not None
    layers = [layer for layer in inspection.layers if layer.measure.norm > 0]
    if len(layers) < 2:
        return
    ranked = sorted(layers, key=lambda layer: size(layer), reverse=True)
    top = ranked[: max(1, min(12, round(TOP * len(ranked))))]
    measure = "‖ΔW‖/‖W0‖" if with_base else "‖ΔW‖"
    yield (
        f"Changed most, by {measure}: {_where(top)} ({number(size(top[-1]))} to {number(size(top[0]))}, "
        f"where the median is {number(median(map(size, layers)))} and the least {number(size(ranked[-1]))})."
        if len(top) > 1
        else f"Changed most, by {measure}: {_where(top)} ({number(size(top[0]))}; the median is "
        f"{number(median(map(size, layers)))}, the least {number(size(ranked[-1]))})."
    )


def _against_base(inspection: Inspection) -> Iterator[str]:
    found = [layer.base for layer in inspection.layers if layer.base is not None]
    ratios = [b.amplification for b in found if b.amplification is not None]
    factors = [a.factor for a in ratios if a.factor is not None]
    if factors:
        random = median(a.along_change / a.along_random for a in ratios if a.along_random > 0)
        own = median(a.along_change / a.along_own for a in ratios if a.along_own > 0)
        yield (
            f"Where ΔW acts, it is {number(median(factors))} times as large as W0 is in the same directions (median; "
            f"{span(factors)}): the amplification factor of the paper's Table 7. W0 has {number(random)} times as much "
            f"there as in random directions, and {percent(own)} of what it has in its own leading ones."
        )
    certain, undecided = (sum(getattr(b.intruders, name) for b in found) for name in ("certain", "undecided"))
    looked = sum(len(b.intruders.sigma) for b in found)
    where = sum(b.intruders.certain > 0 for b in found)
    more = f" ({undecided} more may be; that could not be decided)" if undecided else ""
    yield (
        f"Of the {looked:,} leading directions of W0 + ΔW, {certain:,} are intruders, unlike every direction of W0, "
        f"in {where} of {count(len(found), 'module')}{more}."
        if certain or undecided
        else f"No intruder dimensions: each of the {looked:,} leading directions of W0 + ΔW is like one that W0 had."
    )
    changes = [b.dora_change for b in found if b.dora_change is not None]
    if changes:
        yield f"With DoRA's row gains the whole change is {number(median(changes))} of ‖W0‖ (median)."


def _against_other(inspection: Inspection) -> Iterator[str]:
    pairs = [layer.against for layer in inspection.layers if layer.against is not None]
    yield _sharing(inspection, len(pairs))
    alive = [pair for pair in pairs if pair.cosine is not None]
    if not alive:
        yield "In each of these modules one of the two changes is zero, so there is nothing to compare."
        return
    yield (
        f"As vectors, the two ΔW have a cosine of {number(fmean(p.cosine for p in alive if p.cosine is not None))} on "
        f"average ({span([p.cosine or 0.0 for p in alive])}); 0 is unrelated, 1 the same change."
    )
    yield from _subspaces(alive)
    yield _merging(alive)


def _sharing(inspection: Inspection, shared: int) -> str:
    unshared = inspection.unshared
    assert unshared is not None
    rest = [
        f"{len(paths)} {words} ({some(paths, 8)})"
        for paths, words in (
            (unshared.only_ours, "only in this adapter"),
            (unshared.only_theirs, "only in the other"),
            (unshared.other_shape, "of another shape there"),
        )
        if paths
    ]
    if not rest:
        return f"Compared with {inspection.other} on {count(shared, 'module')}; the two adapt the same."
    both = f"Compared with {inspection.other} on the {count(shared, 'module')} that both adapt"
    return f"{both}; not compared: {'; '.join(rest)}."


def _subspaces(pairs: Sequence[Comparison]) -> Iterator[str]:
    for side, of in (("right", "inputs that ΔW reads"), ("left", "outputs that ΔW writes")):
        grids = [similarity for pair in pairs if isinstance(similarity := getattr(pair, side), Similarity)]
        first = fmean(grid.at(1) for grid in grids)
        chance = fmean(1 / grid.dimension for grid in grids)
        whole, random = fmean(grid.whole for grid in grids), fmean(grid.random for grid in grids)
        yield (
            f"Their {side} directions ({of}): φ of the strongest one of each is {number(first)} (by chance "
            f"{number(chance)}), of all of them {number(whole)} (by chance {number(random)})."
        )


def _merging(pairs: Sequence[Comparison]) -> str:
    growth = fmean(p.growth for p in pairs if p.growth is not None)
    here = fmean(p.disturbed_by for p in pairs if p.disturbed_by is not None)
    there = fmean(p.disturbs for p in pairs if p.disturbs is not None)
    by_chance = fmean(p.random_disturbed_by for p in pairs if p.random_disturbed_by is not None)
    return (
        f"Merged together: on the inputs that this adapter reads, the other adds {percent(here)} of what this one does "
        f"there ({percent(by_chance)} if unrelated), and this one adds {percent(there)} to the other; the sum is "
        f"{number(growth)} times as long as that of unrelated changes (1.41 for equal ones, 0 for opposite ones)."
    )


def size(layer: Layer) -> float:
    """How much a module changed: ‖ΔW‖/‖W0‖ where the base is known, else ‖ΔW‖."""
    return layer.base.relative if layer.base is not None else layer.measure.norm


def _where(layers: Sequence[Layer]) -> str:
    """Modules of the same name together, with their layers as ranges; the name with most of them first."""
    ordered = sorted(layers, key=lambda layer: layer.place.module)
    groups = [(name, list(group)) for name, group in groupby(ordered, key=lambda layer: layer.place.module)]
    groups.sort(key=lambda group: -len(group[1]))
    words = []
    for name, group in groups:
        numbers = sorted(layer.place.layer for layer in group if layer.place.layer is not None)
        plural = "s" if len(numbers) > 1 else ""
        words.append(f"{name} of layer{plural} {spans(numbers)}" if numbers else name)
    return some(words, 5)
