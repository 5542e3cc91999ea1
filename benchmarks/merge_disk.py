"""Claim: merging 1.1 B parameters on disk takes at most 1.2× `cp` + fsync, at least 7× less than PEFT, in under 200 MB.

Builds a TinyLlama-shaped bfloat16 base of random weights (2.2 GB) and adapters of rank 16 in a temporary folder, runs
every job in a process of its own, and prints one JSON object with the figures, the commit and the hardware.

    python benchmarks/merge_disk.py --folder /a/disk/with/30GB [--rounds 3] [--peft] [--large] [--out results.json]

cp        copies the same files and syncs them: the floor
merge     `lowrank merge`, all linear layers (and q, v only), verification included; whole command, and without imports
PEFT      load, load adapter, merge_and_unload, save_pretrained
cold      the same after the base's pages are dropped from the cache
--large   a sparse base of 8 B parameters of the same layout, for the memory
RssAnon is sampled every 2 ms by the benchmark; it is the memory that a process cannot give back to the page cache.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = {"hidden": 2048, "inner": 5632, "layers": 22, "kv": 256, "vocab": 32000}
LARGE = {"hidden": 4096, "inner": 14336, "layers": 32, "kv": 1024, "vocab": 128256}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers_of(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """{name: (d, k)} of one block's linear layers."""
    h, i, kv = sizes["hidden"], sizes["inner"], sizes["kv"]
    attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
    mlp = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def tensors_of(sizes: dict[str, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a whole Llama."""
    h = sizes["hidden"]
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("model.embed_tokens.weight", "BF16", (sizes["vocab"], h))]
    for layer in range(sizes["layers"]):
        at = f"model.layers.{layer}."
        tensors += [(f"{at}{name}.weight", "BF16", shape) for name, shape in layers_of(sizes).items()]
        tensors += [(f"{at}{norm}.weight", "BF16", (h,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    return [*tensors, ("model.norm.weight", "BF16", (h,)), ("lm_head.weight", "BF16", (sizes["vocab"], h))]


def config_of(sizes: dict[str, int]) -> dict[str, Any]:
    """A config.json that transformers loads."""
    heads = sizes["hidden"] // 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["inner"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv"] // 64,
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def make_base(folder: Path, sizes: dict[str, int], sparse: bool) -> None:
    """A Llama of random weights, or one of zeros whose file takes no room."""
    make_file(folder, tensors_of(sizes), config_of(sizes), sparse)


def make_file(
    folder: Path, tensors: list[tuple[str, str, tuple[int, ...]]], config: dict[str, Any], sparse: bool
) -> None:
    """A checkpoint of these tensors, (name, dtype, shape), in one file."""
    from lowrank.files.safetensors import build_layout

    folder.mkdir()
    layout = build_layout(tensors, {"format": "pt"})
    torch.manual_seed(0)
    noise = torch.randn(2**22).mul_(0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(layout.header)
        left = 0 if sparse else layout.size - len(layout.header)
        while left > 0:
            file.write(noise[: min(left, len(noise))])
            left -= len(noise)
        file.truncate(layout.size)
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_adapter(folder: Path, sizes: dict[str, int], names: tuple[str, ...], rank: int = 16) -> None:
    """A PEFT adapter with B ≠ 0 and alpha ≠ r."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for layer in range(sizes["layers"]):
        for name, (d, k) in layers_of(sizes).items():
            if name.rpartition(".")[2] in names:
                at = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(rank, k) * 0.01
                tensors[f"{at}.lora_B.weight"] = torch.randn(d, rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "lora_dropout": 0.0}
    config |= {"target_modules": sorted(names), "bias": "none", "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
import os
for name in os.listdir(out):
    with open(os.path.join(out, name)) as file:
        os.fsync(file.fileno())
"""

# A virtual machine's host takes back memory that lay free for two seconds, and handing it out again costs more than all
# else measured here (3.0 s instead of 0.6 s for 2.2 GB of page cache). So both start right after a copy that was
# made and removed, whose memory they get.
READY = """
import json, os, shutil, subprocess, sys, time, torch
import lowrank.merge.disk
base, adapter, out = sys.argv[1:]
subprocess.run(["cp", "-r", base, out], check=True)
for name in os.listdir(out):
    with open(os.path.join(out, name)) as file:
        os.fsync(file.fileno())
shutil.rmtree(out)
cores = lambda: sum(os.times()[:4])
before, started = cores(), time.perf_counter()
"""

MERGE = (
    READY
    + """
report = lowrank.merge.disk.merge_checkpoint(base, adapter, out)
spent = {"seconds": time.perf_counter() - started, "cores_s": cores() - before}
print(json.dumps(spent | {"stages": report.seconds}))
"""
)

COPY = (
    READY
    + """
subprocess.run(["cp", "-r", base, out], check=True)
copied = time.perf_counter() - started
for name in os.listdir(out):
    with open(os.path.join(out, name)) as file:
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.perf_counter() - started, "cores_s": cores() - before, "copied": copied}))
"""
)


def run(arguments: list[str]) -> dict[str, float]:
    """One process: seconds of the whole command and of its cores, what it says of itself, its peak RssAnon in MB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{arguments[:4]} ended with {process.returncode}")
    line = output.decode().strip().splitlines()[-1:] or ["{}"]
    said = json.loads(line[0]) if line[0].startswith("{") else {}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"whole_s": whole, "cpu_s": cpu, "rss_anon_mb": peak[0] / 1e3} | said


