"""The changes of one tensor of the result, in which dtype they are summed, and that what comes out is finite."""

import torch
from torch import Tensor

from lowrank.core.finite import all_finite
from lowrank.core.merging import Change
from lowrank.errors import MergeError
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


def check_finite(recipe: Recipe, stored: Tensor, rounded: Tensor) -> None:
    """Raise MergeError where the result has values that are not finite; a converted tensor may keep the base's own."""
    if not rounded.is_floating_point() or all_finite(rounded):
        return
    if not all_finite(stored):
        if not recipe.contributions:
            return
        raise MergeError(
            f"{recipe.name} of the base holds values that are not finite, so nothing can be merged into it"
        )
    what = "the merged values" if recipe.contributions else "its values"
    raise MergeError(f"{recipe.name}: {what} do not fit into {recipe.dtype}, whose largest number they exceed")
