"""How training starts, one strategy a file. Every one of them but `random` gives ΔW = 0 at step 0."""

import re
from collections.abc import Callable
from functools import partial

from lowrank.core.init.base import Site, Start
from lowrank.core.init.embedding import embedding
from lowrank.core.init.gaussian import gaussian
from lowrank.core.init.kaiming import kaiming
from lowrank.core.init.olora import olora
from lowrank.core.init.orthogonal import orthogonal
from lowrank.core.init.pissa import fast_pissa, pissa
from lowrank.core.init.random import random
from lowrank.errors import ConfigError, short

Init = Callable[[Site], Start]

INITS: dict[str, Init] = {
    "gaussian": gaussian,
    "kaiming": kaiming,
    "orthogonal": orthogonal,
    "olora": olora,
    "pissa": pissa,
    "random": random,
}
READS_WEIGHT = ("olora", "pissa")
MOST_ITERATIONS = 1000  # of power iterations; a few are enough (16 in the paper)


def find_init(name: str | bool) -> Init:
    """The initialisation `name`: a key of INITS, `pissa_niter_N`, or PEFT's True (kaiming) and False (random)."""
    if isinstance(name, bool):
        return kaiming if name else random
    if name in INITS:
        return INITS[name]
    match = re.fullmatch(r"pissa_niter_([0-9]+)", name)
    if match and len(match[1]) <= len(str(MOST_ITERATIONS)) and int(match[1]) <= MOST_ITERATIONS:
        return partial(fast_pissa, iterations=int(match[1]))
    choices = ", ".join([*INITS, f"pissa_niter_N with N up to {MOST_ITERATIONS}"])
    raise ConfigError(f"init_lora_weights={short(repr(name))} is not known: choose one of {choices}")


__all__ = ["INITS", "READS_WEIGHT", "Init", "Site", "Start", "embedding", "find_init"]
