"""Everything `lowrank inspect` tells of an adapter, as one value."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lowrank.adapters.each_module import Progress, for_each, silent
from lowrank.analysis.against_base import BaseMeasure, measure_against_base
from lowrank.analysis.base_files import BaseWeights, find_base_weights
from lowrank.analysis.changes import read_change
from lowrank.analysis.compare import Comparison, Unshared, compare
from lowrank.analysis.measure import Measure, measure
from lowrank.analysis.places import Place, natural, places
from lowrank.checkpoint import AdapterFiles
from lowrank.checkpoint.each_expert import read_each_expert, with_each_expert
from lowrank.checkpoint.keys import Key
from lowrank.checkpoint.read import read_with_stacks
from lowrank.errors import LowrankError, short, some

Location = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted module: where it stands, its change, and that change beside the base and beside another adapter."""

    place: Place
    measure: Measure
    base: BaseMeasure | None = None
    against: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """An adapter, measured. layers: in natural order of their paths; full: {key: shape} of tensors kept in full.

    notes: what a reader has to know to read the figures right.
    """

    adapter: str
    made_for: str | None
    base: str | None
    other: str | None
    layers: tuple[Layer, ...]
    full: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unshared: Unshared | None = None
    notes: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """True where every ΔW is zero."""
        return all(layer.measure.norm == 0 for layer in self.layers)


def inspect_adapter(
    adapter: Location,
    model: Location | None = None,
    against: Location | None = None,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Measure the adapter in the folder `adapter`; nothing is loaded onto a model.

    model: the folder of its base, read once, tensor by tensor; against: another adapter's folder, compared on the
    modules both have; allow_pickle: read `adapter_model.bin` files (torch.load with weights_only=True); progress:
    called with (modules measured, modules in all) as they are done, from any thread.

    Raises CheckpointError for damaged files, factors that are not finite and a base that is not this adapter's, and
    LowrankError for two adapters that share no module.
    """
    stacked = read_with_stacks(adapter, allow_pickle)
    files = with_each_expert(stacked)
    other = None if against is None else read_each_expert(against, allow_pickle)
    weights = None if model is None else find_base_weights(stacked, model)
    measured = _measure(files, weights, progress)
    comparisons, unshared = ({}, None) if other is None else _compare(files, other)
    where = places(measured)
    return Inspection(
        adapter=str(adapter),
        made_for=short(made_for) if (made_for := files.config.raw.get("base_model_name_or_path")) else None,
        base=None if model is None else str(model),
        other=None if against is None else str(against),
        layers=tuple(
            Layer(where[path], *measured[path], comparisons.get(path)) for path in sorted(measured, key=natural)
        ),
        full=dict(_full(files)),
        unshared=unshared,
        notes=(*_notes(files, model is not None), *(() if other is None else _base_notes(files, other))),
    )


def _full(files: AdapterFiles) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, tensor in files.full.items():
        yield _name(key), tuple(tensor.shape)
    for path, tensor in files.rows.items():
        yield f"{path} (rows {some(files.row_indices(path), 8)})", tuple(tensor.shape)


def _measure(
    files: AdapterFiles, weights: BaseWeights | None, progress: Progress
) -> dict[str, tuple[Measure, BaseMeasure | None]]:
    def job(path: str) -> tuple[Measure, BaseMeasure | None]:
        if weights is None:
            return measure(read_change(files, path)), None
        weight = weights.matrix(path)
        change = read_change(files, path, weight)
        return measure(change), measure_against_base(change, weight)

    paths = list(files.low_rank if weights is None else weights.sources)
    return dict(zip(paths, for_each(paths, job, progress), strict=True))


def _compare(files: AdapterFiles, other: AdapterFiles) -> tuple[dict[str, Comparison], Unshared]:
    def job(path: str) -> Comparison | None:
        ours, theirs = read_change(files, path), read_change(other, path)
        return compare(ours, theirs) if ours.shape == theirs.shape else None

    shared = [path for path in files.low_rank if path in other.low_rank]
    compared = dict(zip(shared, for_each(shared, job), strict=True))
    comparisons = {path: comparison for path, comparison in compared.items() if comparison is not None}
    reshaped = sorted(compared.keys() - comparisons.keys(), key=natural)
    if not comparisons:
        raise LowrankError(f"{files.folder} and {other.folder} have nothing to compare: {_why(files, other, reshaped)}")
    return comparisons, Unshared(
        only_ours=_sorted(files.low_rank, other.low_rank),
        only_theirs=_sorted(other.low_rank, files.low_rank),
        other_shape=tuple(reshaped),
    )


def _why(files: AdapterFiles, other: AdapterFiles, reshaped: list[str]) -> str:
    if reshaped:
        a, b = read_change(files, reshaped[0]).shape, read_change(other, reshaped[0]).shape
        return f"they are of different bases ({reshaped[0]} is {a[0]}×{a[1]} in one and {b[0]}×{b[1]} in the other)"
    one, two = min(files.low_rank, key=natural), min(other.low_rank, key=natural)
    return f"no module is adapted by both (one adapts {one} and others, the other {two} and others)"


def _sorted(ours: Mapping[str, object], theirs: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(sorted(ours.keys() - theirs.keys(), key=natural))


def _name(key: Key) -> str:
    return f"{key.path}.{key.name}".removeprefix(".")


def _notes(files: AdapterFiles, with_base: bool) -> Iterator[str]:
    if files.config.lora.use_dora:
        yield (
            "This is a DoRA adapter: ΔW here is its low-rank part s·B·A. Its row lengths (magnitudes) are no low-rank "
            "change; with the base at hand, the size of the whole change is given beside."
        )
    if files.companion.start:
        yield "Training did not start at ΔW = 0 (PiSSA, OLoRA): ΔW is s·(B·A − B_start·A_start), what training changed."
    elif files.config.moved_base is not None and not with_base:
        yield (
            f"Training started from {files.config.moved_base} on a changed base, and the files hold B·A alone: this "
            "is not what training changed; give the base to have the start found again and taken off."
        )
    if files.config.raw.get("lora_bias"):
        yield "B has biases of its own (lora_bias), which go into the layers' biases: they are not measured."
    if count := len(files.full) + len(files.rows):
        yield f"{count} tensors are kept in full and are no low-rank change; they are listed, not measured."
    if files.unknown_fields:
        yield f"Fields of adapter_config.json that were not used: {some(files.unknown_fields, 8)}."


def _base_notes(files: AdapterFiles, other: AdapterFiles) -> Iterator[str]:
    ours, theirs = files.companion.base, other.companion.base
    differ = bool(ours and theirs and ours.differences(theirs))
    full = [str(f.config.raw.get("base_model_name_or_path") or "") for f in (files, other)]
    names = [short(name.rstrip("/").split("/")[-1]) for name in full]
    if differ or (all(names) and names[0] != names[1]):
        yield (
            f"The two adapters say that they were made for different bases ({names[0] or '?'} and {names[1] or '?'}): "
            "directions can only be the same if the bases are."
        )
