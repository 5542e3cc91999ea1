"""Attention over packs on a CPU: every packed row by itself, where transformers masks the pairs of a whole pack.

A pack of n rows of length l has (n·l)² pairs of positions, of which n·l²/2 are seen. PyTorch's attention on a CPU
computes all of them under a mask; row by row it computes those that are seen. On a GPU FlashAttention does that better.

In half precision PyTorch's attention multiplies blocks of 32 positions, a call of oneDNN each and code of its own for
every length of row: both weigh more than the products of a short row, which is attended in float32 (`is_widened`).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data.batches import Batch
from lowrank.kernels.processor import half_products_are_slow, has_avx512, vendor
from lowrank.train.head import AGREE, Head

NAME, PLAIN = "lowrank_rows", "sdpa"
SHORT = 256  # tokens of a row up to which float32 is faster: 0.24 to 1.03 of the time, at 512 1.03 to 1.2


@torch.no_grad()
def attend_by_rows(model: nn.Module, packed: Batch, head: Head | None) -> bool:
    """In place: the model's attention goes by rows from now on, where that gives what it gave; whether it does.

    packed: a batch with packs, on which the hidden states are tried. Only in the place of PyTorch's own attention, and
    where no layer has a window, which is part of the mask.
    """
    call: Any = model
    text = call.config.get_text_config()
    own = getattr(call.config, "_attn_implementation", None)
    windows = getattr(text, "sliding_window", None) or {*(getattr(text, "layer_types", None) or ())} - {
        "full_attention"
    }
    if head is None or own != PLAIN or windows or next(model.parameters()).device.type != "cpu":
        return False
    _register()
    was_training = model.training
    model.eval()
    try:
        wanted = head.hidden(packed.inputs).states
        call.set_attn_implementation(NAME)
        apart = (head.hidden(packed.inputs).states.double() - wanted.double()).abs().max()
        taken = call.config._attn_implementation == NAME  # some families keep their own, without an error
        same = taken and bool(apart <= AGREE[wanted.dtype] * wanted.double().abs().max())
    except Exception:  # a family that does otherwise may fail in any way; it keeps its attention
        same = False
    finally:
        model.train(was_training)
    if not same:
        attend_at_once(model)
    return same


def attend_at_once(model: nn.Module) -> None:
    """In place: PyTorch's own attention again."""
    call: Any = model
    call.set_attn_implementation(PLAIN)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None for rows and packs that nothing is masked of but what comes later; else as PyTorch's attention has it."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, heads, L, d), key and value of as many or fewer heads → (B, L, heads, d); position 0 begins a row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as plain

    whole = attention_mask is not None or position_ids is None or key.shape[2] != query.shape[2]
    if whole or len(position_ids) != len(query) or not (position_ids[:, 1:] == 0).any():  # type: ignore[arg-type,index]
        answer: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **kwargs)
        return answer
    packs = []
    for at, positions in enumerate(position_ids):  # type: ignore[arg-type]
        starts = (positions == 0).nonzero()[:, 0].tolist()
        sizes = [end - start for start, end in pairwise([*starts, len(positions)])]
        parts = zip(*(tensor[at : at + 1].split(sizes, 2) for tensor in (query, key, value)), strict=True)
        packs.append(torch.cat([_row(plain, module, part, kwargs) for part in parts], 1))  # (1, L, heads, d)
    return torch.cat(packs), None


def _row(plain: Any, module: nn.Module, part: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    """The answer of one row alone: query, key and value (1, heads, l, d) → (1, l, heads, d)."""
    dtype = part[0].dtype
    if is_widened(dtype, part[0].shape[2]):
        part = tuple(tensor.float() for tensor in part)
    answer: Tensor = plain(module, *part, None, **options)[0]
    return answer.to(dtype)


def is_widened(dtype: torch.dtype, length: int) -> bool:
    """Whether a row of so many tokens is attended in float32, the answer rounded once: by its own length alone.

    Short rows on the processors where that was measured (an EPYC with AVX-512, heads of 8 to 128 numbers, forward and
    backward), every row where half precision has no fast products (AVX2: 0.09 to 0.6 of the time).
    """
    if dtype.itemsize != 2:
        return False
    return half_products_are_slow(dtype) or (length <= SHORT and vendor() == "AuthenticAMD" and has_avx512())
