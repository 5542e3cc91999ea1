"""Rows that prefer one answer to another, as tokens: both answers after the same prompt, one behind the other.

ids, labels   chosen, then rejected, each a whole row of its own; trained: the answers
type_ids      0 in the chosen one, 1 in the rejected one

Of two texts without a prompt, what their tokens begin with alike is the prompt: it says the same of both, and would
fall out of the difference anyway.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from lowrank.data.chat.encoding import encoded
from lowrank.data.chat.template import ChatTemplate
from lowrank.data.chat.writing import Written, chosen, without_oldest, write
from lowrank.data.dataset import Dataset
from lowrank.data.examples import IGNORED, Example
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Conversation, Row, RowError
from lowrank.data.tally import Tally
from lowrank.data.too_long import CUT, ERROR, policy_of, without_beginning

Pair = tuple[Example, Example]
TextRow = Callable[[str, str], Example]  # (prompt, answer) as a completion's row


def encode_preferences(
    data: Dataset, tokenizer: Any, recipe: Recipe, text_row: TextRow, bos: Sequence[int], tally: Tally
) -> list[Example]:
    """Every row as an example of two answers. text_row: how a prompt and an answer in strings become a row.

    Faults are rows that cannot be written, and those whose answers are the same tokens.
    """
    template = ChatTemplate(recipe.dated_template, tokenizer) if data.speaks else None
    policy = policy_of(data.kind, recipe.too_long)
    found = []
    for row in data.rows:
        try:
            pair = _pair(row, template, text_row)
        except RowError as error:
            tally.faults.add(f"{data.place(row)}: {error}")
            continue
        if max(len(side.ids) for side in pair) > recipe.max_length:
            if policy == ERROR:
                tally.long.add(data.place(row))
            fitted = _fitted(pair, row, template, recipe, bos) if policy == CUT else None
            tally.cut += fitted is not None
            tally.dropped += fitted is None
            if fitted is None:
                continue
            pair = fitted
        found.append(joined(*pair))
        tally.answers += template is not None
        tally.ended += template is not None and _ends(found[-1], template)
    return found


def _ends(example: Example, template: ChatTemplate) -> bool:
    """Whether an answer of the pair ends in a special token."""
    sides = halves(example)
    last = [next(int(label) for label in reversed(side.labels) if label != IGNORED) for side in sides]
    return any(template.tokenizer.decode([token]).rstrip().endswith(template.ends) for token in last)


def joined(one: Example, other: Example) -> Example:
    """Two rows as one example."""
    types = [0] * len(one.ids) + [1] * len(other.ids)
    return Example([*one.ids, *other.ids], [*one.labels, *other.labels], types)


def halves(example: Example) -> Pair:
    """The two rows of an example."""
    assert example.type_ids is not None
    at = list(example.type_ids).index(1)
    return Example(example.ids[:at], example.labels[:at]), Example(example.ids[at:], example.labels[at:])


def one_behind_the_other(examples: Sequence[Example]) -> list[Example]:
    """The rows of the chosen answers, then those of the rejected ones, in the same order."""
    pairs = [halves(example) for example in examples]
    return [pair[side] for side in (0, 1) for pair in pairs]


def _pair(row: Row, template: ChatTemplate | None, text_row: TextRow) -> Pair:
    if template is not None and row.chat is not None and row.rejected is not None:
        one, other = encoded([_written(chat, template) for chat in (row.chat, row.rejected)], template.tokenizer)
    else:
        fields = row.fields
        one, other = (text_row(fields.get("prompt", ""), fields[side]) for side in ("chosen", "rejected"))
        if "prompt" not in fields:
            one, other = _without_alike(one, other)
    if not one.trained or not other.trained or one == other:
        raise RowError("as tokens, one of the two answers says nothing that the other does not")
    return one, other


def _written(chat: Conversation, template: ChatTemplate) -> Written:
    rows = write(chat, template, chosen(chat, "completion"))
    if len(rows) > 1:
        raise RowError("the chat template rewrites the turns of an answer: prefer answers of one turn each")
    return rows[0]


def _without_alike(one: Example, other: Example) -> Pair:
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one.ids, other.ids, strict=False))))

    def after(row: Example) -> Example:
        return Example(row.ids, [IGNORED] * alike + list(row.labels[alike:]))

    return after(one), after(other)


def _fitted(pair: Pair, row: Row, template: ChatTemplate | None, recipe: Recipe, bos: Sequence[int]) -> Pair | None:
    """Both without their oldest exchanges, then without the same beginning of their prompt.

    None where an answer alone is too long.
    """
    if template is not None and row.chat is not None and row.rejected is not None:
        pair = _later((row.chat, row.rejected), pair, template, recipe.max_length)
    over = max(len(side.ids) for side in pair) - recipe.max_length
    cut = [without_beginning(side, len(side.ids) - over, bos) for side in pair]
    return None if cut[0] is None or cut[1] is None else (cut[0], cut[1])


def _later(chats: tuple[Conversation, Conversation], pair: Pair, template: ChatTemplate, longest: int) -> Pair:
    """The pair without as many of its oldest exchanges as make it short enough, or as there are but one."""
    written = [_written(chat, template) for chat in chats]
    while max(len(side.ids) for side in pair) > longest:
        rest = [found for chat, row in zip(chats, written, strict=True) if (found := without_oldest(chat, row))]
        if len(rest) < 2:
            break
        chats = (rest[0][0], rest[1][0])
        written = [write(chat, template, turns)[-1] for chat, turns in rest]
        pair = tuple(encoded(written, template.tokenizer))  # type: ignore[assignment]  # two of them
    return pair
