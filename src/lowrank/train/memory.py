"""How much memory a run has taken so far at its height, and how much there is."""

import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, what tensors took there; on a CPU, what of this process was resident, Python and all."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _linux() if STATUS.exists() else _elsewhere()


def memory_of(device: torch.device) -> int | None:
    """Bytes that a GPU has; None for a CPU, whose processes share what there is."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _linux() -> int:
    """From the kernel's own record: `getrusage` counts what a process was forked from too."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _elsewhere() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
