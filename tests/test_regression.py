"""Rows labelled with a number: how they are told from classes, their loss, and how they are scored."""

import json
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank.data.batches import collate
from lowrank.data.dataset import read_dataset
from lowrank.data.recipe import Recipe
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import Example, encode
from lowrank.errors import DataError
from lowrank.train.evaluation import Measure, score
from lowrank.train.losses import squared_error
from lowrank.train.metrics import of_numbers, pearson, ranks
from train_models import tokenizer

CPU = torch.device("cpu")


def read(tmp_path, labels, **settings):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "good", "label": label}) + "\n" for label in labels))
    return read_dataset(path, DataSettings(**settings))


def read_csv(tmp_path, labels, **settings):
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f"good,{label}\n" for label in labels))
    return read_dataset(path, DataSettings(**settings))


@pytest.mark.parametrize(
    "labels, kind",
    [
        ([1, 0, 2], "classification"),
        ([1.5, 0.25], "regression"),
        ([1, 0.25], "regression"),
        ([3.0, 1], "regression"),
        ([-1e-3, 7], "regression"),
    ],
)
def test_a_fraction_anywhere_makes_labels_numbers(tmp_path, labels, kind):
    assert read(tmp_path, labels).kind == kind
    assert read_csv(tmp_path, labels).kind == kind


def test_the_kind_can_be_chosen_where_both_would_do(tmp_path):
    assert read(tmp_path, [1, 0], kind="regression").kind == "regression"
    assert read_csv(tmp_path, ["1.5", "2.0"], kind="classification").kind == "classification"
    assert read_csv(tmp_path, ["nan", "inf"]).kind == "classification"  # names that Python would take for numbers


def test_labels_that_are_no_numbers_are_said(tmp_path):
    with pytest.raises(DataError, match=r"different kinds.*regression.*classification"):
        read_csv(tmp_path, ["1.5", "good"])
    with pytest.raises(DataError, match=r"d\.csv:3: field 'label' must be a number, not 'good'"):
        read_csv(tmp_path, ["1.5", "good"], kind="regression")


def test_the_label_is_the_number(tmp_path):
    data = read_csv(tmp_path, ["1.5", "-100"], kind="regression")
    found = encode(data, tokenizer(), Recipe("regression", "", 64)).examples
    assert [example.labels for example in found] == [[1.5], [-100.0]]
    batch = collate(found, 0, CPU, False)
    assert batch.labels.is_floating_point() and batch.labels.tolist() == [1.5, -100.0]


class Says(nn.Module):
    """Answers row i with the number said[i]; a row's one token is its place."""

    def __init__(self, said):
        super().__init__()
        self.said = nn.Parameter(torch.tensor(said, dtype=torch.float64))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.said[input_ids])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_numbers_are_scored_over_all_batches_together(batch_size):
    said, wanted = [0.5, 2.0, 1.0, 4.0, 3.0], [0.0, 2.5, -100.0, 3.0, 3.5]
    rows = [Example([i], [label]) for i, label in enumerate(wanted)]
    measure = Measure(lambda found: collate(found, 0, CPU, False), squared_error, of_numbers, per_row=True)
    assert measure.count(rows) == 5
    scores = score(Says(said), rows, measure, batch_size)
    apart = numpy.array(said) - numpy.array(wanted)
    assert scores.loss == pytest.approx(float((apart**2).mean()))
    assert scores.figures["pearson"] == pytest.approx(float(numpy.corrcoef(said, wanted)[0, 1]))
    assert scores.figures["spearman"] == pytest.approx(0.8)  # 1 3 2 5 4 and 2 3 1 4 5: 1 − 6·4/(5·24)
    assert scores.accuracy is None


def test_the_gradient_is_that_of_the_squares():
    model = Says([1.0, 3.0])
    batch = collate([Example([0], [0.25]), Example([1], [5.0])], 0, CPU, False)
    squared_error(model, batch).total.backward()
    assert model.said.grad.tolist() == [1.5, -4.0]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
def test_ranks_share_the_mean_of_their_places(values):
    slow = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert ranks(torch.tensor(values, dtype=torch.float64)).tolist() == slow


def test_what_never_changes_correlates_with_nothing():
    assert pearson(torch.ones(3).double(), torch.arange(3).double()) == 0.0
