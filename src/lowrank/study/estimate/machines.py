"""What machines hold and how fast they are: GPUs by their makers' data sheets, this machine as it is found.

memory in GB of 10⁹ bytes; bandwidth in GB/s; products: dense 16-bit matrix products and float32 ones (no sparsity, no
TF32) in TFLOP/s. Sources: NVIDIA's data sheets of T4, V100, A10, L4, L40S, A100, H100, H200 and RTX A6000, its
architecture papers of GA102, AD102 and GB202 (GeForce; 16-bit with float32 sums) and AMD's data sheet of MI300X.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.errors import ConfigError
from lowrank.study.doctor import PROBE, product_seconds
from lowrank.study.estimate.operation import Done, Seconds
from lowrank.study.estimate.replaying import Replayed

GPUS = {  # name: (memory, bandwidth, 16-bit, float32)
    "T4": (16, 320, 65, 8.1),
    "V100-32GB": (32, 900, 125, 15.7),
    "A10": (24, 600, 125, 31.2),
    "L4": (24, 300, 121, 30.3),
    "L40S": (48, 864, 362, 91.6),
    "A6000": (48, 768, 155, 38.7),
    "A100-40GB": (40, 1555, 312, 19.5),
    "A100-80GB": (80, 2039, 312, 19.5),
    "H100-PCIe": (80, 2000, 756, 51),
    "H100": (80, 3350, 989, 67),
    "H200": (141, 4800, 989, 67),
    "MI300X": (192, 5300, 1307, 163),
    "RTX-3090": (24, 936, 71, 35.6),
    "RTX-4090": (24, 1008, 165, 82.6),
    "RTX-5090": (32, 1792, 209, 104.8),
}
REACHED, STREAMED = 0.6, 0.8  # of the data sheet's products and bandwidth, as training code commonly gets them
LAUNCH = 6e-6  # seconds that a GPU needs for each operation, however small
RUNTIME = {"cpu": 400_000_000, "gpu": 700_000_000}  # bytes of Python and torch; of CUDA's context and libraries
KEPT = 0.05  # of a GPU's memory that its allocator cannot use, since free pieces do not fit
COPIED = 2**26  # bytes of the copy that is timed


@dataclass(frozen=True, slots=True)
class Rates:
    """operations: a second, in products; bandwidth: bytes a second; launch: seconds for any operation at least."""

    operations: float
    bandwidth: float
    launch: float

    def __call__(self, done: Done) -> float:
        """Seconds: each operation is as long as its arithmetic or its bytes take, whichever is longer."""
        return sum(
            times * max(one.arithmetic / self.operations, one.moved / self.bandwidth, self.launch)
            for one, times in done.items()
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """name: in words; kind: "cpu" or "gpu"; memory: bytes that a training may take, its runtime included."""

    name: str
    kind: str
    memory: int

    @property
    def room(self) -> int:
        """Bytes for tensors."""
        return max(0, round(self.memory * (1 - (KEPT if self.kind == "gpu" else 0))) - RUNTIME[self.kind])


def named_gpu(name: str) -> str:
    """The GPU of the table that is meant. Raises ConfigError, with the names there are, for any other."""
    plain = {one.lower().replace("-", "").replace(" ", ""): one for one in GPUS}
    found = plain.get(name.lower().replace("-", "").replace(" ", "").removeprefix("nvidia"))
    if found is None:
        raise ConfigError(f"--gpu {name}: not known, only {', '.join(GPUS)}; take the one most like it")
    return found


def machine_of(gpu: str | None, device: torch.device) -> Machine:
    """The GPU of that name, or where no name is given what this machine has free on `device`."""
    if gpu is not None:
        return Machine(gpu, "gpu", round(GPUS[gpu][0] * 1e9))
    if device.type == "cuda":
        return Machine(torch.cuda.get_device_name(device), "gpu", torch.cuda.mem_get_info(device)[0])
    return Machine("this machine", "cpu", _free_memory())


def pace_of(gpu: str | None, device: torch.device, dtype: torch.dtype) -> Seconds:
    """How long operations take: by a data sheet; on a processor each tried; on a GPU that is here by two that are."""
    if gpu is not None:
        _, bandwidth, half, single = GPUS[gpu]
        return Rates(REACHED * 1e12 * (half if dtype.itemsize == 2 else single), STREAMED * 1e9 * bandwidth, LAUNCH)
    rates = Rates(2 * PROBE**3 / product_seconds(dtype, device.type), _bandwidth(device), LAUNCH)
    return Replayed(rates) if device.type == "cpu" else rates


def _bandwidth(device: torch.device) -> float:
    """Bytes read and written a second, by the best of three copies."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * COPIED / (time.perf_counter() - began))
    return best


def _free_memory() -> int:
    """Bytes that this machine can give, as Linux counts them; elsewhere all it has."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
