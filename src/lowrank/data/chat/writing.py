"""A conversation as text in spans, each trained or not.

Where a turn stands is found by rendering: the messages before it with the beginning of an answer, then with it; the
difference is the turn. No word of any template is known here. A template that rewrites history (thoughts of earlier
turns dropped, another end for the last turn) shows in that the text up to a turn is no beginning of the whole; then
such turns become rows of their own, each as serving would render it at that turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.data.chat.template import ChatTemplate, Messages
from lowrank.data.rows import Conversation, RowError

TrainOn = str  # a key of CHOICES
OTHER = "\ue000"  # stands for any words: a character that no text begins with
EMPTY = re.compile(r"\s*(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")  # an empty <think></think>


@dataclass(frozen=True, slots=True)
class Written:
    """A row as text. spans: [start, end) of what is trained, in order; ended: whether each ends in a special token.

    turns: the messages that are trained; until: how many messages the text holds.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ended: bool
    turns: tuple[int, ...]
    until: int


def chosen(chat: Conversation, train_on: TrainOn | None) -> list[int]:
    """The messages to train: as the choice says, unless a message says it for itself."""
    default = CHOICES[train_on or "assistant"](chat)
    return [
        number
        for number, message in enumerate(chat.messages)
        if (number in default if message.trained is None else message.trained)
    ]


def _answers(chat: Conversation) -> list[int]:
    return [n for n, message in enumerate(chat.messages) if message.role == "assistant" and n >= chat.given]


CHOICES = {
    "assistant": lambda chat: set(_answers(chat)),
    "last": lambda chat: set(_answers(chat)[-1:]),
    "completion": lambda chat: set(_answers(chat) if chat.given else _answers(chat)[-1:]),
    "all": lambda chat: set(range(len(chat.messages))),
}


def write(chat: Conversation, template: ChatTemplate, turns: Sequence[int]) -> list[Written]:
    """The conversation as rows that train these turns, each turn once: one row, or more where history is rewritten.

    Raises RowError where the template refuses the conversation, or contradicts itself.
    """
    messages = [message.fields for message in chat.messages]
    if len(turns) == len(messages) and any(message.role != "assistant" for message in chat.messages):
        text = template.render(messages, chat.tools)
        return [Written(text, ((0, len(text)),), text.rstrip().endswith(template.ends), tuple(turns), len(messages))]
    texts = {turn: template.render(messages[: turn + 1], chat.tools) for turn in turns}
    rows: list[Written] = []
    left = list(turns)
    while left:
        text = texts[left[-1]]
        here = [turn for turn in left if text.startswith(texts[turn])]
        spans = [_span(chat, template, turn, texts[turn]) for turn in here]
        ended = all(text[:end].endswith(template.ends) for _, end in spans)
        rows.append(Written(text, tuple(spans), ended, tuple(here), left[-1] + 1))
        if template.marks:
            _agree(rows[-1], messages, chat, template)
        left = [turn for turn in left if turn not in here]
    return rows[::-1]


def without_oldest(chat: Conversation, row: Written) -> tuple[Conversation, tuple[int, ...]] | None:
    """(the conversation of a row without its oldest exchange, the turns of it to train); None where one is left.

    What stands before the first question (system, developer) stays.
    """
    asked = [n for n, message in enumerate(chat.messages[: row.until]) if message.role == "user"]
    if len(asked) < 2:
        return None
    gone = range(asked[0], asked[1])
    turns = tuple(turn if turn < gone.start else turn - len(gone) for turn in row.turns if turn not in gone)
    kept = tuple(message for n, message in enumerate(chat.messages[: row.until]) if n not in gone)
    return (replace(chat, messages=kept), turns) if turns else None


def _span(chat: Conversation, template: ChatTemplate, turn: int, text: str) -> tuple[int, int]:
    """[start, end) of a turn in the text that ends with it: after what serving gives the model, up to its end token."""
    start = _start(chat, template, turn, text)
    stripped = text.rstrip()
    end = len(stripped) if stripped.endswith(template.ends) else len(text)
    if end <= start:
        raise RowError(f"message {turn} leaves nothing in the text that the chat template writes")
    return start, end


def _start(chat: Conversation, template: ChatTemplate, turn: int, text: str) -> int:
    """Where the turn begins: after the prompt that serving would give, and after an empty thought nobody wrote."""
    answer = chat.messages[turn].role == "assistant"
    messages = [message.fields for message in chat.messages[:turn]]
    prompt = template.render(messages, chat.tools, generate=answer) if messages else ""
    if messages and text.startswith(prompt):
        start = len(prompt)
    else:
        other = {"role": chat.messages[turn].role, "content": OTHER}
        fixed = _common(text, template.render([*messages, other], chat.tools))  # whatever the words are
        start = len(_common(prompt, fixed)) if messages else _after(template.header if answer else "", fixed)
    if answer and (empty := EMPTY.match(text, start)):
        said = str(chat.messages[turn].fields.get("content", ""))
        start = start if said.lstrip().startswith(empty.group().strip()) else empty.end()
    return start


def _common(one: str, other: str) -> str:
    """What both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _after(header: str, fixed: str) -> int:
    """Where the header ends in a text that opens with it; 0 without a header, the whole of it where it is not there."""
    place = fixed.rfind(header) if header else -len(header)
    return place + len(header) if place >= 0 else len(fixed)


def _agree(row: Written, messages: Messages, chat: Conversation, template: ChatTemplate) -> None:
    """Where the template marks answers itself, ours must be what it marks, place by place: no wrong mask is silent."""
    marked = _joined(template.marked(messages[: row.until], chat.tools), row.text)
    for turn, span in zip(row.turns, row.spans, strict=True):
        if chat.messages[turn].role == "assistant" and not any(_same(row.text, span, other) for other in marked):
            ours = row.text[slice(*span)].strip()
            raise RowError(
                f"message {turn}: the template's {{% generation %}} does not mark what rendering shows to be the "
                f"answer ({ours[:30]!r}...{ours[-20:]!r}); mend the template and give it with --chat-template"
            )


def _joined(marked: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The marks, those with nothing but blanks between them as one: words and calls may be marked apart."""
    found: list[tuple[int, int]] = []
    for start, end in marked:
        if found and not text[found[-1][1] : start].strip():
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _same(text: str, ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    """Whether both hold the same, but for blanks and for an empty thought that nobody wrote, which we leave out."""
    (start, end), (first, last) = ours, theirs
    if min(end, last) <= max(start, first):
        return False
    before, after = text[min(start, first) : max(start, first)], text[min(end, last) : max(end, last)]
    thought = first < start and EMPTY.fullmatch(before) is not None
    return not after.strip() and (not before.strip() or thought)
