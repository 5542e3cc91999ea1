"""An adapted module of whose table adapters own single rows."""

from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import Tensor, nn

from lowrank.core.token_rows import TokenRows

ROWS = "token_rows_"


def _attribute(adapter: str) -> str:
    return ROWS + adapter.replace(".", "%2E")


class RowedLayer(nn.Module):
    """What a module can do whose weight W0 has rows that adapters own (`core.token_rows`).

    The rows take the place of W0's while their adapter is active, and low-rank changes of other adapters are added to
    them. Modules that share a weight share the rows: each holds the same `TokenRows`.

    row_names: the adapters that own rows here; active_rows: the rows that are in the answer.
    """

    row_names: tuple[str, ...] = ()
    active_rows: tuple[TokenRows, ...] = ()

    def rows(self, adapter: str) -> TokenRows:
        """The rows of one adapter."""
        return cast(TokenRows, self._modules[_attribute(adapter)])

    def add_rows(self, adapter: str, rows: TokenRows) -> None:
        """In place: hold `rows` under the name `adapter`, not yet active."""
        self.add_module(_attribute(adapter), rows)
        self.row_names = (*self.row_names, adapter)

    def remove_rows(self, adapters: Collection[str]) -> None:
        """In place: forget the rows of `adapters`, those of them that there are."""
        gone = {id(self._modules.pop(_attribute(name))) for name in self.row_names if name in adapters}
        if not gone:
            return
        self.row_names = tuple(name for name in self.row_names if name not in adapters)
        self.active_rows = tuple(rows for rows in self.active_rows if id(rows) not in gone)

    def activate_rows(self, adapters: Iterable[str]) -> None:
        """In place: exactly the rows of `adapters` are in the answer."""
        rows = tuple(self.rows(name) for name in adapters)
        if rows != self.active_rows:
            self.active_rows = rows

    def answers_by_rows(self) -> bool:
        """Whether the plain class's answer can be mended row by row, with no table formed."""
        return False

    def mended(self, answer: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The plain class's answer with the active rows in it: every kind that `answers_by_rows` says how."""
        raise NotImplementedError


def with_rows(table: Tensor, rows: Iterable[TokenRows]) -> Tensor:
    """The table (V, d) with all `rows` in it; itself where there are none."""
    for one in rows:
        table = one.put_into(table)
    return table
