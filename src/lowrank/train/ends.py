"""The tokens that end an answer."""

from typing import Any

from lowrank.data.chat.ending import end_ids
from lowrank.data.chat.template import ChatTemplate
from lowrank.data.recipe import Recipe


def end_tokens(model: Any, tokenizer: Any, recipe: Recipe) -> list[int] | None:
    """The tokenizer's own, which we train; those the model came with; of a conversation those of its chat template."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])} - {None}
    if recipe.chat_template:
        ends |= set(end_ids(ChatTemplate(recipe.dated_template, tokenizer)))
    return sorted(ends) or None
