"""Which tokens end an answer, as the chat template says it: found by rendering, without a word of any template."""

from typing import Any

from lowrank.data.chat.template import ChatTemplate
from lowrank.data.chat.writing import OTHER
from lowrank.data.rows import RowError

QUESTION = {"role": "user", "content": "x"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
ANSWERS = (
    {"role": "assistant", "content": OTHER},
    {"role": "assistant", "content": OTHER, "tool_calls": [CALL]},
)


def end_ids(template: ChatTemplate) -> tuple[int, ...]:
    """The special tokens that the template puts behind an answer, and behind one that calls a tool; often none other
    than the tokenizer's eos, and none at all where a template ends answers in plain words.
    """
    ends = [_end(template, answer) for answer in ANSWERS]
    return tuple(dict.fromkeys(template.tokenizer.convert_tokens_to_ids(end) for end in ends if end))


def _end(template: ChatTemplate, answer: dict[str, Any]) -> str | None:
    try:
        text = template.render([QUESTION, answer], ())
    except RowError:  # many templates know no tools
        return None
    tail = text[text.rfind(OTHER) + 1 :].rstrip() if OTHER in text else ""
    return next((end for end in template.ends if tail.endswith(end)), None)
