"""How strongly the low-rank change acts: the scale s in h = W0·x + s·B·A·x."""

import math


def lora_scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """s = alpha / r, or alpha / √r for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(scale: float, rank: int, rslora: bool = False) -> float:
    """The alpha that gives `scale` at `rank`: the inverse of `lora_scale`, as an int where it is one.

    Twelve significant digits are kept, so that (1/3)·3 is written as 1 in a config file and read back as such.
    """
    alpha = float(f"{scale * (math.sqrt(rank) if rslora else rank):.12g}")
    return int(alpha) if alpha.is_integer() else alpha
