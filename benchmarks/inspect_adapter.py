"""Claim: `lowrank inspect` of a 1.1 B-parameter all-linear r=16 adapter takes under 3 s and 300 MB, imports included.

Builds TinyLlama-shaped bfloat16 bases (2.2 GB each) and two adapters in a temporary folder, runs every job in a process
of its own, the jobs taking turns, and prints one JSON object with figures, commit and hardware.

    python benchmarks/inspect_adapter.py --folder /a/disk/with/5GB [--rounds 5] [--slow-rounds 2]
                                         [--out benchmarks/results/inspect_adapter.json]

adapter     lowrank inspect ADAPTER: the whole command
against     lowrank inspect ADAPTER --against OTHER
read        the base's bytes read once, front to back: the floor of the next
base        lowrank inspect ADAPTER --model BASE: amplification and intruder dimensions too
everything  lowrank inspect ADAPTER --model BASE --against OTHER --html FILE
flat        base, for weights of pure noise: the hard case, with singular values as close together as they can be. The
            base of the others has 64 directions above the noise, σ_i = 8·i^−0.6 times its edge, as trained weights do.

rss_mib is the largest resident set as the kernel counts it, pages of mapped files included; anon_mib is sampled every
2 ms and counts what cannot be given back to the page cache. cpu_s tells more than seconds where others use the machine.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from merge_disk import ALL_LINEAR, TINY, hardware, make_adapter, make_base

READ = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    block = bytearray(2**22)
    while file.readinto(block):
        pass
"""


def run(command: list[str]) -> dict[str, float]:
    """One process: its seconds, and its largest resident set and anonymous memory in MB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    largest, before = {"VmHWM": 0, "RssAnon": 0}, _cpu_seconds()
    while process.poll() is None:
        _sample(process.pid, largest)
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}: {process.stderr.read().decode()}")
    memory = {"rss_mib": largest["VmHWM"] / 1024, "anon_mib": largest["RssAnon"] / 1024}
    return {"seconds": seconds, "cpu_s": _cpu_seconds() - before} | memory


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sample(pid: int, largest: dict[str, int]) -> None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in largest:
            largest[name] = max(largest[name], int(value.split()[0]))


def raise_directions(flat: Path, folder: Path) -> None:
    """A copy of a base of noise with 64 directions of every matrix raised above it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(flat, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(flat / "model.safetensors")
    torch.manual_seed(2)
    for weight in tensors.values():
        if weight.ndim == 2:
            d, k = weight.shape
            edge = 0.02 * (d**0.5 + k**0.5)
            sigma = 8 * edge * torch.arange(1, 65).float() ** -0.6
            left, right = torch.randn(d, 64) / d**0.5 * sigma, torch.randn(64, k) / k**0.5
            weight.copy_(torch.addmm(weight.float(), left, right))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def jobs(folder: Path) -> dict[str, list[str]]:
    """{name: its command line}."""
    lowrank = str(Path(sys.executable).with_name("lowrank"))
    adapter, other, base, flat = (str(folder / name) for name in ("adapter", "other", "base", "flat"))
    inspect = [lowrank, "inspect", adapter]
    return {
        "adapter": inspect,
        "against": [*inspect, "--against", other],
        "read": [sys.executable, "-c", READ, str(folder / "base" / "model.safetensors")],
        "base": [*inspect, "--model", base],
        "everything": [*inspect, "--model", base, "--against", other, "--html", str(folder / "report.html")],
        "flat": [*inspect, "--model", flat],
    }


def main() -> None:
    """Build, measure, print, and delete what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to build: a disk with 5 GB free (default: the system's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help="rounds of the jobs that read the base")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"hardware": hardware()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_adapter(folder / "adapter", TINY, ALL_LINEAR)
        make_adapter(folder / "other", TINY, ALL_LINEAR, rank=8)
        make_base(folder / "flat", TINY, sparse=False)
        raise_directions(folder / "flat", folder / "base")
        runs: dict[str, list[dict[str, float]]] = {}
        for number in range(options.rounds):
            for job, command in jobs(folder).items():
                if number < options.slow_rounds or job in ("adapter", "against"):
                    runs.setdefault(job, []).append(run(command))
                    print(f"{job}: {runs[job][-1]}", file=sys.stderr)
        report["report_html_mb"] = (folder / "report.html").stat().st_size / 1e6
    report["median"] = {
        job: {key: round(statistics.median(figures[key] for figures in done), 2) for key in done[0]}
        for job, done in runs.items()
    }
    report["runs"] = runs
    report["hardware"]["load_average_after"] = os.getloadavg()
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
