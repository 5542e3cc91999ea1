"""A sentence stays a sentence, whatever a file is called and however much is wrong with it."""

import json

import pytest

from lowrank import LoraConfig
from lowrank.data.dataset import label_names, read_dataset
from lowrank.data.settings import DataSettings
from lowrank.errors import LowrankError, short, some


def test_some_shows_the_first_items_and_counts_the_others() -> None:
    assert some([]) == ""
    assert some("abc") == "a, b, c"
    assert some(range(112)) == "0, 1, 2 and 109 more"
    assert some((f"fault {i}" for i in range(3)), 2, separator="; ") == "fault 0; fault 1 and 1 more"


def test_a_long_name_loses_its_middle() -> None:
    assert short("x" * 300) == "x" * 300
    cut = short("a" * 30_000 + "weight", 101)
    assert len(cut) == 101 and cut.startswith("aa") and cut.endswith("weight")
    assert len(some(["a" * 30_000] * 9)) < 320
    assert some(["a" * 140] * 5) == f"{'a' * 140}, {'a' * 140} and 3 more"


def test_what_a_message_quotes_of_a_file_is_short(tmp_path):
    """A value of five thousand characters is a fault of the file, not a page of the terminal's."""
    long = "x" * 5000
    rows = tmp_path / "rows.jsonl"
    for row in ({"text": "a", "label": long}, {long: "a"}, {"messages": [{"role": long, "content": long}]}):
        rows.write_text(f"{json.dumps(row)}\n")
        with pytest.raises(LowrankError) as caught:
            label_names(read_dataset(rows, DataSettings(cache=False)))
        assert 0 < len(str(caught.value).replace(str(rows), "")) < 500
    with pytest.raises(LowrankError) as caught:
        LoraConfig(r=long, lora_alpha=long, lora_dropout=long, bias=long, modules_to_save=long)
    faults = str(caught.value).split("; ")
    assert len(faults) == 5 and max(map(len, faults)) < 200
