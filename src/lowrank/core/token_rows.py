"""Rows of a table that one adapter owns: some tokens are trained, the rest of the table is as it was."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenRows(nn.Module):
    """The table W (V, d) with `values` in the place of its rows `indices`: PEFT's `trainable_token_indices`.

    values: (n, d), float32 or wider, rounded to W's dtype where they meet it; indices: n different rows. Nothing of W's
    size is formed or gets a gradient where a table is looked up or a head is multiplied with.
    """

    values: nn.Parameter
    at: Tensor  # (n,): the rows, in the order of `values`
    in_order: Tensor  # (n,): the rows, ascending, and
    slot: Tensor  # (n,): which of `values` each of these is

    def __init__(self, values: Tensor, indices: Sequence[int]) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.indices = tuple(indices)
        at = torch.tensor(self.indices, device=values.device)
        order = at.argsort()
        for name, tensor in (("at", at), ("in_order", at[order]), ("slot", order)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def of(cls, table: Tensor, indices: Sequence[int]) -> "TokenRows":
        """Rows that start as those of `table` (V, d), of which a copy is made."""
        wide = torch.promote_types(torch.float32, table.dtype)
        return cls(table.detach()[torch.tensor(tuple(indices), device=table.device)].to(wide), indices)

    def put_into(self, table: Tensor) -> Tensor:
        """The whole table with these rows in it: a new (V, d), differentiable in the values."""
        return table.index_copy(0, self.at, self.values.to(table.dtype))

    def looked_up(self, ids: Tensor, h: Tensor, scale: Tensor | float, padding_idx: int | None) -> Tensor:
        """h (..., d) is c·W[ids]; the answer has these rows, c times, where `ids` (...) names them.

        The row of `padding_idx` gets no gradient, as in a table.
        """
        place = torch.searchsorted(self.in_order, ids).clamp_max(len(self.indices) - 1)
        padding = self.indices.index(padding_idx) if padding_idx in self.indices else None
        rows = F.embedding(self.slot[place], self.values.to(h.dtype), padding) * scale
        return torch.where((self.in_order[place] == ids).unsqueeze(-1), rows, h)

    def multiplied(self, x: Tensor, h: Tensor, table: Tensor) -> Tensor:
        """h (..., V) is W·x + bias; the answer has these rows' scores in the place of the table's own.

        The difference of the rows is multiplied, so that rows which are still the table's give its very bits.
        """
        moved = self.values - table[self.at].to(self.values.dtype)
        return h.index_add(-1, self.at, F.linear(x, moved.to(x.dtype)).to(h.dtype))

    def extra_repr(self) -> str:
        """How many rows of which width, for `print(model)`."""
        return f"rows={len(self.indices)}, d={self.values.shape[1]}"
