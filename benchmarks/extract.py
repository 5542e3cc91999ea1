"""Claim: extracting rank 16 takes at least 10× less than a full SVD of every change, at equal energy within 0.1 %.

mergekit-extract-lora decomposes every change by torch.linalg.svd(full_matrices=False) in float32; so does the yardstick
here, on the same matrices in the same process. Prints one JSON object with the figures, the commit and the hardware.

    python benchmarks/extract.py [--folder /a/disk/with/5GB] [--threads 1] [--out benchmarks/results/extract.json]

matrices  changes of a TinyLlama's shapes with three spectra: `decaying`, σ_i ~ 1/√i up to rank 256 plus the rounding of
          a bfloat16 base; `flat`, Gaussian noise, the hardest there is; `low`, rank 16 plus that rounding, as a merged
          adapter leaves it. Seconds are the process's own on `--threads` threads; energy is the share kept at rank 16.
whole     with --folder: `extract_adapter` of a 1.1 B-parameter bfloat16 model (155 matrices, head included), from disk
          to disk, against the full SVDs of its 154 layers by the figures above (they would take an hour together).
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
from merge_disk import TINY, hardware, layers_of, make_base, run
from torch import Tensor

from lowrank.core.exact import decompose
from lowrank.core.randomised import Dense, compress
from lowrank.core.truncation import Cut

RANK, SIZE = 16, 0.02
SHAPES = [(256, 2048), (2048, 2048), (5632, 2048)]
EXTRACT = """
import json, sys, time
from lowrank.adapters.extract import extract_adapter
base, tuned, out = sys.argv[1:]
started = time.perf_counter()
report = extract_adapter(base, tuned, out, rank=16)
figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time(), "modules": len(report.modules)}
worst = max(module.shortfall for module in report.modules)
print(json.dumps(figures | {"kept": report.kept, "worst_shortfall": worst}))
"""


def rounded(change: Tensor) -> Tensor:
    """The change as two bfloat16 checkpoints show it."""
    base = torch.randn(change.shape) * SIZE
    base = base.bfloat16().float()
    return (base + change).bfloat16().float() - base


def low_rank(d: int, k: int, sigma: Tensor) -> Tensor:
    """A change with about these singular values, in random directions."""
    r = len(sigma)
    return (torch.randn(d, r) / d**0.5 * sigma) @ (torch.randn(r, k) / k**0.5)


CHANGES = {
    "decaying": lambda d, k: rounded(low_rank(d, k, 2.0 / torch.arange(1, min(d, k, 256) + 1).sqrt())),
    "flat": lambda d, k: torch.randn(d, k) * 1e-3,
    "low": lambda d, k: rounded(low_rank(d, k, torch.full((16,), 2.0))),
}


def measure(d: int, k: int, kind: str, rounds: int) -> dict[str, Any]:
    """One matrix, both ways."""
    torch.manual_seed(0)
    matrix = CHANGES[kind](d, k)
    started = time.process_time()
    best = decompose(matrix, Cut(RANK))
    full = time.process_time() - started
    seconds = []
    for seed in range(rounds):
        started = time.process_time()
        ours = compress(Dense(matrix), Cut(RANK), seed=seed)
        seconds.append(time.process_time() - started)
    fast = statistics.median(seconds)
    return {
        "shape": [d, k],
        "kind": kind,
        "full_svd_s": full,
        "extract_s": fast,
        "times_faster": full / fast,
        "energy_full": best.kept,
        "energy_extract": ours.kept,
        "energy_lost": 1 - ours.kept / best.kept,
        "shortfall_told": ours.shortfall,
    }


def make_tuned(base: Path, tuned: Path) -> None:
    """The base with a change of the kind `decaying` in every matrix of a layer and in the head."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(2)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "embed" not in name:
            sigma = 2.0 / torch.arange(1, min(*tensor.shape, 256) + 1).sqrt()
            tensors[name] = (tensor.float() + low_rank(*tensor.shape, sigma)).bfloat16()
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())


def whole(folder: Path, matrices: list[dict[str, Any]]) -> dict[str, Any]:
    """The model from disk to disk, and what full SVDs of the same matrices would take."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        base, tuned = Path(name) / "base", Path(name) / "tuned"
        make_base(base, TINY, sparse=False)
        make_tuned(base, tuned)
        ours = run([sys.executable, "-c", EXTRACT, str(base), str(tuned), str(Path(name) / "out")])
    full = {tuple(one["shape"]): one["full_svd_s"] for one in matrices if one["kind"] == "decaying"}
    shapes = [tuple(sorted(shape, reverse=True)) for shape in layers_of(TINY).values()]
    seconds = TINY["layers"] * sum(full.get(shape, full.get(shape[::-1], 0.0)) for shape in shapes)
    return ours | {"full_svd_of_the_layers_s": seconds, "times_faster_in_cpu_s": seconds / ours["cpu_s"]}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrices = [measure(d, k, kind, options.rounds) for d, k in SHAPES for kind in CHANGES]
    result = {"claim": str(__doc__).partition("\n")[0], "hardware": hardware(), "threads": options.threads}
    result |= {"rank": RANK, "matrices": matrices}
    if options.folder:
        result["whole"] = whole(options.folder, matrices)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
