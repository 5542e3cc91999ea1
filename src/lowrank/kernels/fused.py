"""h = W0·x + bias + B·A·x as one differentiable function with the fewest passes over memory.

Forward: S = x·Aᵀ is kept, (T, r), and S·Bᵀ is accumulated into the base's output in place. Backward: dS = dY·B once,
for dA = dSᵀ·x, for dBᵀ = Sᵀ·dY (the transposed product, which the libraries run up to twice as fast) and for the input
gradient, which projections with the same input accumulate together (`shared_input`). No output-size temporary is made,
nothing is kept for a gradient of the frozen weight, and no input gradient is formed where none is needed.

Per T×d output that is 6·r·T·(k + d) operations beyond the frozen layer's, the least there is when S is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank.core.stored import Stored, Weight, dense
from lowrank.kernels import pieces, products
from lowrank.kernels.autocast import dtype_for
from lowrank.kernels.dropout import Mask
from lowrank.kernels.hooks import are_saved_tensors_watched
from lowrank.kernels.order import choose_order, few_rows, thin_products_are_slow
from lowrank.kernels.rehearsal import device_type, is_rehearsed
from lowrank.kernels.shared_input import Part, SharedInput, shared_input

Held = TypeVar("Held", bound=Weight)

# entries from which torch's blocked copy of a transposed matrix, and a second pass, take less than one strided pass:
# a quarter of its time at (64, 2048), the same at (128, 192); an EPYC with AVX-512, float32, one thread
ONE_PASS = 1 << 14


def is_transformed() -> str | None:
    """Who takes the plain operations to make something else of them, in words; None where nobody does."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain operations itself"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the plain operations"
    return None


def reason_against(x: Tensor, weight: Weight, bias: Tensor | None) -> str | None:
    """Why this call must take the reference path, or None where the fused function gives the same."""
    if (why := is_transformed()) is not None:
        return why
    if isinstance(weight, Stored):
        return None if x.is_floating_point() and type(x) is Tensor else f"its input is {x.dtype}"
    if weight.requires_grad:
        return "the base weight is trained too"
    if x.is_meta and not is_rehearsed():
        return "tensors on the meta device have no numbers"
    if type(weight) not in (Tensor, torch.nn.Parameter) or type(x) is not Tensor:
        return f"its tensors are of a class of their own ({type(weight).__name__}, {type(x).__name__})"
    if (x.dtype != weight.dtype and dtype_for(x) is not x.dtype) or not x.is_floating_point():
        return f"its input is {x.dtype} and its weight {weight.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"its bias is {bias.dtype} and its weight {weight.dtype}"
    return None


def in_dtype_of(x: Tensor, weight: Held, bias: Tensor | None) -> tuple[Held, Tensor | None]:
    """The weight and the bias in x's dtype, which under autocast may not be theirs; a stored weight is read in it."""
    if isinstance(weight, Stored):
        return weight, bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype)
    if weight.dtype is x.dtype:
        return weight, bias
    return cast(Held, weight.to(x.dtype)), None if bias is None else bias.to(x.dtype)


def stacked(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Σ s_i·B_i·A_i as one (A, B, s): A = [A₁; A₂; …], B = [s₁·B₁, s₂·B₂, …], s = 1; a single one as it is."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _, _ in pairs]), torch.cat([b * scale for _, b, scale in pairs], dim=1), 1.0


def fused_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float = 1.0, mask: Mask | None = None
) -> Tensor:
    """W0·x + bias + s/q·B·A·(mask∘x): x (..., k), weight (d, k), a (r, k), b (d, r), q the share that the mask keeps.

    a and s·b are rounded to x's dtype, inside of the function, so that autograd sees one node; under autocast weight
    and bias are, before it. `weight` may be a transposed view (Conv1D): no copy is made. A stored form is read
    for each product and let go: its dense matrix is never kept. The dropout mask is kept at
    one bit an entry. Second derivatives are refused by autograd, but for few rows, where it gives them itself.
    """
    weight, bias = in_dtype_of(x, weight, bias)
    if mask is not None:
        scale /= mask.kept
    tracked = is_tracked(x, bias, a, b)
    if few_rows(x) and not isinstance(weight, Stored) if tracked else mask is None and thin_products_are_slow(x):
        return _plain(x, dense(weight, x.dtype), bias, a, b, scale, mask)
    if not tracked:
        a, (b, scale), rows = a.to(x.dtype), beside(x, b, scale), x.reshape(-1, x.shape[-1])
        s, fold = _down(rows, weight, a, mask, keep=False)
        return forward_part(x, rows, weight, bias, a, b, scale, s, fold)
    shared = shared_input(x)
    later: list[Callable[[Tensor], Tensor]] | None = [] if are_saved_tensors_watched() else None
    h: Tensor = _FusedLinear.apply(shared.token, x.detach(), weight, bias, a, b, shared, scale, mask, later)  # type: ignore[no-untyped-call]
    if later:
        with torch.no_grad():
            later.pop()(h.detach())
    return h


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Mask | None
) -> Tensor:
    """The map by plain operations, the low-rank part in float32 or wider: for few rows, where ways cost more than sums.

    autograd differentiates it by itself; a node of ours would cost more than it spares.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    seen = x.to(wide) if mask is None else x.to(wide) * mask.numbers(x.shape)
    s = F.linear(seen, a.to(wide)) * scale  # (..., r)
    return (F.linear(x, weight, bias) + F.linear(s, b.to(wide))).to(x.dtype)


def is_tracked(x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether autograd follows the map: something in it requires a gradient, and gradients are on."""
    trained = a.requires_grad or b.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    return trained and torch.is_grad_enabled()


