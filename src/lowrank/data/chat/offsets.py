"""Tokens of a whole text, and which of them are trained: those that hold a character of a trained span."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lowrank.data.rows import RowError

Spans = Sequence[tuple[int, int]]


def tokenise(tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans]) -> list[tuple[list[int], list[bool]]]:
    """(ids, which are trained) of every text, made into tokens once, as a server does: nothing is put around it.

    A tokenizer that does not say where its tokens stand is asked for the pieces between the spans' ends, which must
    give the tokens of the whole. Raises RowError where they do not.
    """
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        return [_by_pieces(tokenizer, text, own) for text, own in zip(texts, spans, strict=True)]
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (ids, trained_tokens(offsets, own))
        for ids, offsets, own in zip(found["input_ids"], found["offset_mapping"], spans, strict=True)
    ]


def trained_tokens(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
    """Whether each token holds a character of a span. A token without characters goes with what follows it.

    offsets: [start, end) of every token, in order; several tokens may share one character.
    """
    found = []
    at, before = 0, 0
    for start, end in offsets:
        first, last = (start, end) if end > start else (before, max(end, before))  # a blank that was trimmed off
        last = max(last, first + 1)
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        found.append(at < len(spans) and spans[at][0] < last)
        before = max(before, end)
    return found


def _by_pieces(tokenizer: Any, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for number, (start, end) in enumerate(pairwise(edges)):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"] if end > start else []
        ids += piece
        trained += [number % 2 == 1] * len(piece)
    if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise RowError("this tokenizer does not say where its tokens stand, and the turns alone become other tokens")
    return ids, trained
