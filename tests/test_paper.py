"""docs/paper.md is what the kept results say, and a verdict follows from figures by rule."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "paper"))

import rank_table
from table import BEGIN, END, PAGE, Claim, dimension, read, table, write
from verdicts import FAILED, HELD, MISSING, UNCLEAR, at_least, larger, spread, within


def between(text: str, begin: str, end: str) -> str:
    return text.split(begin)[1].split(end)[0].strip()


def test_page_holds_the_tables_of_the_results() -> None:
    assert between(PAGE.read_text(), BEGIN, END) == table(read())
    assert between(PAGE.read_text(), rank_table.BEGIN, rank_table.END) == rank_table.table(read())


def test_writing_again_changes_nothing_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbetween\n{rank_table.BEGIN}\nold\n{rank_table.END}\nbelow\n")
    write(page, tmp_path)
    once = page.read_text()
    write(page, tmp_path)
    assert page.read_text() == once
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "\nbetween\n" in once and "old" not in once


def test_proposed_ranks_are_judged_by_the_differences_within_a_seed() -> None:
    assert rank_table.verdict([1.0, 1.1, 0.9]) == "better than uniform"
    assert rank_table.verdict([-1.0, -1.1, -0.9]) == "worse than uniform"
    assert rank_table.verdict([1.0, -0.9, 0.2]) == "no difference seen"
    assert rank_table.verdict([1.0, 1.0]) == "too few seeds to say"
    results = {
        f"ranks-e2e-{arm}-seed{seed}": {"seed": seed, "loss": loss, "accuracy": 0.5}
        for arm, losses in {"uniform": [1.0, 1.1, 1.2], "gradient": [0.9, 1.0, 1.101]}.items()
        for seed, loss in enumerate(losses)
    }
    line = rank_table.table(results).splitlines()[4]
    assert (
        "| 1.100 | 1.000 | -0.100, -0.100, -0.099 | 0, 1, 2 | better than uniform |" in line
    )  # a lower loss is better


def test_without_results_nothing_is_said_to_have_held() -> None:
    lines = table({}).splitlines()[2:]
    assert lines and all(line.endswith(f"{MISSING} |") for line in lines)


@pytest.mark.parametrize(
    ("ours", "others", "verdict"),
    [
        ([0.9, 0.91], [0.5, 0.51], HELD),
        ([0.5, 0.51], [0.9, 0.91], FAILED),
        ([0.75, 0.76], [0.74, 0.75], UNCLEAR),  # within the error of so few rows
        ([0.5, 0.9], [0.5, 0.51], UNCLEAR),  # within that of the seeds
        ([0.7], [], MISSING),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(ours: list[float], others: list[float], verdict: str) -> None:
    sampling = 2 * 0.75 * 0.25 / 400  # of two shares of 400 rows
    assert larger(ours, others, sampling) == verdict
    assert at_least(ours, others, sampling) == ("no difference seen" if verdict == UNCLEAR else verdict)


def test_a_claim_compares_the_two_jobs_of_its_own_task() -> None:
    def kept(task: str, job: str, seed: int, score: float) -> dict[str, object]:
        return {"task": task, "job": job, "seed": seed, "score": score, "error": 0.01}

    results = {
        "1": kept("cola", "qv-r8", 0, 0.5),
        "2": kept("cola", "qv-r8", 1, 0.52),
        "3": kept("cola", "full", 0, 0.3),
        "4": kept("sst2", "full", 0, 0.9),
        "5": {"task": "cola", "job": "qv-r8", "rates": {}},  # the choice of a rate is no score
    }
    line = Claim("text", "cola", larger, "qv-r8", "full").line(results)
    assert line == ["text", "qv-r8 51.0 ± 1.4 (n = 2); full 30.0 (n = 1)", "0, 1", "`make paper-long`", HELD]
    # √(0.01² + 0.01²)·2 = 0.028: a difference of 0.02 is none
    near = {**results, "3": kept("cola", "full", 0, 0.49)}
    assert Claim("text", "cola", larger, "qv-r8", "full").line(near)[-1] == UNCLEAR


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
