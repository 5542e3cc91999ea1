"""Claim: a second process on a second core takes a training's steps nearly twice as fast, with the same losses.

    python benchmarks/processes.py --out results.json [--dtype f32] [--rounds 3] [--processes 1 2]

`torchrun --nproc-per-node N -m lowrank train`, each process on one thread: the random Llama of `whole_training.py`, its
rows packed to 1,024 tokens, 2 packs a step. tokens_per_second is what the run's own log says, the median over all but
the first lines; `one, N threads` is a single process with as many threads as there are processes beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import conditions, keep
from whole_training import DTYPES, ROWS, STORIES, random_model

STEPS, BATCH = 5, 2
ASKED = [
    "--prompt-column", "mr", "--completion-column", "ref", "--targets", "all-linear", "--rank", "16", "--pack",
    "--max-length", "1024", "--steps", str(STEPS), "--batch-size", str(BATCH), "--micro-batch", "1", "--lr", "1e-3",
    "--log-every", "1", "--device", "cpu",
]  # fmt: skip


def training(folder: Path, dtype: str, processes: int, threads: int) -> dict[str, Any]:
    """One run of the command: its speed and its losses."""
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        asked = [
            "--model",
            str(folder / "random"),
            "--data",
            str(ROWS),
            "--out",
            f"{place}/run",
            "--dtype",
            DTYPES[dtype],
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "LOWRANK_CACHE": str(folder / "cache")}
        command = [sys.executable, *launched, "-m", "lowrank", "train", *asked, *ASKED]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = [json.loads(line) for line in Path(f"{place}/run/log.jsonl").read_text().splitlines()]
    told = [line for line in lines if "tokens_per_second" in line]
    return {"speed": statistics.median(t["tokens_per_second"] for t in told[1:]), "losses": [t["loss"] for t in told]}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (STORIES.is_dir() and ROWS.is_file()):
        raise SystemExit(f"needs {STORIES} and {ROWS}")
    jobs = {f"{n} process{'es' * (n > 1)}": (n, 1) for n in options.processes}
    jobs |= {f"one, {n} threads": (1, n) for n in options.processes if n > 1}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as place:
        random_model(Path(place) / "random")
        for _ in range(options.rounds):
            for name, how in jobs.items():
                found[name].append(training(Path(place), options.dtype, *how))
    speeds = {name: round(statistics.median(run["speed"] for run in runs), 1) for name, runs in found.items()}
    first, *others = found.values()
    apart = max(abs(a - b) / b for o in others for a, b in zip(o[0]["losses"], first[0]["losses"], strict=True))
    report = {
        "conditions": conditions(1),
        "dtype": options.dtype,
        "tokens_per_second": speeds,
        "losses_apart": apart,
    }
    keep(report, options.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
