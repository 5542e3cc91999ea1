"""r, lora_alpha and the patterns that say of every module what its factors are, in the words of a config file."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from lowrank.checkpoint.one_scale import common_scale
from lowrank.core.scaling import alpha_of, lora_scale
from lowrank.injection.regex import Table

Number = TypeVar("Number", int, float)
PLAIN = re.compile(r"[\w.-]+")


class Ranks(NamedTuple):
    """The part of a config that gives every module its rank and alpha."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def exact_alpha(scale: float, rank: int, rslora: bool = False) -> float:
    """An alpha from which `lora_scale` gives `scale` back to the last bit; a short one where there is one."""
    short = alpha_of(scale, rank, rslora)
    raw = scale * (math.sqrt(rank) if rslora else rank)
    for alpha in (short, raw, math.nextafter(raw, math.inf), math.nextafter(raw, -math.inf)):
        if lora_scale(alpha, rank, rslora) == scale:
            return alpha
    return raw


def unsaid(modules: Mapping[str, tuple[int, float]], own: Mapping[str, float]) -> dict[str, float]:
    """The `own` scales that the config of {path: (rank, scale)} does not give to the last bit."""
    return {
        path: own[path]
        for path, (rank, scale) in sorted(modules.items())
        if lora_scale(exact_alpha(scale, rank), rank) != own[path]
    }


def describe(modules: Mapping[str, tuple[int, float]], rslora: bool = False) -> Ranks:
    """The config of {path: (rank, scale)}: the largest rank, the alpha that gives the common scale at that rank, and

    patterns for modules that have another. Where all have one scale, a reader who ignores the patterns computes it.
    """
    ranks = {path: rank for path, (rank, _) in modules.items()}
    alphas = {path: exact_alpha(scale, rank, rslora) for path, (rank, scale) in modules.items()}
    r = max(ranks.values())
    alpha = exact_alpha(common_scale(scale for _, scale in modules.values()), r, rslora)
    return Ranks(r, alpha, _pattern(ranks, r), _pattern(alphas, alpha))


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    other = {path: value for path, value in sorted(values.items()) if value != default}
    return dict(zip(exact_keys(list(other), values), other.values(), strict=True))


def exact_key(path: str, paths: Iterable[str]) -> str:
    """`exact_keys` of one path."""
    return exact_keys([path], paths)[0]


def exact_keys(wanted: Sequence[str], paths: Iterable[str]) -> list[str]:
    """For each of `wanted` a key that means this one of `paths` alone, under PEFT's reading of it as a regex for the

    end of a path: the plain path where that is unique, which PEFT before 0.14 understands too; anchored and escaped
    otherwise.
    """
    plain = [path for path in wanted if PLAIN.fullmatch(path)]
    table = Table(plain)
    meant = Counter(plain[number] for path in paths for number in table.words_in(path))
    return [path if meant[path] == 1 else "^" + re.escape(path) for path in wanted]


def target_names(adapted: Iterable[str], all_paths: Iterable[str]) -> list[str] | str:
    """`target_modules` that means exactly `adapted` among `all_paths`: the shortest endings of paths that do.

    Where even full paths would match other modules (`lin` also ends `block.lin`), one regex of all paths.
    """
    wanted, every = set(adapted), list(all_paths)
    for length in range(1, 1 + max(path.count(".") + 1 for path in wanted)):
        names = {".".join(path.split(".")[-length:]) for path in wanted}
        if {path for path in every if _ends_in(path, names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))


def _ends_in(path: str, names: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
