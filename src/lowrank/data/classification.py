"""Rows with a label: the tokenizer's own form of a text or a pair; trained: the label, a class or a number."""

from collections.abc import Iterator
from typing import Any

from lowrank.data.dataset import Dataset
from lowrank.data.examples import Example
from lowrank.data.recipe import Recipe
from lowrank.data.tally import Tally
from lowrank.data.too_long import CUT, ERROR, policy_of
from lowrank.errors import DataError, quoted, some


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
                f"{data.place(row)}: label {quoted(row.fields['label'])} is none of the labels trained on "
                f"({some(map(quoted, recipe.labels), 12)})"
            )
    return [numbers[row.fields["label"]] for row in data.rows]


def _numbers(data: Dataset) -> list[float]:
    return [float(row.fields["label"]) for row in data.rows]


def encode_labelled(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    """Every row with its class or its number."""
    labels = _numbers(data) if data.kind == "regression" else _classes(data, recipe)
    texts = [_unframed(row.fields["text"], tokenizer) for row in data.rows]
    paired = [row.fields["text_pair"] for row in data.rows if "text_pair" in row.fields]
    tally.rows += len(texts)
    tally.paired += len(paired)
    if paired and len(paired) < len(texts):
        return []  # which is no data set, as is said when all rows were seen
    found = _forms(tokenizer, texts, paired or None, recipe.max_length)
    policy = policy_of(data.kind, recipe.too_long)
    examples = []
    for row, label, (ids, types, length) in zip(data.rows, labels, found, strict=True):
        long = length > recipe.max_length
        if long and policy == ERROR:
            tally.long.add(data.place(row))
        tally.cut += long and policy == CUT
        tally.dropped += long and policy != CUT
        if not long or policy == CUT:
            examples.append(Example(ids, [label], types))
    return examples


def _forms(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, longest: int
) -> Iterator[tuple[list[int], list[int] | None, int]]:
    """(ids, type ids, tokens that the row would have had) of every text or pair, at most so long."""
    whole = tokenizer(texts, pairs, verbose=False)
    for number, ids in enumerate(whole["input_ids"]):
        row, length = whole, len(ids)
        if length > longest:
            pair = None if pairs is None else [pairs[number]]
            row, number = tokenizer([texts[number]], pair, truncation=True, max_length=longest), 0
        yield row["input_ids"][number], row["token_type_ids"][number] if "token_type_ids" in row else None, length
