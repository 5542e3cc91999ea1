"""The suite on other machines, as far as one machine can be another: `make tour`.

    python scripts/tour.py                 # every stop, one after the other
    python scripts/tour.py avx2 order      # these stops
    python scripts/tour.py --list

A stop is the whole suite under one setting: an instruction set, a thread count, an order, a locale, a home that cannot
be written, a folder with an awkward name, no powers of root. Other Pythons have an environment of their own (torch is
large): `make tour PYTHONS="python3.12 python3.13"`. Ends with status 1 where a stop failed, and says which tests did.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
AWKWARD = "ein Pfad mit Leerzeichen und Ümläuten"
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # root's own files, none of root's powers


class Stop(NamedTuple):
    """One setting: variables of the environment, arguments for pytest, words before the command, a folder to be in."""

    environment: Mapping[str, str] = MappingProxyType({})
    arguments: Sequence[str] = ()
    before: Sequence[str] = ()
    folder: Callable[[Path], Path] = lambda _: ROOT


def _copied(place: Path) -> Path:
    """The project's files in a folder with an awkward name, shared/ beside it where it is beside the project."""
    target = place / AWKWARD / "lowrank"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    if (ROOT.parent / "shared").is_dir():
        (target.parent / "shared").symlink_to(ROOT.parent / "shared")
    return target


STOPS = {
    "as it is": Stop(),
    "default": Stop({"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Stop({"ATEN_CPU_CAPABILITY": "avx2"}),
    "cbwr": Stop({"MKL_CBWR": "COMPATIBLE"}),
    "two threads": Stop({"LOWRANK_TEST_THREADS": "2"}),
    "order": Stop(arguments=["--random-order", "--random-order-bucket=global"]),
    "one process": Stop(arguments=["-n", "0"]),
    "C locale": Stop({"LC_ALL": "C", "LANG": "C"}),
    "home": Stop({"HOME": "read-only"}, before=POWERLESS),
    "path": Stop(folder=_copied),
}


def run(stop: Stop) -> tuple[int, str, float]:
    """(exit status, output, seconds) of the suite at one stop."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tour-")))
        environment = {**os.environ, **stop.environment}
        if environment.get("HOME") == "read-only":
            (place / "home").mkdir(mode=0o555)
            environment["HOME"] = str(place / "home")
            for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "MPLCONFIGDIR"):
                environment.pop(variable, None)
        folder = stop.folder(place)
        environment["PYTHONPATH"] = str(folder / "src")
        before = [] if os.geteuid() != 0 or shutil.which("setpriv") is None else list(stop.before)
        command = [*before, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *stop.arguments]
        started = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def main(wanted: Sequence[str]) -> int:
    """Run the stops named, or all; print a line for each and the failures under it."""
    if "--list" in wanted:
        print("\n".join(STOPS))
        return 0
    if unknown := [name for name in wanted if name not in STOPS]:
        print(f"no such stop: {', '.join(unknown)}; there are {', '.join(STOPS)}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted or STOPS:
        status, output, seconds = run(STOPS[name])
        lines = output.splitlines()
        counts = next(
            (line.strip("= ") for line in reversed(lines) if " passed" in line or " failed" in line), "no count"
        )
        print(f"{name:<12} {'ok' if status == 0 else 'FAILED':<7} {seconds:5.0f} s  {counts}", flush=True)
        if status:
            failed.append(name)
            told = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-5:]
            print("\n".join(f"    {line}" for line in told), flush=True)
    print(f"{len(failed)} stops failed: {', '.join(failed)}" if failed else "every stop passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
