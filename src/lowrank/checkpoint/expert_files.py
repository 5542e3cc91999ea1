"""Stacked experts in PEFT's files, where a name tells the module of experts and how often it was wrapped, and no more.

PEFT wraps the module once for each of its parameters, in the order in which the module holds them, so that the first is
innermost: of gate_up_proj and down_proj, `experts.base_layer.lora_A` is the former's, `experts.lora_A` the latter's.
Which these are is said by target_parameters and by the model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lowrank.checkpoint.describe import target_names
from lowrank.checkpoint.keys import MAGNITUDE, A, B
from lowrank.checkpoint.layout import kind_in_file
from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.renaming import find_renaming
from lowrank.errors import CheckpointError
from lowrank.injection.patterns import matches, matches_name
from lowrank.layers.stack import LoraStack, kind_of_stack, stacks_of

WRAP = ".base_layer"


def owner_of(path: str, layer: nn.Module) -> str:
    """The path of the module whose parameter the layer adapts: that of the experts for a stack of them."""
    return path.rpartition(".")[0] if isinstance(layer, LoraStack) else path


def wrapped_paths(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """{path: the path in a file} of adapted modules, which are given in the model's order."""
    stacks: dict[str, list[str]] = {}
    for path, layer in layers.items():
        if isinstance(layer, LoraStack):
            stacks.setdefault(owner_of(path, layer), []).append(path)
    named = {
        path: root + WRAP * (len(paths) - 1 - place)
        for root, paths in stacks.items()
        for place, path in enumerate(paths)
    }
    return {path: named.get(path, path) for path in layers}


def parameter_names(stacks: Collection[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """{path: a name in target_parameters}: together they mean these stacks of all the model's parameters, and no other.

    PEFT takes a list alone; where no ending of a path will do, it is the path.
    """
    every = [f"{path}.{name}" for path, module in modules.items() for name in module._parameters]
    names = target_names(stacks, every) if stacks else ""
    if isinstance(names, str):
        return {path: path for path in stacks}
    return {path: next(name for name in names if matches_name(path, name)) for path in stacks}


def unwrapped(path: str) -> tuple[str, int]:
    """(the module's path, how often it is wrapped) of a path in a file."""
    root = path
    while root.endswith(WRAP):
        root = root.removesuffix(WRAP)
    return root, (len(path) - len(root)) // len(WRAP)


def with_stacks(files: AdapterFiles, modules: Mapping[str, nn.Module]) -> AdapterFiles:
    """The same files with the factors of stacks under the paths of these, for a model of these modules.

    Raises CheckpointError where it cannot be told which factors belong to which stack.
    """
    if not files.config.lora.target_parameters:
        return files
    wraps = wraps_of(files)
    rename = find_renaming([*wraps, *(key.path for key in files.full)], modules)

    def stacks_at(root: str) -> dict[str, str]:
        module = modules.get(rename(root))
        stacks = {} if module is None else stacks_of(module)
        return {name: kind_of_stack(stack).kind for name, stack in stacks.items()}

    return told_apart(files, wraps, stacks_at)


def wraps_of(files: AdapterFiles) -> dict[str, dict[int, str]]:
    """{a module's path: {how often it is wrapped: the path in the file}}."""
    wraps: dict[str, dict[int, str]] = {}
    for path in files.low_rank:
        root, depth = unwrapped(path)
        wraps.setdefault(root, {})[depth] = path
    return wraps


def told_apart(
    files: AdapterFiles, wraps: Mapping[str, Mapping[int, str]], stacks_at: Callable[[str], Mapping[str, str]]
) -> AdapterFiles:
    """The same files with the factors of stacks under the paths of these.

    stacks_at: {name: layer kind} of the stacks of the module at a path, in the module's order; none where it has none.
    Raises CheckpointError where it cannot be told which factors belong to which stack, and for stacks with biases of B.
    """
    low_rank: dict[str, Mapping[str, Tensor]] = {}
    experts: dict[str, str] = {}
    for root, by_depth in wraps.items():
        stacks = stacks_at(root)
        if not stacks:
            low_rank |= {path: files.low_rank[path] for path in by_depth.values()}
            continue
        for depth, name in enumerate(reversed(_meant(files, root, by_depth, stacks))):
            low_rank[f"{root}.{name}"] = files.low_rank[by_depth[depth]]
            experts[f"{root}.{name}"] = kind_in_file(stacks[name], MAGNITUDE in files.low_rank[by_depth[depth]])
    told = replace(files, low_rank=low_rank, experts=experts)
    _check_roles(told)
    check_packing(told)
    return told


def _check_roles(files: AdapterFiles) -> None:
    """Raise CheckpointError for a stack with a bias of B: nothing here, and nothing of PEFT's, knows its part."""
    for path in files.experts:
        if more := sorted(files.low_rank[path].keys() - {A, B, MAGNITUDE}):
            raise CheckpointError(
                f"{files.folder}: {path} has {' and '.join(more)}, and stacked experts have no biases of B, in PEFT "
                "neither: train it without lora_bias, or without its experts"
            )


def magnitude_fault(files: AdapterFiles, path: str, experts: int, rows: int) -> str | None:
    """What is wrong with the shape of DoRA's magnitudes of a stack of so many experts, each of so many output rows."""
    magnitudes = files.low_rank[path].get(MAGNITUDE)
    if magnitudes is None or magnitudes.shape == (experts, rows):
        return None
    got, wanted = list(magnitudes.shape), [experts, rows]
    return f"{path} has {MAGNITUDE} {got}, and {experts} experts of {rows} rows want {wanted}"


def check_packing(files: AdapterFiles) -> None:
    """Raise CheckpointError for stacks of which the files do not tell how B is packed, where that makes a difference.

    unsloth read B of its own trainings expert after expert for a while, and as PEFT does since; its files are the same.
    """
    marked = files.config.raw.get("auto_mapping")
    if files.packing or not isinstance(marked, dict) or "unsloth_fixed" not in marked:
        return
    for path in files.experts:
        rank = files.config.rank(path)
        if rank > 1 and files.pair(path)[0].shape[0] > rank:
            raise CheckpointError(
                f"{files.folder} was written by unsloth, whose versions have packed B of stacked experts in two ways "
                "that files do not tell apart: write it anew with `lowrank convert --experts-packed by-rank` (PEFT's "
                "way, and that of new versions) or `by-expert`, and keep the one that answers as the training did"
            )


def _meant(files: AdapterFiles, root: str, by_depth: Mapping[int, str], stacks: Iterable[str]) -> list[str]:
    """The stacks of the module at `root` that the adapter has, in the module's order."""
    names = files.config.lora.target_parameters or ()
    found = [name for name in stacks if matches(f"{root}.{name}", names, "target_parameters")]
    if sorted(by_depth) != list(range(len(found))):
        raise CheckpointError(
            f"{files.folder}: it holds factors of {len(by_depth)} stacks of {root}, and target_parameters in "
            f"adapter_config.json names {', '.join(found) or 'none'} of it, so which is which cannot be told: save the "
            "adapter again with PEFT, or correct target_parameters"
        )
    return found
