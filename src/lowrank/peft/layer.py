"""PEFT's LoRA Linear with the fused forward. Importing this file imports peft: do it inside functions."""

import sys
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lowrank.core.stored import Stored
from lowrank.kernels.autocast import cast_once, under_autocast
from lowrank.kernels.fused import reason_against, stacked
from lowrank.kernels.order import FEW_TOKENS, few_rows
from lowrank.kernels.together import Operands, projection
from lowrank.peft.eligibility import active_names, base_matrix, dropout_of, reason_against_dtype, reason_for_peft_path


class Fused(nn.Module):
    """h = W0·x + bias + Σ s·B·A·dropout(x) over the active adapters: x (..., k) → (..., d), in the base's dtype.

    What a class of PEFT's is extended with (`fused_over`). Only the forward differs from PEFT's layer, and only where
    that gives the same; every other call is PEFT's.
    """

    accelerated = True
    fused_over: ClassVar[type[Any]]
    base_layer: Any
    lora_A: Any  # noqa: N815  PEFT's names
    lora_B: Any  # noqa: N815
    scaling: dict[str, float]

    def _get_name(self) -> str:
        """The name it prints under: PEFT's."""
        return str(self.fused_over.__name__)

    def operands(self) -> Operands | None:
        """What the layer would be computed from now, where another may compute it ahead: one adapter, no dropout."""
        if not is_fused(self) or reason_for_peft_path(self) is not None:
            return None
        names = active_names(self)
        if len(names) != 1 or dropout_of(self, names[0]) or not isinstance(self.base_layer, nn.Linear):
            return None
        (name,) = names
        weight, bias = base_matrix(self)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        met = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return None if reason_against_dtype(met, a) else Operands(weight, bias, a, b, self.scaling[name])


def is_fused(layer: Any) -> bool:
    """Whether the layer is of a class made here: not restored since, nor of a subclass of it."""
    return "fused_over" in vars(type(layer))


_made: dict[type[Any], type[Any]] = {}


def fused_class(peft_class: type[Any]) -> type[Any] | None:
    """The class that computes what `peft_class` does by the fused function, made once; None where there is none."""
    if peft_class not in _peft_classes():
        return None
    if peft_class not in _made:
        _made[peft_class] = _make_fused(peft_class)
    return _made[peft_class]


def _make_fused(peft_class: type[Any]) -> type[Any]:

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The fused answer, or PEFT's where the arguments, the layer's state or the tensors ask for it."""
        h = None if args or kwargs or _is_traced() or _is_thin(self, x) else _fused(self, x)
        # named, not super(): a wrapper that kept this method still reaches PEFT's after the layer was restored
        answer: Tensor = peft_class.forward(self, x, *args, **kwargs) if h is None else h
        return answer

    own = {"fused_over": peft_class, "forward": forward, "__module__": __name__}
    return type(f"Fused{peft_class.__name__}", (Fused, peft_class), own)


def __getattr__(name: str) -> Any:
    """The classes made here by their names, as unpickling asks for them."""
    for peft_class in _peft_classes():
        if name == f"Fused{peft_class.__name__}":
            return fused_class(peft_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _peft_classes() -> tuple[type[Any], ...]:
    """PEFT's LoRA layers that are linear maps; bitsandbytes' among them where that is loaded, as their bases are."""
    if "bitsandbytes" not in sys.modules:
        return (Linear,)
    from peft.tuners.lora import bnb

    return (Linear, *(getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(bnb, name)))


def _is_traced() -> bool:
    """True where a compiler records plain operations, to fuse them in its own way."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _is_thin(layer: Any, x: Tensor) -> bool:
    """True for so few tokens that the way to a function of ours costs more than it spares: PEFT's products are as thin.

    On CPU a bfloat16 product with so few rows takes several times as long as PEFT's float32 one (13 µs against 2 µs at
    k = 768; `benchmarks/decoding.py` compares whole models); in training see `benchmarks/never_slower.py`.
    """
    if torch.is_grad_enabled():
        # of PEFT's layers over bitsandbytes not: those compute in a dtype of their own
        return getattr(layer, "fused_over", None) is Linear and few_rows(x)
    return not layer.training and x.numel() < FEW_TOKENS * layer.in_features


def _fused(layer: Any, x: Tensor) -> Tensor | None:
    """The answer by the fused function, or None where PEFT must give it."""
    if not is_fused(layer) or reason_for_peft_path(layer) is not None:
        return None
    names = active_names(layer)
    a, b, scale = stacked([(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names])
    dtype = x.dtype
    weight, bias = base_matrix(layer)
    if isinstance(weight, Stored) and (wanted := getattr(layer.base_layer, "compute_dtype", None)) not in (None, dtype):
        x = cast_once(x, wanted)
    x = under_autocast(x)
    if reason_against(x, weight, bias) is not None or reason_against_dtype(x, a) is not None:
        return None
    own = Operands(weight, bias, a, b, scale, dropout_of(layer, names[0]))
    h = projection(layer, x, own, share_mask=False)  # PEFT's layers draw a mask each
    return h.to(dtype) if isinstance(weight, Stored) else h
