"""Which tensor of the base a module of the adapter means, by the structure of the names alone.

Releases of transformers and wrappers around a model differ in what stands in front of a layer's name: `model.layers.0.`
or `layers.0.`, `transformer.h.0.` or `h.0.`, `model.language_model.layers.0.` or `language_model.model.layers.0.`.
Modules that share such a stem (`model.layers`, `model.vision_tower.layers`) are looked up together: the leading part
that has to be exchanged is the one under which every one of them is found.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from lowrank.errors import CheckpointError, quoted
from lowrank.modelfiles.dialects import translations

Fits = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Resolution:
    """modules: {adapter's path: base's path}; renamed: (old, new) where they differ; unresolved: what is nowhere."""

    modules: dict[str, str]
    renamed: tuple[tuple[str, str], ...]
    unresolved: tuple[str, ...]


def resolve(paths: Iterable[str], modules: Collection[str], fits: Fits) -> Resolution:
    """Find every one of the adapter's `paths` among the base's `modules`.

    fits(path, module): whether the shapes agree; it decides where several places have the same names.
    Raises CheckpointError where two places remain.
    """
    found: dict[str, str] = {}
    renamed: dict[tuple[str, str], None] = {}
    unresolved: list[str] = []
    for group in _groups(paths):
        places = _places(group, modules, fits)
        if places is None:
            found |= {path: path for path in group if path in modules}
            unresolved += [path for path in group if path not in modules]
            continue
        found |= places
        renamed |= {_difference(path, place): None for path, place in places.items() if path != place}
    _check_distinct(found)
    return Resolution(found, tuple(renamed), tuple(unresolved))


def _places(group: list[str], modules: Collection[str], fits: Fits) -> dict[str, str] | None:
    """{path: module} for a whole group, its names as they are or in the words of older files; None without one."""
    for words in [group, *translations(group)]:
        original = dict(zip(words, group, strict=True))
        exchange = _exchange(words, modules, lambda word, module: fits(original[word], module))  # noqa: B023
        if exchange is not None:
            old, new = exchange
            return {original[word]: new + word.removeprefix(old) for word in words}
    return None


def _difference(path: str, place: str) -> tuple[str, str]:
    """The two names without their common end, numbers left out: what a report shows of a renaming."""
    ours, theirs = path.split("."), place.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        del ours[-1], theirs[-1]
    if ours[-1:] == theirs[-1:]:
        return (".".join(ours[:-1]), ".".join(theirs[:-1]))
    return tuple(".".join("N" if part.isdigit() else part for part in parts) for parts in (ours, theirs))  # type: ignore[return-value]


def stem(path: str) -> str:
    """What stands in front of the first number: `model.layers` of `model.layers.0.mlp`; the whole path without one."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit() and i > 0]
    return ".".join(parts[: numbers[0]]) if numbers else path


def _groups(paths: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[stem(path)].append(path)
    return list(groups.values())


def _exchange(group: list[str], modules: Collection[str], fits: Fits) -> tuple[str, str] | None:
    """(old, new) such that every path, with its leading `old` exchanged for `new`, is a module; None without one.

    The less is taken off, the better; the name of the list of layers (or the module's own) always stays.
    """
    parts = stem(group[0]).split(".")
    for cut in range(len(parts)):
        old = "".join(part + "." for part in parts[:cut])
        tails = [path.removeprefix(old) for path in group]
        candidates = [new for new in _in_front_of(tails[0], modules) if all(new + tail in modules for tail in tails)]
        if old in candidates:
            return old, old
        if len(candidates) > 1:
            fitting = [new for new in candidates if all(fits(p, new + p.removeprefix(old)) for p in group)]
            candidates = _most_alike(old, fitting)
        if len(candidates) > 1:
            places = " and ".join(repr(new + tails[0]) for new in sorted(candidates)[:3])
            raise CheckpointError(
                f"{quoted(group[0])} of the adapter means two places of the base, {places}: rename the adapter's "
                "tensors to the full names"
            )
        if candidates:
            return old, candidates[0]
    return None


def _in_front_of(tail: str, modules: Collection[str]) -> list[str]:
    """Every leading part with which `tail` is a module, the empty one included."""
    return [module.removesuffix(tail) for module in modules if module == tail or module.endswith("." + tail)]


def _most_alike(old: str, candidates: list[str]) -> list[str]:
    """Those leading parts that have most words in common with the one they replace (`language_model`), if any has."""
    shared = {new: len(set(old.split(".")[:-1]) & set(new.split(".")[:-1])) for new in candidates}
    return [new for new, count in shared.items() if count == max(shared.values())]


def _check_distinct(found: dict[str, str]) -> None:
    owners: dict[str, str] = {}
    for path, module in found.items():
        if module in owners:
            raise CheckpointError(
                f"{quoted(owners[module])} and {quoted(path)} of the adapter both mean {quoted(module)} of the base"
            )
        owners[module] = path
