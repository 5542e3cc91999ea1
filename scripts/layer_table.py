"""Write docs/layers.md: which layers are adapted, and how, and which are not, and why, from the tables in the source.

    python scripts/layer_table.py            # writes the file
    python scripts/layer_table.py --check    # exits with 1 where it is behind

A test runs the check, so what the page says of a layer is what `inject` does with it.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from lowrank.layers.base import LoraLayer
from lowrank.layers.kinds import KINDS, NAMED_KINDS, NOT_LINEAR_MAPS, REFUSED
from lowrank.layers.quantised import LoraQuantised

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layers.md"
HEADER = """# Layers

Which modules `target_modules` can mean; a subclass goes with its class. `scripts/layer_table.py` writes this page from
the tables in `lowrank.layers.kinds`.

## Adapted

| module | kind | DoRA | what is computed |
|---|---|---|---|
"""
BETWEEN = """
Rows of an Embedding, and of a Linear that is a head, can be trained one by one: `trainable_token_indices`.
Stacked experts are parameters of their module: `target_parameters`, [experts.md](experts.md).

## Not adapted

Naming one of these is an error that says this; `"all-linear"` passes them over, and says what share that is.

| module | why |
|---|---|
"""


def adapted() -> Iterator[str]:
    """One row a class of module that has a layer kind."""
    kinds: dict[str, type[LoraLayer]] = {f"torch.nn.{cls.__name__}": kind for cls, kind in KINDS.items()}
    kinds |= {f"{module}.{name}": kind for (module, name), kind in NAMED_KINDS.items()}
    kinds["a Linear whose weight is stored (NF4, int8, FP8, ...)"] = LoraQuantised
    for name, kind in kinds.items():
        formula = (inspect.getdoc(kind) or "").split(".\n")[0].split(". ")[0].split(": ")[0].rstrip(".")
        yield f"| {name} | {kind.kind} | {'yes' if kind.supports_dora else 'no'} | {' '.join(formula.split())} |"


def refused() -> Iterator[str]:
    """One row a class of module that has none."""
    for cls, why in REFUSED.items():
        name = {nn.RNNBase: "LSTM, GRU, RNN", nn.RNNCellBase: "LSTMCell, GRUCell, RNNCell"}.get(cls, cls.__name__)
        yield f"| torch.nn.{name} | {why} |"
    names = ", ".join(sorted(NOT_LINEAR_MAPS))
    yield f"| transformers' {names} | it does not answer W0·x + bias |"


def page() -> str:
    """The whole page."""
    return HEADER + "\n".join(adapted()) + "\n" + BETWEEN + "\n".join(refused()) + "\n"


def main() -> int:
    """Write the page, or with --check say whether it is behind."""
    wanted = page()
    if "--check" not in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    behind = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != wanted
    if behind:
        print("docs/layers.md is behind; run python scripts/layer_table.py", file=sys.stderr)
    return int(behind)


if __name__ == "__main__":
    sys.exit(main())
