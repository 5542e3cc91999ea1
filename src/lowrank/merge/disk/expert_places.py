"""An adapter of stacked experts against a base whose files keep them one by one, or whole."""

import re
from collections.abc import Mapping, MutableMapping

from lowrank.checkpoint.expert_files import magnitude_fault, told_apart, wraps_of
from lowrank.checkpoint.fusions import Part, fusions_of
from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.single_experts import in_stacks, parts_of
from lowrank.errors import CheckpointError, some
from lowrank.layers.experts import STACKS
from lowrank.merge.disk.adapters import Adapter, Contribution, ExpertRows
from lowrank.merge.disk.whole_stacks import whole_shape, whole_stack_changes
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.experts import InFiles, StackInFiles, WholeStack, stacks_in_files

NUMBERED = re.compile(r"experts\.\d+\.")


def stacks_for(base: BaseFiles, files: AdapterFiles) -> dict[str, InFiles]:
    """{path: where the base has it} of its stacks, for an adapter of stacks; of whole ones for one of single experts.

    The table of conversions is asked for no other: not where each of these has a tensor of its own.
    """
    if files.config.lora.target_parameters:
        return stacks_in_files(base)
    found = stacks_in_files(base) if _lost(base, files) else {}
    return {path: stack for path, stack in found.items() if isinstance(stack, WholeStack)}


def _lost(base: BaseFiles, files: AdapterFiles) -> list[str]:
    """Modules of the adapter that are called as single experts are, and are no tensors of the base."""
    return [path for path in files.low_rank if NUMBERED.search(path) and f"{path}.weight" not in base.tensors]


def single_parts(base: BaseFiles, files: AdapterFiles, stacks: Mapping[str, InFiles]) -> dict[str, Part]:
    """{module: its place} of an old adapter's single experts that the base keeps in whole stacks."""
    if files.config.lora.target_parameters or not stacks:
        return {}
    return parts_of(fusions_of(base.config), _lost(base, files), stacks)


def _with_singles(base: BaseFiles, files: AdapterFiles, stacks: Mapping[str, InFiles]) -> AdapterFiles:
    """The files with single experts in whole stacks; which way round is for `whole_stack_changes` to say."""
    parts, sizes = single_parts(base, files, stacks), {}
    for path, part in parts.items():
        stack = stacks[part.stack]
        assert isinstance(stack, WholeStack)
        count, rows, columns = whole_shape(base, stack)
        a, b = files.pair(path)
        turned = (b.shape[0] * part.blocks, a.shape[1]) == (columns, rows)
        sizes[part.stack] = (count, columns, rows) if turned else (count, rows, columns)
    return in_stacks(files, parts, sizes, dict.fromkeys(sizes, "experts"))


def with_experts(base: BaseFiles, files: AdapterFiles, stacks: Mapping[str, InFiles]) -> AdapterFiles:
    """The adapter's files with the factors of stacks under the paths of these, as far as the base has such stacks.

    Raises CheckpointError where which is which cannot be told, and for a base that stores its experts otherwise.
    """
    if not files.config.lora.target_parameters:
        return _with_singles(base, files, stacks)
    known = {path.rpartition(".")[2] for path in stacks}
    if not known:
        stored = [name for name, (_, entry) in base.tensors.items() if "expert" in name or len(entry.shape) > 2]
        if not stored:
            raise CheckpointError(
                f"{files.folder} adapts stacked experts, and {base.label} has no experts: give the base it was made for"
            )
        raise CheckpointError(
            f"{files.folder} adapts stacked experts, and {base.label} has none in a layout that transformers' table of "
            f"conversions knows (but {some(stored, 2)}): load the model and use merge_and_unload"
        )
    named = files.config.lora.target_parameters
    said = {word.rpartition(".")[2] for word in named} if isinstance(named, tuple) else set()
    names = [name for name in STACKS if name in known | said]
    roots = {path.rpartition(".")[0].rpartition(".")[2] for path in stacks}  # experts
    return told_apart(
        files,
        wraps_of(files),
        lambda root: dict.fromkeys(names, "experts") if root.rpartition(".")[2] in roots else {},
    )


def expert_changes(
    base: BaseFiles,
    adapter: Adapter,
    places: Mapping[str, str],
    changed: MutableMapping[str, Contribution],
    stacks: Mapping[str, InFiles],
) -> list[str]:
    """In place: the tensors of every stack's experts get their part of its change. Returns the faults."""
    faults = []
    found = {path: stacks.get(places.get(path, path)) for path in adapter.files.experts}
    whole, wrong = whole_stack_changes(base, adapter, {p: s for p, s in found.items() if isinstance(s, WholeStack)})
    for path, stack in found.items():
        if stack is None:
            faults.append(_nowhere(base, path, places.get(path, path)))
        elif isinstance(stack, WholeStack):
            continue
        elif fault := _shape_fault(base, adapter.files, path, stack):
            faults.append(fault)
        else:
            changed.update(_contributions(base, adapter, path, stack))
    changed.update(whole)
    return faults + wrong


def _nowhere(base: BaseFiles, path: str, place: str) -> str:
    """One phrase for a stack that the base has not as a whole, in no layout that is known."""
    root = place.rpartition(".")[0]
    own = [name for name in base.tensors if name.startswith(f"{root}.")]
    return f"{path}: the base has no such experts" + (
        f", but {some(own, 2)}: not all of them, or a layout that is not known here" if own else ""
    )


def _sizes(base: BaseFiles, stack: StackInFiles) -> list[tuple[int, ...]]:
    """The shape of every part, of the first expert."""
    return [base.tensors[names[0]][1].shape for names in stack.parts]


def _shape_fault(base: BaseFiles, files: AdapterFiles, path: str, stack: StackInFiles) -> str | None:
    sizes, count, rank = _sizes(base, stack), len(stack.parts[0]), files.config.rank(path)
    for names, size in zip(stack.parts, sizes, strict=True):
        if strange := [name for name in names if base.tensors[name][1].shape != size or len(size) != 2]:
            return f"{path}: {strange[0]} has shape {list(base.tensors[strange[0]][1].shape)}, unlike the other experts"
    rows, columns = sum(size[0] for size in sizes), sizes[0][1]
    wanted = [count * rank, columns], [rows, count * rank]
    got = [list(tensor.shape) for tensor in files.pair(path)]
    if got == list(wanted) and all(size[1] == columns for size in sizes):
        return magnitude_fault(files, path, count, rows)
    return (
        f"{path} has A {got[0]} and B {got[1]}, and {count} experts of {rows}×{columns} at rank {rank} want "
        f"{wanted[0]} and {wanted[1]}"
    )


def _contributions(base: BaseFiles, adapter: Adapter, path: str, stack: StackInFiles) -> list[tuple[str, Contribution]]:
    found, start = [], 0
    for names, size in zip(stack.parts, _sizes(base, stack), strict=True):
        rows = slice(start, start + size[0])
        start = rows.stop
        found += [
            (name, Contribution(adapter, path, "linear", ExpertRows(number, len(names), rows)))
            for number, name in enumerate(names)
        ]
    return found
