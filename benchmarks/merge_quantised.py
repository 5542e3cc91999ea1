"""Claim: merging into a 1.1 B NF4 checkpoint onto 16bit takes at most 2× the writing of the result, in flat memory.

Builds a TinyLlama-shaped checkpoint as bitsandbytes stores it (NF4, blocks of 64, random numbers) and an adapter of
rank 16 on all linear layers in a temporary folder, and runs every job in a process of its own.

    python benchmarks/merge_quantised.py --folder /a/disk/with/10GB [--rounds 3] [--out results.json]

write     copies the result's files and syncs them: the floor
merge     `merge_checkpoint(onto="16bit")`, verification included; its own time and the whole process's
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from merge_disk import ALL_LINEAR, COPY, MERGE, TINY, config_of, hardware, make_adapter, run, tensors_of
from safetensors.torch import save_file

BLOCK = 64
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def make_base(folder: Path) -> None:
    """The checkpoint: every linear layer but the head in NF4."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, _, shape in tensors_of(TINY):
        if name.split(".")[-2] not in ALL_LINEAR:
            tensors[name] = torch.randn(shape).mul_(0.02).bfloat16()
            continue
        numbers = math.prod(shape)
        tensors[name] = torch.randint(0, 256, (numbers // 2, 1), dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.rand(numbers // BLOCK) * 0.05 + 0.02
        tensors[f"{name}.quant_map"] = torch.tensor(NF4)
        said = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = state
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantiser = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config_of(TINY) | {"quantization_config": quantiser}))


def main() -> None:
    """Measure, print, and keep where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {"write": [], "merge": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_base(folder / "base")
        make_adapter(folder / "adapter", TINY, ALL_LINEAR)
        for _ in range(options.rounds):
            jobs = {"merge": (MERGE, "base", "merged"), "write": (COPY, "merged", "copy")}
            for job, (script, source, target) in jobs.items():
                shutil.rmtree(folder / target, ignore_errors=True)
                command = [sys.executable, "-c", script]
                results[job].append(run([*command, *(str(folder / n) for n in (source, "adapter", target))]))
    ratio = statistics.median(
        m["seconds"] / w["seconds"] for m, w in zip(results["merge"], results["write"], strict=True)
    )
    report = {"hardware": hardware(), "over_writing": round(ratio, 3), "runs": results}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
