"""The promise for damaged files holds: for what fuzzing once found, and for a few hundred fresh cases."""

import shutil
import sys
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent / "hostile"
sys.path.insert(0, str(HOSTILE))

import fuzz  # noqa: E402

KEPT = sorted(HOSTILE.glob("case-*"))


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_kept_cases(case: Path, tmp_path: Path) -> None:
    """What broke the promise once (why.txt says how) keeps it now."""
    folder = tmp_path / "case"
    shutil.copytree(case, folder, symlinks=True)
    assert fuzz.broken_promise(folder) is None


def test_fresh_cases(tmp_path: Path) -> None:
    """The first cases of the fuzz target's own sequence all keep the promise."""
    for number in range(200):
        folder = tmp_path / str(number)
        fuzz.make_case(folder, number, seed=0)
        assert fuzz.broken_promise(folder) is None, number
        shutil.rmtree(folder)


def test_unharmed_seeds_merge(tmp_path: Path) -> None:
    """The seeds themselves are good: without mutations every one of them merges."""
    import random

    from lowrank.merge.disk import merge_checkpoint

    for number in range(20):
        folder = tmp_path / str(number)
        fuzz.make_seed(folder, random.Random(number))
        assert merge_checkpoint(folder / "base", folder / "adapter", folder / "out").merged
