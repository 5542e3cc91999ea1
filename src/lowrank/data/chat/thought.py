"""An answer that a model wrote, taken apart as its chat template puts one together: a thought, and what is said.

How a template writes thoughts is found by rendering, without a word of any template: an answer with one, and one
without, behind what asks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lowrank.data.chat.ending import QUESTION
from lowrank.data.chat.template import ChatTemplate
from lowrank.data.chat.writing import OTHER
from lowrank.data.rows import RowError

THOUGHT = "\ue001"  # stands for any thought, as OTHER for any words


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template puts around an answer.

    opens: before a thought; between: between it and what is said, empty where no thoughts are written; said: before
    what is said without a thought; special: the special tokens, none of which are words.
    """

    opens: str
    between: str
    said: str
    special: tuple[str, ...]

    def apart(self, text: str) -> tuple[str, str]:
        """(the thought, what is said) of an answer with its special tokens; both are empty while neither has begun."""
        opens, between, said = self.opens.rstrip(), self.between.strip(), self.said.rstrip()
        if between and text.startswith(opens):
            thought, _, rest = text[len(opens) :].partition(between)
            return self._words(thought), self._words(rest)
        if text.startswith(said):
            return "", self._words(text[len(said) :])
        begun = (between and opens.startswith(text)) or said.startswith(text)
        return "", "" if begun else self._words(text)

    def shown(self, text: str) -> str:
        """What a reader sees of it: no marks, and a line between the thought and what is said."""
        return "\n\n".join(filter(None, self.apart(text)))

    def _words(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, "")
        return text.strip()


def frame_of(template: ChatTemplate) -> Frame | None:
    """How the template frames an answer; None where it is what is said, as it is."""
    try:
        prompt = template.render([QUESTION], (), generate=True)
        plain = _behind(template, prompt, {"content": OTHER})
        thinks = _behind(template, prompt, {"content": OTHER, "reasoning_content": THOUGHT})
    except RowError:
        return None
    said = plain.partition(OTHER)[0]
    opens, thought, rest = thinks.partition(THOUGHT)
    between = rest.partition(OTHER)[0] if thought and OTHER in rest else ""
    return Frame(opens, between, said, template.ends) if between.strip() or said.strip() else None


def _behind(template: ChatTemplate, prompt: str, answer: dict[str, str]) -> str:
    """What the template writes of an answer behind what asks for it; nothing where what asks is not its beginning."""
    text = template.render([QUESTION, {"role": "assistant", **answer}], ())
    return text[len(prompt) :] if text.startswith(prompt) else ""


class Hearing:
    """An answer that comes piece by piece. on_text: gets what a reader sees of it; text: all of it so far."""

    def __init__(self, frame: Frame | None, on_text: Callable[[str], None] | None) -> None:
        self.frame, self.on_text, self.text, self._shown = frame, on_text, "", ""

    def __call__(self, piece: str) -> None:
        self.text += piece
        self._show(self.text[: len(self.text) - self._begun()] if self.frame else self.text)

    def end(self) -> None:
        """Nothing comes any more: what could have been the beginning of a mark is none."""
        self._show(self.text)

    def apart(self) -> tuple[str, str]:
        """(the thought, what is said) so far."""
        return self.frame.apart(self.text) if self.frame else ("", self.text)

    def _show(self, text: str) -> None:
        shown = self.frame.shown(text) if self.frame else text
        if self.on_text is not None and len(shown) > len(self._shown):
            self.on_text(shown[len(self._shown) :])
            self._shown = shown

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a mark."""
        marks = (self.frame.between.strip(), *self.frame.special) if self.frame else ()
        return max(
            (size for mark in marks for size in range(1, len(mark)) if self.text.endswith(mark[:size])), default=0
        )
