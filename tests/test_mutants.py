"""The laws notice when a term of the library is broken; see scripts/mutation_check.py."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import mutation_check as check


def test_every_mutation_still_fits_the_source() -> None:
    assert check.misfits(list(check.MUTATIONS)) == []


@pytest.mark.parametrize("name", ["linear: no scale", "merge: one adapter of several"])
def test_a_broken_term_is_noticed(name: str) -> None:
    assert check.try_mutant(check.MUTATIONS[name]).killer is not None


def test_code_that_is_not_broken_survives() -> None:
    """The check itself can tell: a mutation of a comment kills no test."""
    harmless = check.Mutation("core/scaling.py", "How strongly", "How much", check.MERGE)
    assert check.first_failure_of(harmless, (harmless.tests,)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", check.MUTATIONS)
def test_every_mutant_is_killed(name: str) -> None:
    assert check.try_mutant(check.MUTATIONS[name]).killer is not None
