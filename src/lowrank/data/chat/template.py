"""A chat template: whose it is, and text from messages, in transformers' sandbox."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowrank.data.rows import RowError
from lowrank.errors import ConfigError

Messages = Sequence[Mapping[str, Any]]


def template_text(tokenizer: Any, file: str | None) -> tuple[str, str]:
    """(the template, whose it is): the file's, else the tokenizer's own, else the plain one that ships with lowrank.

    Raises ConfigError for a file that cannot be read.
    """
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {file}: {getattr(error, 'strerror', None) or error}") from None
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    if own:
        return str(own), "the tokenizer's own"
    return files("lowrank.data.chat").joinpath("plain.jinja").read_text(encoding="utf-8"), "the plain one of lowrank"


def template_hash(text: str) -> str:
    """Names a template: its first 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and the tokenizer whose special tokens it may write."""

    text: str
    tokenizer: Any

    def render(self, messages: Messages, tools: Messages, generate: bool = False) -> str:
        """The text of the messages, with the beginning of an answer where asked. Raises RowError where it refuses."""
        try:
            found = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # a template is a program, and may raise whatever it likes
            raise RowError(f"the chat template refuses it ({' '.join(str(error).split()):.150})") from None
        return str(found)

    @property
    def marks(self) -> bool:
        """Whether the template says itself what an assistant writes, by {% generation %}."""
        return "endgeneration" in self.text

    def marked(self, messages: Messages, tools: Messages) -> list[tuple[int, int]]:
        """[start, end) of what {% generation %} holds, in the characters of `render(messages, tools)`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, found = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(int(start), int(end)) for start, end in found[0]]

    @cached_property
    def header(self) -> str:
        """What begins an answer: the difference that asking for one makes."""
        question = [{"role": "user", "content": "x"}]
        before, after = self.render(question, ()), self.render(question, (), generate=True)
        return after[len(before) :] if after.startswith(before) else ""

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The special tokens of the tokenizer, longest first: what an answer may end with."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True))
