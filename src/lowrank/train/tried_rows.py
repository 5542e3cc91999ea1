"""The rows on which it is tried whether packed rows stay apart: a few, cut short, where no length matters to the model.

What leaks from one row into the next (a missing mask, a state, a convolution) is seen where the second one begins. Only
a window has to be filled: a model with one that ends within the rows is tried on all of them, whole.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank.data.examples import IGNORED, Example

FEW, BEGUN = 4, 64  # rows, tokens of each


def tried_rows(model: nn.Module, rows: Sequence[Example]) -> list[Example]:
    """The rows to try, of those that share a pack, with all tokens trained, so that every position is compared."""
    if not has_window(model, sum(len(row.ids) for row in rows)):
        rows = [Example(row.ids[:BEGUN], row.labels[:BEGUN]) for row in rows[:FEW]]
    return [Example(row.ids, [IGNORED, *row.ids[1:]]) for row in rows]


def has_window(model: nn.Module, length: int) -> bool:
    """Whether a position may see less than all before it within so many tokens, as far as the config says it.

    By any number of tokens there that is called a window or a chunk and is less than the length, and by kinds of
    layers.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return True
    text = config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}
    named = [(name, value) for name, value in text.to_dict().items() if "window" in name or "chunk" in name]
    sizes = [value for name, value in named if not name.endswith("layers")]
    return bool(kinds) or any(type(size) is int and 0 < size < length for size in sizes)
