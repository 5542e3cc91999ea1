"""Letting a model write, with or without an adapter."""

from collections.abc import Callable
from typing import Any

import torch

from lowrank.checkpoint import load_adapter
from lowrank.data.recipe import Recipe, read_recipe
from lowrank.data.rows import JUDGES
from lowrank.data.tokens import prompt_ids
from lowrank.errors import ConfigError
from lowrank.hub import local_folder
from lowrank.stages import stage
from lowrank.train.models import end_tokens, find_model, quiet
from lowrank.train.settings import GenerateSettings
from lowrank.train.task import Loaded, load


def generate(settings: GenerateSettings, on_text: Callable[[str], None] | None = None) -> str:
    """The continuation of `settings.prompt`, which is also handed to `on_text` piece by piece while it is written.

    Greedy unless a temperature is given; sampling depends on `seed` alone. The prompt goes through the template the
    adapter was trained with, or `settings.template`. torch's random state is put back afterwards.

    Raises LowrankError for whatever is wrong with the settings, the model or the adapter, and for a prompt that is too
    long.
    """
    base = find_model(settings.model)
    adapter = None if settings.adapter is None else local_folder(settings.adapter)
    recipe = _recipe(settings, read_recipe(adapter or base))
    loaded = load(base, recipe.kind, (), settings)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    ids = prompt_ids(loaded.tokenizer, recipe, settings.prompt)
    room = _room(loaded, ids)
    stage("writing")
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(settings.seed)
        return _write(loaded, ids, min(settings.max_new_tokens, room), settings, on_text)


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


def _room(loaded: Loaded, ids: list[int]) -> int:
    """How many tokens fit after the prompt."""
    model: Any = loaded.model
    positions = getattr(model.config, "max_position_embeddings", None) or len(ids) + 10**9
    if not ids:
        raise ConfigError("--prompt is empty, and this model has no token to begin with; give a prompt")
    if len(ids) >= positions:
        raise ConfigError(f"--prompt is {len(ids)} tokens long, and this model holds {positions}; shorten it")
    return int(positions) - len(ids)


def _write(
    loaded: Loaded, ids: list[int], length: int, settings: GenerateSettings, on_text: Callable[[str], None] | None
) -> str:
    from transformers import GenerationConfig

    model: Any = loaded.model
    sampling = settings.temperature > 0
    how = GenerationConfig(
        max_new_tokens=length,
        do_sample=sampling,
        temperature=settings.temperature if sampling else None,
        top_p=settings.top_p if sampling else None,
        top_k=0 if sampling else None,
        eos_token_id=end_tokens(model, loaded.tokenizer),
        pad_token_id=loaded.pad,
    )
    prompt = torch.tensor([ids], device=loaded.device)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=how,
        streamer=_streamer(loaded.tokenizer, on_text) if on_text else None,
    )
    return str(loaded.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Hands finished words to `on_text`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
