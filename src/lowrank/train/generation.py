"""Letting a model write, with or without an adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowrank.checkpoint import load_adapter
from lowrank.data.chat.encoding import chat_prompt
from lowrank.data.chat.template import ChatTemplate, Messages
from lowrank.data.chat.thought import Frame, Hearing, frame_of
from lowrank.data.recipe import Recipe, chat_template_of, date_of, read_recipe
from lowrank.data.rows import JUDGES
from lowrank.data.tokens import prompt_ids
from lowrank.errors import ConfigError, Diverged
from lowrank.hub import local_folder
from lowrank.stages import stage
from lowrank.train.ends import end_tokens
from lowrank.train.loftq import move_base
from lowrank.train.models import find_model, load_tokenizer, quiet
from lowrank.train.settings import GenerateSettings
from lowrank.train.task import Loaded, load

OnText = Callable[[str], None]


def generate(settings: GenerateSettings, on_text: OnText | None = None) -> str:
    """The continuation of `settings.prompt`, which is also handed to `on_text` piece by piece while it is written.

    Greedy unless a temperature is given; sampling depends on `seed` alone. The prompt goes through the template the
    adapter was trained with, or `settings.template`; as a user's turn through a chat template, where the adapter was
    trained on chats or `settings` speak of one. torch's random state is put back afterwards.

    Raises LowrankError for whatever is wrong with the settings, the model or the adapter, and for a prompt that is too
    long.
    """
    if settings.prompt is None:
        raise ConfigError("--prompt is needed: the prompt, put into the template of the adapter if it has one")
    writer = open_writer(settings)
    ids = writer.ids([*writer.opening, {"role": "user", "content": settings.prompt}])
    if not ids:
        raise ConfigError("--prompt is empty, and this model has no token to begin with; give a prompt")
    if len(ids) >= writer.positions:
        raise ConfigError(f"--prompt is {len(ids)} tokens long, and this model holds {writer.positions}; shorten it")
    heard = writer.hearing(on_text)
    text = writer.write(ids, heard if on_text else None)
    heard.end()
    return writer.frame.shown(text) if writer.frame else text


@dataclass(frozen=True, slots=True)
class Writer:
    """A model, how it is asked, and how it writes.

    ends: the tokens that end an answer; frame: what its chat template puts around one, None for nothing.
    """

    loaded: Loaded
    recipe: Recipe
    settings: GenerateSettings
    ends: Sequence[int] | None
    frame: Frame | None = None

    @property
    def opening(self) -> list[dict[str, str]]:
        """The turns before the first question: what --system says."""
        return [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]

    @property
    def positions(self) -> int:
        """How many tokens the model holds; more than anybody has, where it does not say."""
        return getattr(self.loaded.model.config, "max_position_embeddings", None) or 10**9

    def ids(self, messages: Messages) -> list[int]:
        """The tokens that the model reads before it answers the last message."""
        if self.recipe.chat_template:
            return chat_prompt(self.loaded.tokenizer, self.recipe, messages)
        return prompt_ids(self.loaded.tokenizer, self.recipe, messages[-1]["content"])

    def hearing(self, on_text: OnText | None) -> Hearing:
        """What `write` may hand its pieces to: `on_text` gets what a reader sees of them."""
        return Hearing(self.frame, on_text)

    def write(self, ids: Sequence[int], on_text: OnText | None = None) -> str:
        """What the model writes behind these tokens; the same for the same tokens and seed.

        With its special tokens where they frame an answer, which `frame` takes apart.
        """
        from transformers import GenerationConfig

        asked = self.settings
        sampling = asked.temperature > 0
        how = GenerationConfig(
            max_new_tokens=min(asked.max_new_tokens, self.positions - len(ids)),
            do_sample=sampling,
            temperature=asked.temperature if sampling else None,
            top_p=asked.top_p if sampling else None,
            top_k=0 if sampling else None,
            eos_token_id=self.ends,
            pad_token_id=self.loaded.pad,
        )
        model: Any = self.loaded.model
        prompt = torch.tensor([list(ids)], device=self.loaded.device)
        stage("writing")
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(asked.seed)
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=how,
                logits_processor=[self._check_finite],
                streamer=_streamer(self.loaded.tokenizer, on_text, self.frame is None) if on_text else None,
            )
        return str(self.loaded.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=self.frame is None))

    def _check_finite(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores (1, V) of the next token; the likeliest of numbers that are none would be a word all the same."""
        if not scores.amax().isfinite():
            whose = self.settings.adapter or self.settings.model or "this training"
            raise Diverged(
                f"{whose}: the model's scores for the next token are not finite, so it has no answer; try --dtype "
                "float32, and see what an adapter changes with `lowrank inspect`"
            )
        return scores


def open_writer(settings: GenerateSettings) -> Writer:
    """The model with its adapter, loaded, and the recipe by which it is asked. Raises LowrankError."""
    base = find_model(settings.model)
    adapter = None if settings.adapter is None else local_folder(settings.adapter)
    trained = read_recipe(adapter or base)
    recipe = _recipe(settings, trained)
    if settings.chat_template is not None:  # what is wrong with it is said before a model is loaded
        chat_template_of(settings.chat_template, load_tokenizer(base), trained)
    loaded = load(base, recipe.kind, (), settings)
    if adapter is not None:
        move_base(loaded.model, base, adapter)
        load_adapter(loaded.model, adapter)
    recipe = _conversing(settings, recipe, trained, loaded.tokenizer)
    frame = frame_of(ChatTemplate(recipe.dated_template, loaded.tokenizer)) if recipe.chat_template else None
    return Writer(loaded, recipe, settings, end_tokens(loaded.model, loaded.tokenizer, recipe), frame)


def _recipe(settings: GenerateSettings, trained: Recipe | None) -> Recipe:
    if trained and trained.kind in JUDGES:
        raise ConfigError(
            f"{settings.adapter or settings.model} was trained for {trained.kind} and does not write; "
            "use `lowrank eval`"
        )
    if settings.template is not None:
        if settings.template.count("{prompt}") != 1:
            raise ConfigError(f"--template must hold {{prompt}} once, not as in {settings.template!r}")
        return Recipe("completion", settings.template, 0)
    return trained or Recipe("text", "{prompt}", 0)


def _conversing(settings: GenerateSettings, recipe: Recipe, trained: Recipe | None, tokenizer: Any) -> Recipe:
    """The recipe with the chat template that holds, where the model is spoken with."""
    if not (recipe.chat_template or settings.chat or settings.chat_template is not None):
        if settings.system is not None:
            raise ConfigError("--system is said in a chat template: give --chat or --chat-template, or leave it out")
        return recipe
    text, whose = chat_template_of(settings.chat_template, tokenizer, trained)
    return replace(recipe, chat_template=text, template_of=whose, date=date_of(text, None, trained))


def _streamer(tokenizer: Any, on_text: OnText, words_alone: bool) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Hands finished words to `on_text`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=words_alone)
