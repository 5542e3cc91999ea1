"""A short training of a small decoder, as a digest of the adapter's bytes after every step: what a seed determines.

Run as a program it is a process of its own: `python seeded_training.py '{"steps": 3}'` prints the digests as JSON.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.kernels import order, pieces, together
from lowrank.kernels.gpu import choice

WIDTH, TOKENS = 48, 160
PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """Attention of one head and a gated MLP, with the calls of a Llama's block."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (48, 48), "k": (24, 48), "v": (24, 48), "o": (48, 24), "gate": (64, 48), "up": (64, 48)}
        for name, (d, k) in sizes.items():
            self.add_module(name, nn.Linear(k, d, bias=name in "qk"))
        self.down = nn.Linear(64, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, T, 48), the same shape out."""
        h = F.layer_norm(x, x.shape[-1:])
        scores = self.q(h)[..., :24] @ self.k(h).mT / 5
        x = x + self.o(scores.softmax(-1) @ self.v(h))
        h = F.layer_norm(x, x.shape[-1:])
        result: torch.Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


class Decoder(nn.Module):
    """Two blocks; checkpointed where asked."""

    def __init__(self, checkpointing: str | None) -> None:
        super().__init__()
        self.blocks, self.checkpointing = nn.ModuleList(Block() for _ in range(2)), checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, T, 48), the same shape out."""
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
                if self.checkpointing
                else block(x)
            )
        return x


def forget() -> None:
    """What a process has learned from its calls, and all that it keeps about shapes, as a fresh one has it."""
    together._followers.clear()
    together._settled.clear()
    together._local.calls = None
    for known in (pieces.tried, order.choose_order, choice._product_tile, choice._serves_gradients):
        known.cache_clear()


def digests(
    dtype: str = "float32",
    steps: int = 8,
    dropout: float = 0.0,
    checkpointing: str | None = None,
    restart: int | None = None,
    together_: bool = True,
    junk: int = 0,
) -> list[str]:
    """The adapter after each step, with another rank for each projection.

    `restart`: before this step everything learned is forgotten; without `together_` it is forgotten before every step;
    `junk`: so many odd pieces of memory are taken first, and half of them given back.
    """
    heap = [torch.empty(37 * i % 4099 + 1) for i in range(junk)][::2]
    torch.manual_seed(0)
    model = Decoder(checkpointing).to(getattr(torch, dtype))
    ranks = {name: 2 + i for i, name in enumerate(PROJECTIONS)}
    config = lowrank.LoraConfig(
        r=4, lora_alpha=7, target_modules=PROJECTIONS, rank_pattern=ranks, lora_dropout=dropout,
        init_lora_weights="random",
    )  # fmt: skip
    lowrank.inject(model, config)
    if dtype == "float64":
        model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, draw, found = torch.optim.AdamW(trained, lr=1e-2), torch.Generator().manual_seed(1), []
    for step in range(steps):
        if step == restart or not together_:
            forget()
        x = torch.randn(2, TOKENS, WIDTH, generator=draw).to(getattr(torch, dtype)).requires_grad_()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained)).hexdigest())
    del heap
    return found


if __name__ == "__main__":
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads", 1))
    print(json.dumps(digests(**settings)))
