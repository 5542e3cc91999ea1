"""PEFT's default start, from microsoft/loralib: A uniform, B zero."""

import math

from lowrank.core.init.base import Site, Start


def kaiming(site: Site) -> Start:
    """A ~ U(-1/√k, 1/√k), which is Kaiming's uniform law with slope √5; B = 0, so ΔW = 0."""
    return Start(site.uniform_a(1 / math.sqrt(site.k)), site.zero_b())
