"""What "all-linear" and filters leave as it is, in words: nothing that was meant to be adapted is missed in silence."""

from collections.abc import Collection

from torch import nn

from lowrank.errors import quoted, some
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import matches_name, split_parts
from lowrank.layers.conv import LoraConv
from lowrank.layers.kinds import kind_of
from lowrank.layers.stack import ExpertStack

SAID = 0.01  # below this share of the weights a sort of left-out weight is not worth a word
MEANT = "stack"  # of linear maps, which a user of "all-linear" means too


def emptied(config: LoraConfig, modules: Collection[str], targets: Collection[str]) -> list[str]:
    """One sentence for every name in target_modules of which exclusions and filters leave no module."""
    names = config.target_modules if isinstance(config.target_modules, tuple) else ()
    found = []
    for name in (split_parts(pattern)[0] for pattern in names):
        hits = [path for path in modules if matches_name(path, name)]
        if hits and not any(path in targets for path in hits):
            found.append(
                f"target_modules: {quoted(name)} names {len(hits)} modules, and exclude_modules, layers_to_transform "
                "and modules_to_save leave none of them"
            )
    return found


def left_out(
    model: nn.Module, modules: dict[str, nn.Module], adapted: Collection[str], heads: Collection[int]
) -> tuple[str, str | None]:
    """(a line on the weights that are not adapted, a warning where stacks of linear maps are among them).

    adapted: the paths of the targets; heads: output heads, by identity. Shares are of all parameters. Vectors (biases,
    norms) are not counted, and a weight that an adapted module shares is adapted.
    """
    sizes: dict[str, list[tuple[str, int]]] = {}
    everything = {
        id(p): p for module in (model, *modules.values()) for p in module._parameters.values() if p is not None
    }
    targets = [modules[path] for path in adapted]
    seen = {id(p) for target in targets for p in target._parameters.values()}
    seen |= {id(target.weight) for target in targets if isinstance(target, ExpertStack)}
    for path, module in {"": model, **modules}.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                sort = "head" if id(module) in heads else _sort(module, parameter)
                sizes.setdefault(sort, []).append((f"{path}.{name}".lstrip("."), parameter.numel()))
    total = sum(p.numel() for p in everything.values()) or 1
    said = {sort: found for sort, found in sizes.items() if sum(size for _, size in found) >= SAID * total}
    line = "; ".join(_phrase(sort, found, total) for sort, found in said.items())
    if MEANT not in said:
        return line and f"{line} of the weights", None
    leaves = sorted({".".join(path.split(".")[-2:]) for path, _ in said[MEANT]})
    stacks = _phrase(MEANT, said[MEANT], total)
    return f"{line} of the weights", f'"all-linear" leaves out {stacks} of the weights: {some(leaves, 6)}'


def _sort(module: nn.Module, parameter: nn.Parameter) -> str:
    kind = kind_of(module)
    if isinstance(module, nn.Embedding):
        return "table"
    if kind is not None and issubclass(kind, LoraConv):
        return "convolution"
    return "stack" if sum(size > 1 for size in parameter.shape) > 2 else "matrix"


NAMES = {
    "head": ("output head", "output heads"),
    "table": ("embedding table", "embedding tables"),
    "convolution": ("convolution", "convolutions"),
    "stack": ("stack of matrices", "stacks of matrices"),
    "matrix": ("other matrix", "other matrices"),
}


def _phrase(sort: str, found: list[tuple[str, int]], total: int) -> str:
    one, many = NAMES[sort]
    if sort == "stack" and all("expert" in path for path, _ in found):
        one, many = "expert stack", "expert stacks"
    share = sum(size for _, size in found) / total
    return f"{len(found)} {one if len(found) == 1 else many}, {share:.0%}"
