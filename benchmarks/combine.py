"""Claim: 8 all-linear adapters of 1.1 B parameters combine exactly, at rank 16, in under 10 s with no d×k matrix.

Builds 8 adapters of rank 16 for a TinyLlama-shaped model in a temporary folder and prints one JSON object with the
figures, the commit and the hardware.

    python benchmarks/combine.py --folder /a/disk/with/2GB [--rounds 3] [--out benchmarks/results/combine.json]

command   `lowrank combine --method linear --rank 16`: the whole command, imports included
library   `combine_adapters(...)` within such a process: reading, QR, small SVD, writing and syncing; cpu_s is what all
          threads of the process used together, imports included, which other programs on the machine disturb little
peft      PEFT's add_weighted_adapter("svd") of 8 such adapters on one layer of each shape, on one thread, in CPU
          seconds, times the layers there are
largest   the largest number of elements of any tensor made while each shape is combined, against its d·k
RssAnon is sampled every 2 ms.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from merge_disk import ALL_LINEAR, TINY, hardware, layers_of, make_adapter, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ADAPTERS, RANK = 8, 16
LIBRARY = """
import json, sys, time
from lowrank.adapters.combine import combine_adapters
*adapters, out = sys.argv[1:]
started = time.perf_counter()
report = combine_adapters([(folder, 0.125) for folder in adapters], out, rank=16)
figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time()}
print(json.dumps(figures | {"kept": report.kept, "modules": len(report.modules)}))
"""


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def make_different(folder: Path, seed: int) -> None:
    """Other random factors in the adapter's file, so that eight adapters have eight times the rank of one."""
    generator = torch.Generator().manual_seed(seed)
    file = folder / "adapter_model.safetensors"
    tensors = {key: torch.randn(t.shape, generator=generator) * 0.01 for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def largest_tensors() -> dict[str, dict[str, int]]:
    """{d×k: elements of the largest tensor made, and d·k}."""
    from lowrank.core.combination import METHODS, Options, Term

    found = {}
    for d, k in sorted(set(layers_of(TINY).values())):
        terms = [Term(torch.randn(RANK, k), torch.randn(d, RANK), 0.25) for _ in range(ADAPTERS)]
        with Largest() as largest:
            METHODS["linear"](terms, Options(rank=RANK))
        found[f"{d}x{k}"] = {"largest": largest.elements, "dense": d * k}
    return found


def peft_svd() -> dict[str, float]:
    """{d×k: seconds of PEFT's svd combination of one such layer}, and their sum over the layers of the model."""
    import peft

    torch.set_num_threads(1)
    seconds = {}
    for d, k in sorted(set(layers_of(TINY).values())):
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(k, d, bias=False))
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=["layer"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config, adapter_name="0")
        names = [str(number) for number in range(ADAPTERS)]
        for name in names[1:]:
            wrapped.add_adapter(name, config)
        started = time.process_time()
        wrapped.add_weighted_adapter(names, [0.125] * ADAPTERS, "all", combination_type="svd", svd_rank=RANK)
        seconds[f"{d}x{k}"] = time.process_time() - started
    counts = [f"{d}x{k}" for d, k in layers_of(TINY).values()]
    return seconds | {"all_layers": TINY["layers"] * sum(seconds[shape] for shape in counts)}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lowrank = str(Path(sys.executable).with_name("lowrank"))
    figures: dict[str, Any] = {"command": [], "library": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        folders = [folder / f"adapter{number}" for number in range(ADAPTERS)]
        for number, place in enumerate(folders):
            make_adapter(place, TINY, ALL_LINEAR, RANK)
            make_different(place, number)
        flags = [word for place in folders for word in ("--adapter", f"{place}:0.125")]
        for round_number in range(options.rounds):
            out = str(folder / f"out{round_number}")
            figures["library"].append(run([sys.executable, "-c", LIBRARY, *map(str, folders), out]))
            command = [lowrank, "combine", *flags, "--rank", str(RANK), "--out", out + "c"]
            figures["command"].append(run(command))
    figures["command_s"] = statistics.median(one["whole_s"] for one in figures["command"])
    figures["library_s"] = statistics.median(one["seconds"] for one in figures["library"])
    figures["largest"] = largest_tensors()
    figures["peft_svd_s"] = peft_svd()
    figures["load_average"] = os.getloadavg()
    result = {"claim": str(__doc__).partition("\n")[0], "hardware": hardware(), **figures}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
