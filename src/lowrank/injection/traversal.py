"""Walking a model's own modules: what injection added (factors, waiting tensors) is passed over, however much it is.

The stacked parameters of a mixture's experts are met as modules of their own (`layers.stack`), under their own paths.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from lowrank.core.factors import LoraFactors
from lowrank.core.stored.of_module import frozen_shape, is_readable
from lowrank.core.token_rows import TokenRows
from lowrank.layers.overrides import CHILD, Overrides
from lowrank.layers.stack import ExpertStack, stacks_of


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model and all its own modules, in order, each once, the model itself under "".

    Right after a module of experts come its stacks.
    """
    seen: dict[int, nn.Module] = {}  # stacks are made on the way: they live on, so that no other gets their id
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen[id(module)] = module
        yield path, module
        if _holds_adapters_alone(module):
            continue
        dot = path + "." if path else ""
        children = [
            (dot + name, child)
            for name, child in module._modules.items()
            if child is not None and not isinstance(child, LoraFactors | TokenRows | Overrides | ExpertStack)
        ]
        stack += reversed([*((dot + name, inner) for name, inner in stacks_of(module).items()), *children])


def _holds_adapters_alone(module: nn.Module) -> bool:
    """Whether all children of an adapted module are known to be injection's, without a look at each of a thousand."""
    adapters: tuple[str, ...] | None = module.__dict__.get("adapter_names")
    if adapters is None:
        return False
    rows = module.__dict__.get("row_names", ())
    return len(module._modules) == len(adapters) + len(rows) + (CHILD in module._modules)


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """How many numbers the modules hold themselves, shared weights counted once, packed ones as the matrix they are."""
    modules = list(modules)
    counts = {
        id(p): frozen_shape(module).numel() if name == "weight" and is_readable(module) else p.numel()
        for module in modules
        for name, p in module._parameters.items()
        if p is not None
    }
    counts |= {id(m.weight): frozen_shape(m).numel() for m in modules if isinstance(m, ExpertStack)}
    return sum(counts.values())
