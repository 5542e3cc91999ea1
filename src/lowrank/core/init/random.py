"""A start that already changes the model, for tests."""

from lowrank.core.init.base import Site, Start


def random(site: Site) -> Start:
    """A and B ~ U(-1/√k, 1/√k) and U(-1/√r, 1/√r), so ΔW ≠ 0: what PEFT's init_lora_weights=False gives."""
    a = site.uniform_a(site.k**-0.5)
    bound = site.rank**-0.5
    return Start(a, site.zero_b().uniform_(-bound, bound))
