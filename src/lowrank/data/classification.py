"""Rows with a label: the tokenizer's own form of a text or a pair; trained: the label, a class or a number."""

from typing import Any

from lowrank.data.dataset import Dataset
from lowrank.data.examples import Encoded, Example
from lowrank.data.recipe import Recipe
from lowrank.data.too_long import CUT, ERROR, policy_of, refuse
from lowrank.errors import DataError


def _unframed(text: str, tokenizer: Any) -> str:
    """The text without the tokens that the tokenizer puts around every text to classify, where they are written out."""
    first, last = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    framed = tokenizer("a")["input_ids"]
    if first and framed[:1] == [tokenizer.convert_tokens_to_ids(first)]:
        text = text.removeprefix(first)
    if last and framed[-1:] == [tokenizer.convert_tokens_to_ids(last)]:
        text = text.removesuffix(last)
    return text


def _classes(data: Dataset, recipe: Recipe) -> list[float]:
    numbers = {name: number for number, name in enumerate(recipe.labels)}
    for row in data.rows:
        if row.fields["label"] not in numbers:
            raise DataError(
                f"{data.place(row)}: label {row.fields['label']!r} is none of the labels trained on "
                f"({', '.join(map(repr, recipe.labels))})"
            )
    return [numbers[row.fields["label"]] for row in data.rows]


def _numbers(data: Dataset) -> list[float]:
    return [float(row.fields["label"]) for row in data.rows]


def encode_labelled(data: Dataset, tokenizer: Any, recipe: Recipe) -> Encoded:
    labels = _numbers(data) if data.kind == "regression" else _classes(data, recipe)
    texts = [_unframed(row.fields["text"], tokenizer) for row in data.rows]
    paired = [row.fields["text_pair"] for row in data.rows if "text_pair" in row.fields]
    if paired and len(paired) < len(texts):
        raise DataError(f"{data.path}: {len(paired)} of {len(texts)} rows have a second text; all or none must")
    pairs = paired or None
    lengths = [len(ids) for ids in tokenizer(texts, pairs, verbose=False)["input_ids"]]
    found = tokenizer(texts, pairs, truncation=True, max_length=recipe.max_length)
    types = found["token_type_ids"] if "token_type_ids" in found else [None] * len(texts)
    policy = policy_of(data.kind, recipe.too_long)
    long = {number for number, length in enumerate(lengths) if length > recipe.max_length}
    if policy == ERROR:
        refuse(data, sorted(long), recipe.max_length)
    examples = [
        Example(ids, [label], type_ids) for label, ids, type_ids in zip(labels, found["input_ids"], types, strict=True)
    ]
    if policy == CUT:
        return Encoded(examples, cut=len(long))
    return Encoded([example for number, example in enumerate(examples) if number not in long], dropped=len(long))
