"""The reference way to compute h = W0·x + bias + s·B·A·x: plain operations, differentiated by autograd.

Every fast path is tested against it, and it is the path itself wherever a fast one cannot be: under `torch.compile`
(which fuses it) and `torch.func`, for second derivatives, and for a base whose weight is trained too.
"""

from torch import Tensor
from torch.nn import functional as F


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s·B·A·x: x (..., k), a (r, k), b (d, r) → (..., d), in x's dtype.

    The factors may be kept wider than x (float32 masters over a bfloat16 base); they are rounded to x's dtype here.
    """
    middle = F.linear(x, a.to(x.dtype))  # (..., r)
    return F.linear(middle, (b * scale).to(x.dtype))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """W0·x + bias + s·B·A·dropout(x): x (..., k), weight (d, k), bias (d,), a (r, k), b (d, r) → (..., d)."""
    return F.linear(x, weight, bias) + low_rank(F.dropout(x, dropout, training), a, b, scale)
