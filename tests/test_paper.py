"""docs/paper.md is what the kept results say, and a verdict follows from figures by rule."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "paper"))

from table import BEGIN, END, PAGE, dimension, read, table, write
from verdicts import FAILED, HELD, MISSING, UNCLEAR, larger, spread, within


def test_page_holds_the_table_of_the_results() -> None:
    between = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert between == table(read())


def test_writing_again_changes_nothing_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write(page, tmp_path)
    once = page.read_text()
    write(page, tmp_path)
    assert page.read_text() == once
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once


def test_without_results_nothing_is_said_to_have_held() -> None:
    lines = table({}).splitlines()[2:]
    assert lines and all(line.endswith(f"{MISSING} |") for line in lines)


@pytest.mark.parametrize(
    ("ours", "others", "verdict"),
    [
        ([0.9, 0.91], [0.5, 0.51], HELD),
        ([0.5, 0.51], [0.9, 0.91], FAILED),
        ([0.75, 0.76], [0.74, 0.75], UNCLEAR),  # within the error of 400 rows
        ([0.5, 0.9], [0.5, 0.51], UNCLEAR),  # within that of the seeds
        ([0.7], [], MISSING),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(ours: list[float], others: list[float], verdict: str) -> None:
    assert larger(ours, others, 400) == verdict


def test_spread_of_known_values() -> None:
    assert spread([0.7, 0.8]) == "75.0 ± 7.1 (n = 2)"
    assert spread([0.5]) == "50.0 (n = 1)"


def test_bounds_belong_to_the_range() -> None:
    assert [within(value, 1, 2) for value in (1, 2, 2.1)] == [HELD, HELD, FAILED]


def test_the_intrinsic_dimension_is_told_with_its_range_and_judged_by_its_share() -> None:
    gain = [{"d": 100.0}, {"d": 300.0}, {"d": None}]
    found = {"weights": 10_000, "of_gain": gain, "of_score": [{"d": 50.0}, None, None], "points": [{"seed": 0}]}
    assert "of the gain: reached by 2 of 3 seeds, d = 200 (100 to 300)" in dimension(found)[1]
    assert dimension(found)[-1] == FAILED
    assert dimension({**found, "of_gain": [{"d": 100.0}, {"d": 99.0}]})[-1] == HELD
    assert dimension({**found, "of_gain": [{"d": 101.0}]})[-1] == FAILED
    assert dimension({**found, "of_gain": [None]})[-1] == "no d90 exists"
    assert dimension(None)[-1] == MISSING
