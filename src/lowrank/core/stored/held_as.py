"""What a quantiser would leave of a matrix, by the name of the form: a base that is not at hand, made anew."""

from importlib.util import find_spec

import torch
from torch import Tensor

from lowrank.core.stored.base import Stored
from lowrank.core.stored.of_module import of_quant_state
from lowrank.core.stored.requantise import requantise
from lowrank.core.stored.scaled import Int8Rows

FOUR_BIT = {
    f"{kind.upper()}{words}": (kind, double)
    for kind in ("nf4", "fp4")
    for words, double in (("", False), (", double quantised", True))
}
INT8 = "int8"
BLOCK = 64  # bitsandbytes' own, where nothing else is said


def form_of(scheme: str, double: bool) -> str:
    """What `Stored.form` says of a scheme as users name it: nf4, fp4 (scales quantised too: `double`) or int8."""
    return next((form for form, made in FOUR_BIT.items() if made == (scheme, double)), INT8)


def can_be_made(form: str) -> bool:
    """Whether `held_as` makes this form (`Stored.form`), where the package that it takes is installed."""
    return form == INT8 or form in FOUR_BIT


def is_at_hand(form: str) -> bool:
    """Whether it makes this form now."""
    return form == INT8 or (form in FOUR_BIT and find_spec("bitsandbytes") is not None)


def held_as(matrix: Tensor, form: str, dtype: torch.dtype, block: int | None = None) -> Stored | None:
    """Q(W) of the matrix W, (d, k): what bitsandbytes' quantiser of `form` (`Stored.form`) leaves of it.

    dtype: of W when it was quantised. None for forms that are not made here, and for four bits without bitsandbytes.
    """
    if form == INT8:
        half = matrix.half().float()  # as bitsandbytes rounds it first
        return requantise(half, Int8Rows(half[:0].char(), half[:0, 0]))
    if form not in FOUR_BIT:
        return None
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None
    kind, double = FOUR_BIT[form]
    packed, state = quantize_4bit(
        matrix.to(dtype).contiguous(), blocksize=block or BLOCK, compress_statistics=double, quant_type=kind
    )
    return of_quant_state(packed, state)
