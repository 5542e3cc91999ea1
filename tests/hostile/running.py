"""What the fuzz targets share: their command line, the loop over cases, and what is kept of those that break it."""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a case is fifty small files
LONGEST_MESSAGE = 1500  # characters that an error may take: what it quotes of a file is cut
Keep = Callable[[Path], Path]  # puts the case into a folder under a name of its own, and gives that


def options(doc: str | None) -> argparse.Namespace:
    """What is asked on the command line, of a process that is made quick and offline for it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    os.fsync = lambda _descriptor: None  # nothing here has to outlive a power cut
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=HERE)
    return parser.parse_args()


def search(asked: argparse.Namespace, case: Callable[[Path, int], tuple[str | None, Keep]]) -> int:
    """Run cases until time or number are up: how many were kept, at most 100, which is a status for the shell.

    case: makes case `number` somewhere in a folder, which is emptied afterwards, and says what is wrong, the end of a
    traceback, None for nothing. What breaks at a place that was seen before is not kept again.
    """
    end, number, seen = time.monotonic() + 60 * asked.minutes, 0, set()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as name:
        while number < asked.cases and time.monotonic() < end:
            folder = Path(name) / "case"
            folder.mkdir()
            fault, keep = case(folder, number)
            place = tuple((fault or "").replace(name, "").strip().splitlines()[-3:-1]) or (fault or "")[:40]
            if fault and place not in seen:
                seen.add(place)
                print(f"case {number} → {keep(asked.keep).name}\n{fault}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            number += 1
            if number % 1000 == 0:
                print(f"{number} cases, {len(seen)} kept", file=sys.stderr, flush=True)
    print(f"{number} cases, {len(seen)} kept", file=sys.stderr)
    return min(len(seen), 100)


def kept(folder: Path, where: Path, kind: str, more: str = "") -> Path:
    """A copy of a case, named by its kind and what it holds. more: what else makes it another one."""
    told = more + "".join(f"{name}{content!r}" for name, content in snapshot(folder).items())
    target = where / f"{kind}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True)
    return target


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