def _watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.returncode is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]))
        time.sleep(0.002)


def drop_from_cache(folder: Path) -> None:
    """Forget the pages of the folder's files, so that the next reader reads the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def jobs(folder: Path, base: Path, peft: bool) -> dict[str, Callable[[Path], list[str]]]:
    """{name: its command line, given the folder to write}."""
    python, lowrank = sys.executable, str(Path(sys.executable).with_name("lowrank"))
    everything, few = folder / "all-linear", folder / "q-v"
    table: dict[str, Callable[[Path], list[str]]] = {
        "cp": lambda out: [python, "-c", COPY, str(base), "-", str(out)],
        "merge": lambda out: [python, "-c", MERGE, str(base), str(everything), str(out)],
        "merge q, v": lambda out: [python, "-c", MERGE, str(base), str(few), str(out)],
        "merge command": lambda out: [
            *(lowrank, "merge", "--model", str(base), "--adapter", str(everything), "--out", str(out))
        ],
    }
    if peft:
        table["PEFT"] = lambda out: [python, "-c", PEFT, str(base), str(everything), str(out)]
    return table


def measure(folder: Path, base: Path, rounds: int, peft: bool, cold: bool) -> dict[str, list[dict[str, float]]]:
    """Every job `rounds` times, the jobs taking turns, so that a noisy minute strikes all of them."""
    table = jobs(folder, base, peft)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in table}
    for number in range(rounds):
        for name, command in table.items():
            if name == "PEFT" and number >= 2:
                continue
            out = folder / "result"
            os.sync()
            if cold:
                drop_from_cache(base)
            figures = run(command(out))
            shutil.rmtree(out)
            results[name].append(figures)
            print(f"{'cold' if cold else 'warm'} {name}: {figures}", file=sys.stderr)
    return results


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """The figures of the claim: medians over the rounds."""
    keys = ("seconds", "cores_s", "whole_s", "cpu_s")
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in keys if key in runs[0]}
        for name, runs in results.items()
    }
    ratios = {
        "merge over cp": middle["merge"]["seconds"] / middle["cp"]["seconds"],
        "merge over cp, seconds of cores": middle["merge"]["cores_s"] / middle["cp"]["cores_s"],
        "merge q, v over cp": middle["merge q, v"]["seconds"] / middle["cp"]["seconds"],
        "merge RssAnon MB": max(run["rss_anon_mb"] for run in results["merge command"]),
    }
    if "PEFT" in middle:
        ratios["PEFT over merge command"] = middle["PEFT"]["whole_s"] / middle["merge command"]["whole_s"]
        ratios["PEFT RssAnon MB"] = max(run["rss_anon_mb"] for run in results["PEFT"])
    return ratios


def hardware() -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Build, measure, print, and delete what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to build: a disk with 30 GB free (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="measure the peer in the same run")
    parser.add_argument("--cold", action="store_true", help="measure after dropping the base from the cache, too")
    parser.add_argument("--large", action="store_true", help="merge a sparse base of 8 B parameters, for the memory")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    report: dict[str, Any] = {"hardware": hardware()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_adapter(folder / "all-linear", TINY, ALL_LINEAR)
        make_adapter(folder / "q-v", TINY, ("q_proj", "v_proj"))
        make_base(folder / "base", TINY, sparse=False)
        for cache in ["warm", "cold"] if options.cold else ["warm"]:
            runs = measure(folder, folder / "base", options.rounds, options.peft, cache == "cold")
            report[cache] = {"summary": summary(runs), "runs": runs}
        if options.large:
            shutil.rmtree(folder / "base")
            make_adapter(folder / "large", LARGE, ALL_LINEAR)
            make_base(folder / "base", LARGE, sparse=True)
            command = [sys.executable, "-c", MERGE, str(folder / "base"), str(folder / "large"), str(folder / "result")]
            report["large"] = run(command)
    report["hardware"]["load_average_after"] = os.getloadavg()
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
