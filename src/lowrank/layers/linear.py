"""Adapted linear maps: nn.Linear, every subclass of it, and transformers' Conv1D."""

from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.dora import rescaled, rescaled_change
from lowrank.core.factors import LoraFactors
from lowrank.core.stored import Weight
from lowrank.kernels.autocast import under_autocast
from lowrank.kernels.fused import reason_against, stacked
from lowrank.kernels.reference import low_rank
from lowrank.kernels.together import Operands, projection
from lowrank.layers.base import LoraLayer, plain_class

OWN_FORWARDS = {("torch.nn.modules.linear", "Linear"), ("transformers.pytorch_utils", "Conv1D")}


class LoraLinear(LoraLayer):
    """h = W0·x + bias + Σ s·B·A·dropout(x) over the active adapters.

    input: (..., k) → (..., d). Where the plain class computes exactly W0·x + bias, base and change are one fused
    function; a subclass with a forward of its own gives its answer by that forward, whatever it does to get there, and
    the change is added to it. `reason_for_plain_path` says which, and why.
    """

    kind = "linear"
    supports_dora = True
    bias: nn.Parameter | None
    plain_reason: str | None

    def activate(self, adapters: tuple[str, ...]) -> None:
        """In place: exactly `adapters` are in the output, by the fused function where it serves."""
        super().activate(adapters)
        self.plain_reason = self.reason_for_plain_path()

    def forward(self, input: Tensor) -> Tensor:
        """The base's answer plus every active adapter's change."""
        factors = self.active_factors
        if not factors:
            return self.base_forward(input)
        if self.plain_reason is None:
            x, weight, bias = under_autocast(input), self.held(), self.bias
            if reason_against(x, weight, bias) is None:
                a, b, scale = stacked([(*f.moved(), f.scale) for f in factors])
                dropout = factors[0].dropout if self.training else 0.0
                h = projection(self, x, Operands(weight, bias, a, b, scale, dropout))
                return h if factors[0].magnitude is None else rescaled(h, self.gain(factors[0]), self.bias)
        return self._plain_forward(input, factors)

    def held(self) -> Weight:
        """W0 as the fused function takes it, (d, k): a view of the parameter, or what reads a stored form."""
        weight = self.base_weight
        return weight.t() if self.transposed else weight

    def operands(self) -> Operands | None:
        """What the layer would be computed from now, where another may compute it ahead: one adapter."""
        if self.plain_reason is not None or len(self.active_factors) != 1 or self.transposed:
            return None
        (factors,) = self.active_factors
        if factors.parts or factors.start_a is not None:
            return None
        dropout = factors.dropout if self.training else 0.0
        return Operands(self.held(), self.bias, factors.a, factors.b, factors.scale, dropout)

    def reason_for_plain_path(self) -> str | None:
        """Why the active adapters are computed by plain operations, or None where the fused function serves."""
        if not self.answers_by_rows():
            return f"{plain_class(self).__name__} has a forward of its own"
        return "rows of its weight are an adapter's own" if self.active_rows else self.reason_against_adapters()

    def answers_by_rows(self) -> bool:
        """Whether the plain class answers W0·x + bias, as the fused function does."""
        forward = next(cls for cls in plain_class(self).__mro__ if "forward" in cls.__dict__)
        return (forward.__module__, forward.__name__) in OWN_FORWARDS

    def mended(self, answer: Tensor, input: Tensor) -> Tensor:
        """The scores of the rows that adapters own in the place of W0's: (..., k) → (..., d)."""
        for rows in self.active_rows:
            answer = rows.multiplied(input, answer, self.base_weight)
        return answer

    def reason_against_adapters(self) -> str | None:
        """Why the active adapters cannot go through the fused function together, or None."""
        factors = self.active_factors
        if any(f.magnitude is not None for f in factors) and len(factors) > 1:
            return "DoRA rescales the base's answer, but not another adapter's change"
        if len({f.dropout for f in factors}) > 1:
            return "the active adapters differ in dropout"
        return None

    def _plain_forward(self, input: Tensor, active: tuple[LoraFactors, ...]) -> Tensor:
        h = base = self.base_forward(input)
        for factors in active:
            change = self._change(input, factors)
            if factors.magnitude is not None:
                change = rescaled_change(base, change, self.gain(factors), self.bias)
            h = h + change
        return h

    def _change(self, input: Tensor, factors: LoraFactors) -> Tensor:
        """ΔW·dropout(x): (..., k) → (..., d)."""
        return low_rank(F.dropout(input, factors.dropout, self.training), *factors.moved(), factors.scale)


class LoraConv1D(LoraLinear):
    """transformers' Conv1D, the linear layer of GPT-2: its weight is W0ᵀ, (k, d)."""

    kind = "conv1d-linear"
    transposed = True
