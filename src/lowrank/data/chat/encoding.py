"""Conversations to tokens: written by the template, made into tokens whole, shortened by their oldest turns."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lowrank.data.chat.offsets import tokenise
from lowrank.data.chat.template import ChatTemplate, Messages
from lowrank.data.chat.writing import Written, chosen, without_oldest, write
from lowrank.data.dataset import Dataset
from lowrank.data.examples import IGNORED, Example
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Conversation, Row, RowError
from lowrank.data.tally import Tally
from lowrank.data.too_long import CUT, ERROR, policy_of, without_beginning
from lowrank.errors import DataError

Page = list[Written] | RowError  # a conversation as text, or why it is none


def encode_chats(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    """Every conversation as one row, or one for each turn that its template would write in another way later.

    All are written first, so that they are made into tokens in one call, by as many threads as the tokenizer has.
    Faults are rows that cannot be written, and rows of which nothing or all is trained without anyone asking.
    """
    template = ChatTemplate(recipe.dated_template, tokenizer)
    pages = [_written(row, template, recipe) for row in data.rows]
    found: list[Example] = []
    for row, page, made in zip(data.rows, pages, _made(pages, tokenizer), strict=True):
        if isinstance(page, RowError) or isinstance(made, RowError):
            tally.faults.add(f"{data.place(row)}: {page if isinstance(page, RowError) else made}")
            continue
        tally.dropped += not page  # the row itself says so
        try:
            found += list(_fitted(row, page, made, data.place(row), template, recipe, tally))
        except RowError as error:
            tally.faults.add(f"{data.place(row)}: {error}")
    return found


def _written(row: Row, template: ChatTemplate, recipe: Recipe) -> Page:
    """The conversation as text; nothing where it says itself that nothing of it is trained."""
    assert row.chat is not None
    try:
        turns = chosen(row.chat, recipe.train_on)
        if not turns and all(message.trained is None for message in row.chat.messages):
            raise RowError("nothing of it is trained")
        return write(row.chat, template, turns) if turns else []
    except RowError as error:
        return error


def _made(pages: Sequence[Page], tokenizer: Any) -> Iterator[list[Example] | RowError]:
    """The examples of every page."""
    if not getattr(tokenizer, "is_fast", False):  # asked for pieces, and each page may be refused
        yield from (_alone(page, tokenizer) for page in pages)
        return
    rows = iter(encoded([row for page in pages if not isinstance(page, RowError) for row in page], tokenizer))
    for page in pages:
        yield [] if isinstance(page, RowError) else list(islice(rows, len(page)))


def _alone(page: Page, tokenizer: Any) -> list[Example] | RowError:
    try:
        return [] if isinstance(page, RowError) else encoded(page, tokenizer)
    except RowError as error:
        return error


def chat_prompt(tokenizer: Any, recipe: Recipe, messages: Messages) -> list[int]:
    """The tokens of what was said so far, up to where the answer begins. Raises DataError where that is nothing."""
    try:
        text = ChatTemplate(recipe.dated_template, tokenizer).render(messages, (), generate=True)
    except RowError as error:
        raise DataError(f"the prompt: {error}") from None
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not found:
        raise DataError("the prompt: the chat template writes nothing for it; give another with --chat-template")
    return found


def _fitted(
    row: Row,
    written: Sequence[Written],
    made: Sequence[Example],
    place: str,
    template: ChatTemplate,
    recipe: Recipe,
    tally: Tally,
) -> Iterator[Example]:
    """The examples at the longest length. Raises RowError."""
    assert row.chat is not None
    policy = policy_of("chat", recipe.too_long)
    for text, example in zip(written, made, strict=True):
        _check(example, recipe)
        if len(example.ids) > recipe.max_length and policy == ERROR:
            tally.long.add(place)
            continue
        if len(example.ids) > recipe.max_length:
            shorter = _shorter(row.chat, text, example, template, recipe) if policy == CUT else None
            tally.cut += shorter is not None
            tally.dropped += shorter is None
            if shorter is None:
                continue
            example = shorter
        yield example
        tally.ended += len(text.turns) if text.ended else 0
        tally.answers += len(text.turns)
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
