"""Break the library on purpose, one term at a time, and see that its laws notice.

Every mutation in mutations.py replaces one piece of the source in a copy of it; the law tests then run against the copy
and must fail. A mutant that survives means that a law is missing. The mutations are what a slip would look like: a
dropped scale, a forgotten bias, a transposition, one adapter of several, the rows of another part.

    python scripts/mutation_check.py [NAME ...] [--list] [--jobs N]

Prints a table; exit status 1 where a mutant survived, 2 where a mutation no longer fits the source.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations import ANSWERS, GRADIENTS, IDENTITY, MERGE, MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lowrank"
PATIENCE = 900  # seconds for the laws on one mutant; a break that makes them endless is noticed too


LAWS = (ANSWERS, GRADIENTS, IDENTITY, MERGE)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: the first test that failed, or None where it survived, and how long it took."""

    killer: str | None
    seconds: float


def misfits(names: list[str]) -> list[str]:
    """The mutations whose source text is not there exactly once, in words."""
    return [
        f"{name}: {MUTATIONS[name].find!r} is not once in {MUTATIONS[name].file}"
        for name in names
        if MUTATIONS[name].applied((SOURCE / MUTATIONS[name].file).read_text(encoding="utf-8")) is None
    ]


def try_mutant(mutation: Mutation) -> Verdict:
    """Run the law tests against a mutated copy of the source."""
    begun = time.perf_counter()
    killer = first_failure_of(mutation, (mutation.tests, *(test for test in LAWS if test != mutation.tests)))
    return Verdict(killer, time.perf_counter() - begun)


def first_failure_of(mutation: Mutation, tests: tuple[str, ...]) -> str | None:
    """The first of these tests that fails on a mutated copy of the source, or None."""
    with tempfile.TemporaryDirectory(prefix="lowrank-mutant-") as folder:
        copy = Path(folder) / "lowrank"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        target = copy / mutation.file
        mutated = mutation.applied(target.read_text(encoding="utf-8"))
        assert mutated is not None
        target.write_text(mutated, encoding="utf-8")
        return _run(folder, tests)


def _run(path: str, tests: tuple[str, ...]) -> str | None:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-rfE",
    ]
    files = [str(ROOT / "tests" / test) for test in tests]
    try:
        done = subprocess.run(
            [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {PATIENCE} s"
    if done.returncode == 0:
        return None
    if done.returncode != 1:
        raise SystemExit(f"the tests could not run:\n{done.stdout}{done.stderr}")
    first = next(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return first.split(" - ")[0].partition(" ")[2].partition("::")[2]


def main() -> int:
    """Try the named mutants, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the mutants to try (default: all)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="how many to try at a time")
    parser.add_argument("--list", action="store_true", help="only name the mutants")
    arguments = parser.parse_args()
    names = arguments.names or list(MUTATIONS)
    if arguments.list:
        print("\n".join(MUTATIONS))
        return 0
    if unknown := [name for name in names if name not in MUTATIONS]:
        parser.error(f"no mutant is called {', '.join(map(repr, unknown))}; --list names them")
    if faults := misfits(names):
        print("these mutations no longer fit the source:", *faults, sep="\n  ", file=sys.stderr)
        return 2
    return _report(names, arguments.jobs)


def _report(names: list[str], jobs: int) -> int:
    width = max(map(len, names))
    survivors = 0
    with ThreadPoolExecutor(jobs) as pool:
        for name, verdict in zip(names, pool.map(try_mutant, (MUTATIONS[name] for name in names)), strict=True):
            survivors += verdict.killer is None
            fate = "SURVIVED" if verdict.killer is None else f"killed by {verdict.killer}"
            print(f"{name.ljust(width)}  {verdict.seconds:5.1f} s  {fate}", flush=True)
    print(f"{len(names) - survivors} of {len(names)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
