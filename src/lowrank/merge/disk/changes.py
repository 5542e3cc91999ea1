"""The changes of one tensor of the result, and in which dtype they are summed."""

import torch

from lowrank.core.merging import Change
from lowrank.files.safetensors import DTYPES
from lowrank.merge.disk.recipe import Recipe
from lowrank.modelfiles.blocks import whole


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What the stored rows are widened to before merging: the wider of what they have and what they get."""
    return torch.promote_types(recipe.stored_dtype, DTYPES[recipe.dtype])


def make_changes(recipe: Recipe) -> tuple[Change, ...]:
    """One Change per contribution of the recipe; W0 is read only where a contribution depends on it."""
    dtype = compute_dtype(recipe)
    weight = torch.empty(0, dtype=dtype)
    if any(contribution.reads_weight for contribution in recipe.contributions):
        if recipe.replacement is not None:
            weight = recipe.replacement.reshape(recipe.matrix).to(recipe.stored_dtype).to(dtype)
        else:
            assert recipe.source is not None
            weight = whole(recipe.source).to(dtype)
    return tuple(contribution.change(recipe.shape, weight) for contribution in recipe.contributions)
