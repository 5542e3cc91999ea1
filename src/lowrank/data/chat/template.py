"""A chat template: whose it is, and text from messages, in transformers' sandbox."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from lowrank.data.rows import RowError
from lowrank.errors import CheckpointError, ConfigError
from lowrank.files.regular import read_bytes

Messages = Sequence[Mapping[str, Any]]
MOST_BYTES = 1 << 22  # of a file with one
RENDERING = Lock()  # transformers has one tracker of {% generation %} a template, for all threads


def template_text(tokenizer: Any, file: str | None) -> tuple[str, str]:
    """(the template, whose it is): the file's, else the tokenizer's own, else the plain one that ships with lowrank.

    file: or the name of one of several templates that the tokenizer has. Raises ConfigError for a file that cannot be
    read, and for several templates of which none is the usual one.
    """
    own = tokenizer.chat_template
    named = {str(name): str(text) for name, text in own.items()} if isinstance(own, dict) else {}
    if file in named and not Path(file).exists():
        return named[file], f"the tokenizer's own {file!r}"
    if file is not None:
        return _read(file, named), file
    if named:
        return _usual(named)
    if own:
        return str(own), "the tokenizer's own"
    return files("lowrank.data.chat").joinpath("plain.jinja").read_text(encoding="utf-8"), "the plain one of lowrank"


def _read(file: str, named: Mapping[str, str]) -> str:
    try:
        text = read_bytes(Path(file), MOST_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
    except CheckpointError as error:
        raise ConfigError(f"--chat-template: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        others = f"; the tokenizer's own are called {', '.join(map(repr, named))}" if named else ""
        raise ConfigError(f"--chat-template {file}: {getattr(error, 'strerror', None) or error}{others}") from None
    if not text:
        raise ConfigError(f"--chat-template {file} is empty: it would write nothing of a chat")
    return text


def _usual(named: Mapping[str, str]) -> tuple[str, str]:
    """Of several templates what a server takes: "tool_use" for conversations with tools, else "default"; as one."""
    default, tools = named.get("default"), named.get("tool_use")
    if default is None:
        raise ConfigError(
            f"the tokenizer has several chat templates, {', '.join(map(repr, named))}, and none is called 'default': "
            "choose one by its name with --chat-template"
        )
    if tools is None or tools == default:
        return default, "the tokenizer's own 'default'"
    # an expression at both ends keeps jinja from trimming lines that are the templates' own
    both = ("{% if tools %}{{ '' }}", tools, "{{ '' }}{% else %}{{ '' }}", default, "{{ '' }}{% endif %}")
    return "".join(
        part.removesuffix("\n") for part in both
    ), "the tokenizer's own 'default' and, with tools, 'tool_use'"


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
            with RENDERING:
                found = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=generate,
                )
        except Exception as error:  # a template is a program, and may raise whatever it likes
            said = " ".join(str(error).split()) or type(error).__name__  # MemoryError says nothing
            raise RowError(f"the chat template refuses it ({said:.150})") from None
        return str(found)

    @property
    def marks(self) -> bool:
        """Whether the template says itself what an assistant writes, by {% generation %}."""
        return "endgeneration" in self.text

    def marked(self, messages: Messages, tools: Messages) -> list[tuple[int, int]]:
        """[start, end) of what {% generation %} holds, in the characters of `render(messages, tools)`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with RENDERING:
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
