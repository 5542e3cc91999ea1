"""Claim: the error of y, dx, dA and dB against float64 is at most 1.5× PEFT's, in every dtype, for small and large ΔW.

One Linear of 768×768 on 1,024 tokens, rank 16. The oracle is float64 on the very numbers the layer got (its rounded
weight and input). PEFT is measured twice: with float32 factors, for which it casts x to float32 (its default), and with
factors in the base's dtype. lowrank keeps float32 factors and rounds them where they meet x, which is what makes its
step cheap; beside PEFT's float32 path its gradients of A and B are therefore half-precision gradients.

    python benchmarks/accuracy.py [--out docs/accuracy.md]
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import lowrank

TOKENS, WIDTH, RANK, ALPHA = 1024, 768, 16, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0.01, 1.0, 10.0)  # ‖ΔW‖/‖W0‖


class Holder(nn.Module):
    """A model of one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) → (..., d)."""
        y: Tensor = self.lin(x)
        return y


def results(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """[y, dx, dA, dB]."""
    x = x.clone().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y, [x, *factors], dy)]


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative errors in the Frobenius norm."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]


def row(dtype: torch.dtype, size: float) -> list[tuple[float, float, float]]:
    """(lowrank's error, PEFT's with float32 factors, PEFT's with factors in the base's dtype) of y, dx, dA, dB."""
    torch.manual_seed(0)
    base, scale = Holder(), ALPHA / RANK
    x, dy = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
    a, b = torch.randn(RANK, WIDTH) / WIDTH**0.5, torch.randn(WIDTH, RANK)
    b *= size * base.lin.weight.detach().norm() / (scale * (b @ a).norm())
    base.to(dtype)
    weight, bias = base.lin.weight.detach().double(), base.lin.bias.detach().double()
    a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
    wanted = results(lambda v: v @ (weight + scale * b64 @ a64).t() + bias, x.double(), dy.double(), [a64, b64])

    lowrank.inject(base, lowrank.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["lin"]))
    factors = base.lin.factors("default")
    factors.a.data.copy_(a), factors.b.data.copy_(b)
    found = [errors(results(base, x, dy, [factors.a, factors.b]), wanted)]
    lowrank.unload(base)
    for wide in (True, False):
        other = peft.get_peft_model(
            Holder().to(dtype),
            peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["lin"]),
            autocast_adapter_dtype=wide,
        )
        layer = other.base_model.model.lin
        layer.base_layer.load_state_dict(base.lin.state_dict())
        factors = [layer.lora_A.default.weight, layer.lora_B.default.weight]
        if not wide:
            other.to(dtype)
        factors[0].data.copy_(a), factors[1].data.copy_(b)
        found.append(errors(results(other, x, dy, factors), wanted))
    return list(zip(*found, strict=True))


def table() -> str:
    """The whole comparison as Markdown."""
    lines = [
        "| dtype | ‖ΔW‖/‖W0‖ | | lowrank | over PEFT, float32 factors | over PEFT, factors in the base's dtype |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        for size in SIZES:
            for name, (own, wide, narrow) in zip(("y", "dx", "dA", "dB"), row(dtype, size), strict=True):
                lines.append(
                    f"| {str(dtype)[6:]} | {size:g} | {name} | {own:.2e} | {own / wide:,.2f} | {own / narrow:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and put it into the document asked for, below its heading line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file; what stands above its first table is kept")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = table()
    print(text)
    if options.out:
        before = options.out.read_text(encoding="utf-8").split("| dtype |")[0]
        options.out.write_text(before + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
