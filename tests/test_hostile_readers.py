"""The readers' promise holds: for what fuzzing once found (tests/hostile/reader-*), and for some fresh cases."""

import shutil
import sys
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent / "hostile"
sys.path.insert(0, str(HOSTILE))

import readers  # noqa: E402

KEPT = sorted(HOSTILE.glob("reader-*"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """One sound adapter of every kind."""
    folder = tmp_path_factory.mktemp("seeds")
    readers.make_seeds(folder)
    return folder


@pytest.mark.parametrize("kind", readers.KINDS)
def test_the_seeds_are_sound(seeds, tmp_path, kind):
    """Without damage every reader answers, so a refusal is the damage's."""
    folder = shutil.copytree(seeds / kind, tmp_path / kind)
    for call in readers.calls(folder, kind):
        if kind != "whole":  # its full copies and tables are what mlx-lm and loralib cannot hold
            call()
    assert readers.broken_promise(folder, kind) is None


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_kept_cases(case, tmp_path):
    """What broke the promise once keeps it now; kind.txt says what it was."""
    folder = shutil.copytree(case, tmp_path / "case", symlinks=True)
    assert readers.broken_promise(folder, (case / "kind.txt").read_text().split()[0]) is None


def test_fresh_cases(seeds, tmp_path):
    """The first cases of the fuzz target's own sequence."""
    for number in range(140):
        folder = tmp_path / str(number)
        kind = readers.make_case(seeds, folder, number, seed=0)
        assert readers.broken_promise(folder, kind) is None, (number, kind)
        shutil.rmtree(folder)
