"""Which tokens are trained, token by token; padding; the order of rows."""

from itertools import islice

import pytest
import torch

from lowrank.data.batches import batches_from, collate, epoch_order
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Row
from lowrank.data.tokens import IGNORED, encode, prompt_ids
from lowrank.errors import DataError
from train_models import WORDS, tokenizer

X = IGNORED


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def dataset(kind, *rows):
    return Dataset("d.jsonl", kind, [Row(i + 1, fields) for i, fields in enumerate(rows)])


def encoded(kind, rows, template="{prompt} ->", longest=64, labels=(), **tokens):
    return encode(dataset(kind, *rows), tokenizer(**tokens), Recipe(kind, template, longest, labels))


PAIR = {"prompt": "what is red ?", "completion": "the cat"}


def test_only_the_completion_and_its_end_are_trained():
    (example,) = encoded("completion", [PAIR]).examples
    assert example.ids == ids("<s> what is red ? -> the cat </s>")
    assert example.labels == [X, X, X, X, X, X, *ids("the cat </s>")]
    assert example.trained == 3


def test_without_bos_and_eos():
    (example,) = encoded("completion", [PAIR], bos=False, eos=False).examples
    assert example.ids == ids("what is red ? -> the cat")
    assert example.labels == [X, X, X, X, X, *ids("the cat")]


def test_text_is_trained_but_for_the_first_token():
    for bos, first in ((True, "<s>"), (False, "the")):
        (example,) = encoded("text", [{"text": "the cat"}], bos=bos).examples
        text = "<s> the cat </s>" if bos else "the cat </s>"
        assert example.ids == ids(text)
        assert example.ids[0] == ids(first)[0]
        assert example.labels == [X, *ids(text)[1:]]


@pytest.mark.parametrize("text", ["<s> the cat </s>", "the cat </s>", "<s> the cat", "the cat", "the cat </s>\n"])
def test_first_and_last_tokens_that_are_written_out_are_not_put_a_second_time(text):
    (example,) = encoded("text", [{"text": text}]).examples
    assert example.ids == ids("<s> the cat </s>")
    assert example.labels == [X, *ids("the cat </s>")]
    row = {"prompt": text.removesuffix("\n").removesuffix("</s>"), "completion": text.removeprefix("<s>")}
    (example,) = encoded("completion", [row]).examples
    assert example.ids == ids("<s> the cat -> the cat </s>")
    assert example.labels == [X, X, X, X, *ids("the cat </s>")]


def test_the_end_inside_a_text_is_not_its_end():
    (example,) = encoded("text", [{"text": "a </s> cat"}]).examples
    assert example.ids == ids("<s> a </s> cat </s>")


def test_what_is_put_around_a_text_to_classify_is_not_put_a_second_time():
    data = encoded("classification", [{"text": "<s> a good film", "label": "good"}], labels=("bad", "good"))
    assert data.examples[0].ids == ids("<s> a good film")


def test_a_prompt_of_no_tokens_does_not_train_the_unpredicted_first_token():
    (example,) = encoded("completion", [{**PAIR, "prompt": " "}], template="{prompt}", bos=False).examples
    assert example.labels == [X, *ids("cat </s>")]


def test_what_is_asked_is_what_was_trained_on():
    tok, recipe = tokenizer(), Recipe("completion", "the {prompt} ->", 64)
    (example,) = encode(dataset("completion", PAIR), tok, recipe).examples
    asked = prompt_ids(tok, recipe, PAIR["prompt"])
    assert example.ids[: len(asked)] == asked
    assert example.labels[len(asked) - 1 : len(asked) + 1] == [X, ids("the")[0]]


