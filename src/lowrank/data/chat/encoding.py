"""Conversations to tokens: written by the template, made into tokens whole, shortened by their oldest turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank.data.chat.offsets import tokenise
from lowrank.data.chat.template import ChatTemplate, Messages
from lowrank.data.chat.writing import Written, chosen, without_oldest, write
from lowrank.data.dataset import Dataset
from lowrank.data.examples import IGNORED, Encoded, Example
from lowrank.data.faults import settle
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Conversation, RowError
from lowrank.data.too_long import CUT, ERROR, policy_of, refuse, without_beginning
from lowrank.errors import DataError

REMEDY = "mend the row, say what is trained with --train-on, or leave such rows out with --bad-rows skip"


@dataclass(slots=True)
class _Work:
    """What is found while the rows are gone through."""

    examples: list[Example] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0
    rewritten: int = 0
    ended: int = 0
    trained_turns: int = 0


def encode_chats(data: Dataset, tokenizer: Any, recipe: Recipe) -> Encoded:
    """Every conversation as one row, or one for each turn that its template would write in another way later.

    Raises DataError for rows that cannot be written, rows of which nothing or all is trained without anyone asking,
    and where no answer would ever end.
    """
    template = ChatTemplate(recipe.chat_template, tokenizer)
    work = _Work()
    policy = policy_of(data.kind, recipe.too_long)
    for number, row in enumerate(data.rows):
        assert row.chat is not None
        try:
            _one(row.chat, number, template, recipe, policy, work)
        except RowError as error:
            work.faults.append(f"{data.place(row)}: {error}")
    settle(work.faults, data.bad_rows, REMEDY)
    refuse(data, work.long, recipe.max_length)
    if work.trained_turns and not work.ended:
        refuse_endless(data)
    return Encoded(work.examples, work.cut, work.dropped, rewritten=work.rewritten)


def refuse_endless(data: Dataset) -> None:
    """Raises DataError: no answer of the data ends."""
    raise DataError(
        f"{data.path}: the chat template puts no special token after an answer, so the model would never learn to "
        "stop; give one that does with --chat-template, or a tokenizer with an end token"
    )


def chat_prompt(tokenizer: Any, recipe: Recipe, messages: Messages) -> list[int]:
    """The tokens of what was said so far, up to where the answer begins."""
    try:
        text = ChatTemplate(recipe.chat_template, tokenizer).render(messages, (), generate=True)
    except RowError as error:
        raise DataError(f"the prompt: {error}") from None
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _one(chat: Conversation, number: int, template: ChatTemplate, recipe: Recipe, policy: str, work: _Work) -> None:
    turns = chosen(chat, recipe.train_on)
    if not turns:
        if all(message.trained is None for message in chat.messages):
            raise RowError("nothing of it is trained")
        work.dropped += 1  # the row itself says so
        return
    written = write(chat, template, turns)
    made = encoded(written, template.tokenizer)
    for row, example in zip(written, made, strict=True):
        _check(example, recipe)
        if len(example.ids) > recipe.max_length and policy == ERROR:
            work.long.append(number)
            continue
        if len(example.ids) > recipe.max_length:
            shorter = _shorter(chat, row, example, template, recipe) if policy == CUT else None
            work.cut += shorter is not None
            work.dropped += shorter is None
            example = shorter or example
            if shorter is None:
                continue
        work.examples.append(example)
        work.ended += row.ended
        work.trained_turns += len(row.turns)
    work.rewritten += len(written) > 1


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
