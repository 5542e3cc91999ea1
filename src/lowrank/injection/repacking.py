"""Four-bit layers of a model with adapters keep their weight as it is stored.

On a CPU with AVX512-BF16 bitsandbytes repacks a weight when its layer first answers in eval(), and rounds its scales: a
merge afterwards would start from other numbers than training saw, wherever a layer is not adapted.
"""

from torch import nn

REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' own word, on the layer
MARK = "_lowrank_repacks"  # on a layer that would have repacked


def keep_stored(model: nn.Module) -> None:
    """In place: no layer of the model repacks its weight; its answers are computed from the stored form."""
    for module in model.modules():
        if module.__dict__.get(REPACKS):
            module.__dict__[REPACKS], module.__dict__[MARK] = False, True


def let_repack(model: nn.Module) -> None:
    """In place: what `keep_stored` changed is as it was."""
    for module in model.modules():
        if module.__dict__.pop(MARK, False):
            module.__dict__[REPACKS] = True