def beside(x: Tensor, b: Tensor, scale: float) -> tuple[Tensor, float]:
    """(B, s) as they meet x: B as it is where it has x's dtype, else s·B rounded to that, and 1."""
    return (b, scale) if b.dtype is x.dtype else (torch.mul(b, scale, out=b.new_empty(b.shape, dtype=x.dtype)), 1.0)


def laid_out_as_b(dbt: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """dB = scale·(dBᵀ)ᵀ in B's dtype and laid out as B is, so that autograd need not copy it: (r, d) → (d, r)."""
    turned = dbt.to(dtype).t()
    if dbt.numel() > ONE_PASS and device_type(dbt) == "cpu":
        return turned.contiguous().mul_(scale)
    return torch.mul(turned, scale, out=dbt.new_empty(turned.shape, dtype=dtype))


def _down(rows: Tensor, weight: Weight, a: Tensor, mask: Mask | None, keep: bool) -> tuple[Tensor | None, bool]:
    """(S, whether W0 + s·B·A is formed first): S (T, r), None where it is neither kept nor needed."""
    fold = folds(rows, weight, a, mask)
    return products.down(seen_by_a(rows, mask), a) if keep or not fold else None, fold


def seen_by_a(rows: Tensor, mask: Mask | None) -> Tensor:
    """mask∘x, or x itself where nothing is dropped: (T, k)."""
    return rows if mask is None else mask.of(rows)


def folds(rows: Tensor, weight: Weight, a: Tensor, mask: Mask | None) -> bool:
    """Whether W0 + s·B·A is formed first: rows (T, k), weight (d, k), a (r, k). It cannot be where A sees mask∘x."""
    d, k = weight.shape
    return mask is None and choose_order(rows.shape[0], k, d, a.shape[0], rows.dtype, device_type(rows)).fold


def forward_part(
    x: Tensor,
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    s: Tensor | None,
    fold: bool,
    out: Tensor | None = None,
) -> Tensor:
    """h = W0·x + bias + scale·B·A·x from S = x·Aᵀ, (T, r), or folded: x (..., k) → (..., d), into `out` if given."""
    matrix = dense(weight, x.dtype)
    if s is None or fold:
        own = isinstance(weight, Stored)  # then its copy is ours to write to
        folded = matrix.addmm_(b, a, alpha=scale) if own else torch.addmm(matrix, b, a, alpha=scale)
        h = pieces.base(x, folded, bias, out)
    else:
        h = products.plus_low_rank(x, rows, matrix, bias, s, b, scale, out)
    # a view made in a Function may not be written to by the caller (ReLU(inplace=True)): this one counts as no view
    return torch.ops.aten._unsafe_view.default(h, h.shape) if h._is_view() else h


class _FusedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        _token: Tensor,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        shared: SharedInput,
        scale: float,
        mask: Mask | None,
        later: list[Callable[[Tensor], Tensor]] | None,
    ) -> Tensor:
        """h, or with `later` an empty h and there how to fill it.

        A checkpointed block that is computed again is left as soon as its last tensor is kept, which here is before
        the largest product: the answer of its last layer is not asked for.
        """
        ctx.shared, ctx.place, ctx.scale, ctx.masters = shared, shared.join(), scale, (a.dtype, b.dtype)
        a, (b, scale) = a.to(x.dtype), beside(x, b, scale)
        rows = x.reshape(-1, x.shape[-1])  # (T, k)
        s, fold = _down(rows, weight, a, mask, keep=True)
        ctx.stored = weight if isinstance(weight, Stored) else None
        ctx.save_for_backward(rows, s, None if ctx.stored else weight, a, b, None if mask is None else mask.bits)
        ctx.mask = None if mask is None else replace(mask, bits=None)
        ctx.scale_beside = scale
        fill = partial(forward_part, x, rows, weight, bias, a, b, scale, s, fold)
        if later is None:
            return fill()
        later.append(fill)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, a, b, bits = ctx.saved_tensors
        dh = dh.reshape(-1, dh.shape[-1])  # (T, d)
        _, _, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        a_dtype, b_dtype = ctx.masters
        mask = None if ctx.mask is None else replace(ctx.mask, bits=bits)
        ds, dbt = products.two_gradients(dh, s, b, ctx.scale_beside, needs_b)  # (T, r), (r, d)
        da = None  # (r, k)
        if needs_a:
            da = products.weight_gradient(ds, seen_by_a(x, mask)).to(a_dtype)
        db = None if dbt is None else laid_out_as_b(dbt, ctx.scale, b_dtype)  # (d, r)
        dbias = dh.sum(0) if needs_bias else None
        if ctx.shared.needs_gradient:
            ctx.shared.add({ctx.place: Part(dh, ctx.stored or weight, ds, a, mask)}, ())
        return None, None, None, dbias, da, db, None, None, None, None
