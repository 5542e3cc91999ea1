"""Conversations to tokens: written by the template, made into tokens whole, shortened by their oldest turns."""

from collections.abc import Iterator, Sequence
from typing import Any

from lowrank.data.chat.offsets import tokenise
from lowrank.data.chat.template import ChatTemplate, Messages
from lowrank.data.chat.writing import Written, chosen, without_oldest, write
from lowrank.data.dataset import Dataset
from lowrank.data.examples import IGNORED, Example
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Conversation, RowError
from lowrank.data.tally import Tally
from lowrank.data.too_long import CUT, ERROR, policy_of, without_beginning
from lowrank.errors import DataError


def encode_chats(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    """Every conversation as one row, or one for each turn that its template would write in another way later.

    Faults are rows that cannot be written, and rows of which nothing or all is trained without anyone asking.
    """
    template = ChatTemplate(recipe.dated_template, tokenizer)
    policy = policy_of(data.kind, recipe.too_long)
    found: list[Example] = []
    for row in data.rows:
        assert row.chat is not None
        try:
            found += list(_one(row.chat, data.place(row), template, recipe, policy, tally))
        except RowError as error:
            tally.faults.add(f"{data.place(row)}: {error}")
    return found


def chat_prompt(tokenizer: Any, recipe: Recipe, messages: Messages) -> list[int]:
    """The tokens of what was said so far, up to where the answer begins."""
    try:
        text = ChatTemplate(recipe.dated_template, tokenizer).render(messages, (), generate=True)
    except RowError as error:
        raise DataError(f"the prompt: {error}") from None
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _one(
    chat: Conversation, place: str, template: ChatTemplate, recipe: Recipe, policy: str, tally: Tally
) -> Iterator[Example]:
    turns = chosen(chat, recipe.train_on)
    if not turns:
        if all(message.trained is None for message in chat.messages):
            raise RowError("nothing of it is trained")
        tally.dropped += 1  # the row itself says so
        return
    written = write(chat, template, turns)
    made = encoded(written, template.tokenizer)
    for row, example in zip(written, made, strict=True):
        _check(example, recipe)
        if len(example.ids) > recipe.max_length and policy == ERROR:
            tally.long.add(place)
            continue
        if len(example.ids) > recipe.max_length:
            shorter = _shorter(chat, row, example, template, recipe) if policy == CUT else None
            tally.cut += shorter is not None
            tally.dropped += shorter is None
            if shorter is None:
                continue
            example = shorter
        yield example
        tally.ended += len(row.turns) if row.ended else 0
        tally.answers += len(row.turns)
    tally.rewritten += len(written) > 1


def encoded(written: Sequence[Written], tokenizer: Any) -> list[Example]:
    """Written rows as tokens, with what is trained of them."""
    found = tokenise(tokenizer, [row.text for row in written], [row.spans for row in written])
    return [
        Example(ids, [IGNORED, *(token if on else IGNORED for token, on in zip(ids[1:], trained[1:], strict=True))])
        for ids, trained in found
    ]


def _check(example: Example, recipe: Recipe) -> None:
    if not example.trained:
        raise RowError("none of its tokens is trained")
    if recipe.train_on != "all" and example.trained >= len(example.ids) - 1:
        raise RowError("all of its tokens are trained, there is nothing that is answered (--train-on all if meant)")


def _shorter(
    chat: Conversation, row: Written, example: Example, template: ChatTemplate, recipe: Recipe
) -> Example | None:
    """The row without its oldest exchanges; where one is left, without the beginning of its prompt."""
    while len(example.ids) > recipe.max_length and (rest := without_oldest(chat, row)):
        chat, turns = rest
        row = write(chat, template, turns)[-1]
        (example,) = encoded([row], template.tokenizer)
    if len(example.ids) <= recipe.max_length:
        return example
    bos = template.tokenizer.bos_token_id
    return without_beginning(example, recipe.max_length, [] if bos is None else [bos])
