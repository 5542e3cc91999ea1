"""Which modules send tokens to a mixture's experts: "all-linear" leaves these alone."""

from collections.abc import Mapping

from torch import nn

from lowrank.layers.kinds import is_linear
from lowrank.layers.stack import ExpertStack


def routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of linear modules that are routers, of all of a model's `modules` by path.

    One is called `router`, or lies in a module that is (Switch, DBRX, LongCat); or it is called `gate`, or lies in one,
    beside a module `experts`, and has an output for each of these (Mixtral as it was, HunYuan's `gate.wg`).
    """
    counts = _experts(modules)
    return {path for path, module in modules.items() if is_linear(module) and _is_router(path, module, counts)}


def _is_router(path: str, module: nn.Module, counts: Mapping[str, int]) -> bool:
    *before, last = path.split(".")
    names = [last, *before[-1:]]
    if "gate" not in names or "router" in names:
        return "router" in names
    block = ".".join(before if last == "gate" else before[:-1])
    return counts.get(block) == getattr(module, "out_features", None)


def _experts(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """{path of a block: how many experts it holds as `experts`}, as stacks or as a list or table of modules."""
    found: dict[str, int] = {}
    for path, module in modules.items():
        owner = path.rpartition(".")[0] if isinstance(module, ExpertStack) else path
        block, _, name = owner.rpartition(".")
        if name != "experts":
            continue
        if isinstance(module, ExpertStack):
            found[block] = module.weight.shape[0]
        elif isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            found[block] = len(module)
    return found
