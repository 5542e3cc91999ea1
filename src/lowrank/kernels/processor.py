"""What the processor can do, as far as a rule about speed may ask.

A rule holds for the instruction set that it was measured on; every other gets torch's own way. A lower one that torch
is held to (ATEN_CPU_CAPABILITY) counts as the processor's.
"""

from functools import cache
from pathlib import Path

import torch


@cache
def has_avx512() -> bool:
    """Whether torch uses AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def has_matrix_tiles() -> bool:
    """Whether this processor has AMX."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public name for it
    return has_avx512() and supported is not None and bool(supported())


@cache
def vendor() -> str:
    """The processor's maker as Linux tells it, empty where nothing does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
