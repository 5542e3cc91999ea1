"""How the changes of several adapters become one, one method a file: terms of one weight in, balanced factors out."""

from collections.abc import Callable, Sequence

from lowrank.core.combination.cat import cat
from lowrank.core.combination.dare_linear import dare_linear
from lowrank.core.combination.dare_ties import dare_ties
from lowrank.core.combination.linear import linear
from lowrank.core.combination.magnitude_prune import magnitude_prune
from lowrank.core.combination.svd import svd
from lowrank.core.combination.term import Options, Term
from lowrank.core.combination.ties import ties
from lowrank.core.truncation import LowRank
from lowrank.errors import ConfigError

Method = Callable[[Sequence[Term], Options], LowRank]

METHODS: dict[str, Method] = {
    "linear": linear,
    "cat": cat,
    "svd": svd,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
WITH_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
WITHOUT_RANK = ("cat",)


def find_method(name: str) -> Method:
    """The method `name`, or a ConfigError that lists them."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "WITHOUT_RANK", "WITH_DENSITY", "LowRank", "Method", "Options", "Term", "find_method"]
