"""Goal: merging every expert of a 2 B mixture on disk takes at most 1.3× `cp` + fsync on an idle machine of two cores.

Builds a Qwen3-MoE-shaped bfloat16 base of random weights (8 experts a layer, 4 GB), its experts one by one or, with
--stacked, as stacks, and an adapter of rank 8 on all of them in a temporary folder; copies and merges it in turns, a
process each, and prints one JSON object with the figures, the commit and the hardware. What the processes do is that of
benchmarks/merge_disk.py; imports are left out of both, transformers' table of conversions among them (a second or two).
No figure is kept yet: none was taken on an idle machine.

    python benchmarks/merge_experts.py --folder /a/disk/with/15GB [--rounds 3] [--stacked] [--layers 16] [--out r.json]
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from merge_disk import COPY, MERGE, hardware, make_file, run

IMPORTS = "import transformers.conversion_mapping\n"
HIDDEN, INNER, EXPERTS, VOCAB, RANK = 2048, 2560, 8, 32000, 8


def tensors_of(layers: int, stacked: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the whole model; attention is left small."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))]
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp.experts"
        if stacked:
            tensors.append((f"{at}.gate_up_proj", "BF16", (EXPERTS, 2 * INNER, HIDDEN)))
            tensors.append((f"{at}.down_proj", "BF16", (EXPERTS, HIDDEN, INNER)))
        for expert in range(0 if stacked else EXPERTS):
            tensors += [(f"{at}.{expert}.{name}.weight", "BF16", (INNER, HIDDEN)) for name in ("gate_proj", "up_proj")]
            tensors.append((f"{at}.{expert}.down_proj.weight", "BF16", (HIDDEN, INNER)))
    return tensors


def make_adapter(folder: Path, layers: int) -> None:
    """A PEFT adapter of both stacks of every layer, with B ≠ 0 and alpha ≠ r."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, d, k in ((f"{at}.base_layer", 2 * INNER, HIDDEN), (at, HIDDEN, INNER)):
            tensors[f"{name}.lora_A.weight"] = torch.randn(EXPERTS * RANK, k) * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(d, EXPERTS * RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    stacks = ["experts.down_proj", "experts.gate_up_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [], "target_parameters": stacks}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Build, measure, print, and delete what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to build: a disk with 15 GB free (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--stacked", action="store_true", help="a base that stores whole stacks")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"hardware": hardware(), "stacked": options.stacked}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_adapter(folder / "adapter", options.layers)
        make_file(
            folder / "base", tensors_of(options.layers, options.stacked), {"model_type": "qwen3_moe"}, sparse=False
        )
        runs: dict[str, list[dict[str, float]]] = {"cp": [], "merge": []}
        for _ in range(options.rounds):
            for job, script in (("cp", COPY), ("merge", IMPORTS + MERGE)):
                out = folder / "result"
                runs[job].append(
                    run([sys.executable, "-c", script, *map(str, (folder / "base", folder / "adapter", out))])
                )
                shutil.rmtree(out)
    cores = {job: statistics.median(one["cores_s"] for one in found) for job, found in runs.items()}
    middle = {job: statistics.median(one["seconds"] for one in found) for job, found in runs.items()}
    report["gigabytes"] = sum(2 * torch.Size(t[2]).numel() for t in tensors_of(options.layers, options.stacked)) / 1e9
    report["summary"] = {
        "merge over cp": middle["merge"] / middle["cp"],
        "merge over cp, seconds of cores": cores["merge"] / cores["cp"],
        "merge RssAnon MB": max(one["rss_anon_mb"] for one in runs["merge"]),
    }
    report["runs"] = runs
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
