"""One adapter in one layer, as one value."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.rows import RowBlock, row_indices
from lowrank.errors import LowrankError


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


class LoraFactors(nn.Module):
    """The change ΔW = s·B·A of one weight W0 ∈ R^{d×k}, and nothing else (Hu et al. 2022, arXiv 2106.09685).

    a: (r, k), b: (d, r), scale: s, dropout: probability that an input of A is dropped in training.
    Convolutions flatten (in/groups, *kernel) to k; embeddings take k = number of rows of the table.
    A stack of E experts has one pair for each: a: (E, r, k), b: (E, d, r), and what is said of A and B holds of each.

    Three optional fields make variants of the same value:

    magnitude: (d,), of a stack (E, d). DoRA (Liu et al. 2024, arXiv 2402.09353): W = diag(magnitude / ‖W0 + ΔW‖_row)·
        (W0 + ΔW).
    start_a, start_b: the factors a training run started from, where it did not start at ΔW = 0 (PiSSA, OLoRA):
        ΔW = s·(B·A − B_start·A_start). The published methods subtract s·B_start·A_start from W0 instead, which rounds
        W0; here W0 stays untouched, step 0 gives the base's output bit for bit, and unloading gives it back.
    parts: the row blocks of a fused projection. Then a is (n·r, k), one A per part, and b is (Σ d_i, r), one B per
        part, stacked: ΔW is s·B_i·A_i on the rows of part i and zero elsewhere; of a stack, in every expert.
    """

    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None
    start_a: nn.Parameter | None
    start_b: nn.Parameter | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        magnitude: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
        parts: tuple[RowBlock, ...] = (),
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        self.a = _parameter(a)
        self.b = _parameter(b)
        self.scale = scale
        self.dropout = dropout
        self.magnitude = None if magnitude is None else _parameter(magnitude)
        self.start_a = None if start is None else _parameter(start[0])
        self.start_b = None if start is None else _parameter(start[1])
        self.parts = parts
        self.out_features = b.shape[-2] if out_features is None else out_features

    @property
    def rank(self) -> int:
        """r: the rank of each part's change."""
        return self.b.shape[-1]

    @property
    def effective_rank(self) -> int:
        """The rank of the one pair (A, B) that `effective()` gives."""
        return self.a.shape[-2] * (1 if self.start_a is None else 2)

    def trainable(self) -> list[nn.Parameter]:
        """The tensors that training moves: a, b and, for DoRA, the magnitude."""
        return [self.a, self.b] if self.magnitude is None else [self.a, self.b, self.magnitude]

    def full_b(self, b: Tensor) -> Tensor:
        """`b` over all rows of the weight (of a stack too): itself, or for parts zero-padded to (d, n·r)."""
        if not self.parts:
            return b
        others, rank = (len(self.parts) - 1) * self.rank, self.rank
        blocks = b.split([part.size for part in self.parts], dim=-2)
        padded = [F.pad(block, (i * rank, others - i * rank)) for i, block in enumerate(blocks)]  # (d_i, n·r)
        full = b.new_zeros(*b.shape[:-2], self.out_features, others + rank)
        return full.index_copy(-2, row_indices(self.parts, b.device), torch.cat(padded, dim=-2))

    def effective(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B·A for the whole weight: parts padded, start factors stacked with a minus sign.

        A: (R, k), B: (d, R) with R = `effective_rank`. This is what merging, measuring and saving see.
        """
        a, b = self.a, self.full_b(self.b)
        if self.start_a is None or self.start_b is None:
            return a, b
        return torch.cat([a, self.start_a], dim=-2), torch.cat([b, -self.full_b(self.start_b)], dim=-1)

    def moved(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B·A as forward computes it, exactly zero where the factors are still the start factors.

        (a, b) over all rows; with start factors B·A − B_start·A_start = (B − B_start)·A + B_start·(A − A_start), two
        products that vanish each by itself and lose nothing by cancellation. A: (R, k), B: (d, R), differentiable.

        Raises LowrankError where accelerate has offloaded the factors by themselves: torch computes something of them.
        """
        a, b = self.a, self.full_b(self.b)
        if a.is_meta and "_hf_hook" in self.__dict__:
            raise LowrankError(
                "accelerate has offloaded an adapter's factors and brings them back for nobody: name the class of the "
                "adapted layers (LoraLinear, ...) in its preload_module_classes"
            )
        if self.start_a is None or self.start_b is None:
            return a, b
        start_b = self.full_b(self.start_b)
        return torch.cat([a, a - self.start_a], dim=-2), torch.cat([b - start_b, start_b], dim=-1)

    def of_expert(self, expert: int, rows: slice = slice(None)) -> "LoraFactors":
        """The change of one expert of a stack, of some of its output rows where asked: detached, without parts."""
        start = None
        if self.start_a is not None and self.start_b is not None:
            start = self.start_a.detach()[expert], self.full_b(self.start_b.detach()[expert])[rows]
        return LoraFactors(
            self.a.detach()[expert],
            self.full_b(self.b.detach()[expert])[rows],
            self.scale,
            self.dropout,
            magnitude=None if self.magnitude is None else self.magnitude.detach()[expert, rows],
            start=start,
        )

    def extra_repr(self) -> str:
        """Rank, shape and scale, for `print(model)`."""
        dora = ", dora" if self.magnitude is not None else ""
        parts = f", parts={len(self.parts)}" if self.parts else ""
        experts = f", experts={self.a.shape[0]}" if self.a.dim() == 3 else ""
        return f"r={self.rank}, k={self.a.shape[-1]}, d={self.out_features}, scale={self.scale:g}{parts}{dora}{experts}"