def test_cutting_is_counted_and_empty_rows_are_left_out():
    rows = [PAIR, {"prompt": "what is the very very very good film ?", "completion": "cat"}, {**PAIR, "prompt": "a"}]
    data = encoded("completion", rows, longest=8)
    assert [len(example.ids) for example in data.examples] == [8, 8, 6]
    assert data.examples[0].ids == ids("<s> is red ? -> the cat </s>")
    assert data.examples[1].ids == ids("<s> very good film ? -> cat </s>")
    assert (data.cut, data.dropped) == (2, 0)
    assert (data.tokens, data.trained) == (22, 3 + 2 + 3)
    answer = {"prompt": "a", "completion": "the very very very very very very good cat"}
    data = encoded("completion", [*rows, answer], longest=8)
    assert (len(data.examples), data.cut, data.dropped) == (3, 2, 1)


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(DataError, match=r"d\.jsonl: no row has a token to train within 3 tokens; raise --max-length"):
        encoded("completion", [PAIR], longest=3)


def test_classification_has_one_label_a_row():
    data = encoded("classification", [{"text": "a good film", "label": "good"}], labels=("bad", "good"))
    assert data.examples[0].ids == ids("<s> a good film")
    assert data.examples[0].labels == [1]
    assert data.trained == 1


def test_pairs_are_cut_together():
    row = {"text": "a good film", "text_pair": "a bad film", "label": "bad"}
    data = encoded("classification", [row], labels=("bad", "good"), longest=6)
    assert len(data.examples[0].ids) == 6
    assert data.cut == 1


def test_labels_never_trained_and_half_pairs_are_errors():
    with pytest.raises(DataError, match=r"d\.jsonl:1: label 'ugly' is none of .*'bad', 'good'"):
        encoded("classification", [{"text": "a", "label": "ugly"}], labels=("bad", "good"))
    with pytest.raises(DataError, match="1 of 2 rows have a second text"):
        encoded(
            "classification",
            [{"text": "a", "label": "bad"}, {"text": "a", "text_pair": "a", "label": "bad"}],
            labels=("bad", "good"),
        )


def test_padding_is_masked_and_not_trained():
    data = encoded("completion", [PAIR, {"prompt": "red ?", "completion": "dog"}])
    batch = collate(data.examples, pad=7, device=torch.device("cpu"), per_token=True)
    assert batch.inputs["input_ids"].tolist() == [
        ids("<s> what is red ? -> the cat </s>"),
        [*ids("<s> red ? -> dog </s>"), 7, 7, 7],
    ]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 9, [1] * 6 + [0] * 3]
    assert batch.labels.tolist() == [[X] * 6 + ids("the cat </s>"), [X] * 4 + ids("dog </s>") + [X] * 3]
    assert batch.tokens == 15


LENGTHS = [(7 * i) % 31 for i in range(31)]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "by length"])
def test_an_epoch_has_every_row_once_in_a_seeded_order(lengths):
    batches = epoch_order(31, 3, seed=1, epoch=0, lengths=lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(31))
    assert sorted(map(len, batches)) == [1] + [3] * 10
    assert epoch_order(31, 3, seed=1, epoch=0, lengths=lengths) == batches
    assert epoch_order(31, 3, seed=1, epoch=1, lengths=lengths) != batches
    assert epoch_order(31, 3, seed=2, epoch=0, lengths=lengths) != batches


def test_rows_of_like_length_are_together():
    spread = [max(b) - min(b) for b in epoch_order(60, 6, seed=0, epoch=0, lengths=list(range(60)))]
    assert spread == [5] * 10


def test_batches_go_on_after_an_epoch():
    batches = batches_from(0, 3, 2, seed=0)
    first = [next(batches) for _ in range(4)]
    assert sorted(i for batch in first[:2] for i in batch) == [0, 1, 2]
    assert sorted(i for batch in first[2:] for i in batch) == [0, 1, 2]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "by length"])
def test_batches_from_a_step_on_are_those_of_the_whole_order(lengths):
    every = list(islice(batches_from(0, 31, 3, 5, lengths), 40))
    for start in (1, 10, 11, 12, 25):
        assert list(islice(batches_from(start, 31, 3, 5, lengths), 40 - start)) == every[start:]
    far = next(batches_from(11 * 10**9, 31, 3, 5, lengths))  # no earlier epoch is ordered for it
    assert far == epoch_order(31, 3, 5, 10**9, lengths)[0]
