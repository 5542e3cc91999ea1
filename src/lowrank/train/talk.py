"""A conversation with a model: what was said so far, and an answer to what is said next."""

import warnings

from lowrank.data.chat.encoding import chat_prompt
from lowrank.data.chat.thought import Hearing
from lowrank.data.rows import PER_TOKEN
from lowrank.errors import ConfigError, LowrankWarning
from lowrank.train.generation import OnText, open_writer
from lowrank.train.settings import GenerateSettings


class Talk:
    """Turns with a model, each written by the chat template anew, whole, as a server would see it.

    messages: what was said, and what the system was told before. Raises LowrankError for whatever is wrong with the
    settings, the model or the adapter.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self.writer = open_writer(settings)
        trained = self.writer.recipe.kind
        if settings.adapter is not None and trained != "chat" and trained in PER_TOKEN:
            warnings.warn(
                f"{settings.adapter} was trained on rows of {trained}, not on chats: it has not learned from the "
                "template that it is spoken with",
                LowrankWarning,
                stacklevel=2,
            )
        self.clear()
        self.writer.ids([*self.messages, {"role": "user", "content": "x"}])  # the template is tried before anyone waits

    def clear(self) -> None:
        """Forget what was said, but for what the system was told."""
        self.messages = [dict(turn) for turn in self.writer.opening]

    def answer(self, text: str, on_text: OnText | None = None) -> str:
        """What the model says to `text`; both are remembered, a thought before it too where the template writes one.

        `on_text` gets thought and words piece by piece while they are written.

        Where the model would not hold all that was said, its oldest exchanges are forgotten, which is warned of. An
        answer that is interrupted is remembered as far as it came. Raises ConfigError for a text that alone is too
        long.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids = self._that_fit(messages)
        heard = self.writer.hearing(on_text)
        try:
            heard.text = self.writer.write(ids, heard)
        except KeyboardInterrupt:
            self._remember(messages, heard)
            raise
        heard.end()
        return self._remember(messages, heard)

    def _remember(self, messages: list[dict[str, str]], heard: Hearing) -> str:
        """What was said."""
        thought, said = heard.apart()
        thoughts = {"reasoning_content": thought} if thought else {}
        self.messages = [*messages, {"role": "assistant", "content": said, **thoughts}]
        return said

    def _that_fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """(the messages without as many of the oldest exchanges as leave room for an answer, their tokens)."""
        writer = self.writer
        most = writer.positions - min(writer.settings.max_new_tokens, writer.positions // 2)
        start, forgotten = len(writer.opening), 0
        while len(ids := chat_prompt(writer.loaded.tokenizer, writer.recipe, messages)) > most:
            if len(messages) == start + 1:
                if len(ids) < writer.positions:
                    break
                raise ConfigError(f"this is {len(ids)} tokens long, and this model holds {writer.positions}; say less")
            del messages[start : start + 2]
            forgotten += 1
        if forgotten:
            warnings.warn(
                f"the model holds {writer.positions} tokens: the oldest {forgotten} of the exchanges were forgotten",
                LowrankWarning,
                stacklevel=3,
            )
        return messages, ids
