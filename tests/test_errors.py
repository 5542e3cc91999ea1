"""A sentence stays a sentence, whatever a file is called and however much is wrong with it."""

from lowrank.errors import short, some


def test_some_shows_the_first_items_and_counts_the_others() -> None:
    assert some([]) == ""
    assert some("abc") == "a, b, c"
    assert some(range(112)) == "0, 1, 2 and 109 more"
    assert some((f"fault {i}" for i in range(3)), 2, separator="; ") == "fault 0; fault 1 and 1 more"


def test_a_long_name_loses_its_middle() -> None:
    assert short("x" * 300) == "x" * 300
    cut = short("a" * 30_000 + "weight", 101)
    assert len(cut) == 101 and cut.startswith("aa") and cut.endswith("weight")
    assert len(some(["a" * 30_000] * 9)) < 1000
