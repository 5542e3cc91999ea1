"""The paper's start: A Gaussian, B zero."""

from lowrank.core.init.base import Site, Start


def gaussian(site: Site) -> Start:
    """A ~ N(0, 1/r) with 1/r the standard deviation, as PEFT's "gaussian"; B = 0, so ΔW = 0 (Hu et al. 2022, §4.1)."""
    return Start(site.normal_a(1 / site.rank), site.zero_b())
