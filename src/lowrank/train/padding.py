"""Whether a causal model has to be told which tokens are padding: where it does not, attention is half the work.

Rows are padded on the right, and no token of a causal model sees what comes after it, so real tokens answer the same
whatever is said of the padding. With a mask transformers hands PyTorch's attention a matrix for every row, and all
pairs of positions are computed; without one it says "causal", and the half above the diagonal is left out.
"""

from typing import Any

import torch
from torch import nn

from lowrank.train.head import AGREE

ROWS, LENGTH, REAL = 2, 12, 7  # the second row is padded after REAL tokens


@torch.no_grad()
def sees_padding(model: nn.Module) -> bool:
    """Whether the mask of padding is needed: tried on two short rows, at the real tokens, without dropout.

    True where it is not known, and for attention that leaves padding out by the mask (FlashAttention).
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return True
    was_training = model.training
    model.eval()
    try:
        return _changes(model)
    except Exception:  # a family that does otherwise may fail in any way; it keeps its mask
        return True
    finally:
        model.train(was_training)


def unsuspected(model: nn.Module) -> int:
    """A token to pad with that transformers does not take for padding: it warns of those that come without a mask."""
    return int(getattr(getattr(model, "config", None), "pad_token_id", None) == 0)


def _changes(model: Any) -> bool:
    table = model.get_input_embeddings()
    ids = (torch.arange(ROWS * LENGTH) % table.num_embeddings).view(ROWS, LENGTH).to(table.weight.device)
    mask = torch.ones_like(ids)
    mask[1, REAL:] = 0
    real = mask == 1
    told, untold = (
        model(input_ids=ids, use_cache=False, **more).logits[real] for more in ({"attention_mask": mask}, {})
    )
    apart = (told.double() - untold.double()).abs().max()
    return not bool(apart <= AGREE[told.dtype] * told.double().abs().max())  # NaN is a change
