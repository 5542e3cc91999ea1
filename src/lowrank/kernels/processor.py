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
def has_avx2_alone() -> bool:
    """Whether torch uses AVX2 here, and no more."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@cache
def has_matrix_tiles() -> bool:
    """Whether this processor has AMX."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public name for it
    return has_avx512() and supported is not None and bool(supported())


@cache
def half_products_are_slow(dtype: torch.dtype) -> bool:
    """Whether torch multiplies CPU matrices of this half dtype without oneDNN, by loops of its own.

    So it does on processors without AVX-512 (and, for float16, without AVX512-FP16): on an AMD with AVX2 x·W0ᵀ takes
    8 times as long in bfloat16 as in float32, and dY·W0 40 times (256 tokens, 768×768, one thread).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    asked = "_is_mkldnn_bf16_supported" if dtype is torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, asked, None)  # torch has no public name for it
    return supported is not None and not supported()


def warning_of_slow_products(dtype: torch.dtype, device: str) -> str:
    """What to know before a model of this dtype is run on this device; empty where there is nothing."""
    if device != "cpu" or not half_products_are_slow(dtype):
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"this processor has no fast {name} products ({torch.backends.cpu.get_cpu_capability()}): "
        "a layer takes about ten times as long as in float32, so choose float32 unless memory forbids it"
    )


@cache
def vendor() -> str:
    """The processor's maker as Linux tells it, empty where nothing does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
