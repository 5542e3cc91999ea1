"""FP8 and int8 weights with scales beside them: `weight_scale_inv` by blocks, `weight_scale` by channel or group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.core.stored import Scaled, Stored
from lowrank.files.safetensors import FLOATS
from lowrank.modelfiles.blocks import flat
from lowrank.modelfiles.forms.found import Found, one_of, part, refuse
from lowrank.modelfiles.tensors import Source, StoredEntry

NUMBERS = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("weight_scale_inv", "weight_scale")
IDLE = ("input_scale", "activation_scale", "weight_shape", "output_scale")  # of activations: nothing of W0


@dataclass(eq=False)
class ScaledForm:
    """block: the (rows, columns) that share a scale; dtype: what the matrix is rounded to."""

    parts: dict[str, Source]
    block: tuple[int, int]
    grid: tuple[int, int]
    dtype: torch.dtype
    scheme: str = "scaled"

    def parts_of(self, stored: Stored) -> dict[str, Tensor]:
        """The numbers and their scales."""
        assert isinstance(stored, Scaled)
        return {"weight": stored.numbers, "scale": stored.scales.view(self.parts["scale"].entry.shape)}

    def assembled(self, parts: dict[str, Tensor]) -> Scaled:
        """What reads these parts."""
        tensors = {role: flat(source) for role, source in self.parts.items() if role not in parts} | parts
        return self._of(tensors, self.parts["weight"].entry.shape[0])

    def _of(self, tensors: Mapping[str, Tensor], rows: int, lead: int = 0) -> Scaled:
        """Of so many rows; lead: as in `Scaled`."""
        columns, across = self.parts["weight"].entry.shape[1], self.grid[1]
        zero = tensors["zero"].view(-1, across) if "zero" in tensors else None
        numbers, scales = tensors["weight"].view(rows, columns), tensors["scale"].view(-1, across)
        return Scaled(numbers, scales, self.block, self.dtype, zero, lead)

    def stored(self) -> Stored:
        """What reads the whole."""
        return self.assembled({})

    def rows(self, rows: slice) -> Tensor:
        """Rows of the matrix, and the scales of the blocks that they lie in."""
        tall, columns, (down, across) = self.block[0], self.parts["weight"].entry.shape[1], self.grid
        first, last = (0, 1) if down == 1 else (rows.start // tall, -(-rows.stop // tall))
        pieces = dict.fromkeys(self.parts, (first * across, last * across))
        pieces["weight"] = rows.start * columns, rows.stop * columns
        tensors = {role: flat(source, *pieces[role]) for role, source in self.parts.items()}
        return self._of(tensors, rows.stop - rows.start, rows.start - first * tall).matrix()


@dataclass(eq=False)
class StackForm:
    """Experts (E, d, k) of small numbers, with scales (E, ⌈d/block⌉, ⌈k/block⌉); a row of the whole is an expert."""

    parts: dict[str, Source]
    block: tuple[int, int]
    grid: tuple[int, int]
    dtype: torch.dtype
    scheme: str = "scaled"
    transposed: bool = False

    def unstacked(self, parts: Mapping[str, Tensor]) -> Iterator[Stored]:
        """Each expert's numbers and scales."""
        return (self._expert(number, parts) for number in range(self.parts["weight"].entry.shape[0]))

    def _expert(self, number: int, parts: Mapping[str, Tensor]) -> Scaled:
        numbers, scales = (one_of(self.parts[role], number, parts.get(role)) for role in ("weight", "scale"))
        return Scaled(numbers, scales.view(self.grid), self.block, self.dtype)

    def stacked(self, experts: Sequence[Stored]) -> dict[str, Tensor]:
        """Numbers and scales of all."""
        own = [expert for expert in experts if isinstance(expert, Scaled)]
        numbers = torch.stack([expert.numbers.view(torch.uint8) for expert in own]).view(own[0].numbers.dtype)
        scales = torch.stack([expert.scales for expert in own]).view(self.parts["scale"].entry.shape)
        return {"weight": numbers, "scale": scales}

    def rows(self, rows: slice) -> Tensor:
        """Experts, (n', d·k)."""
        experts = (self._expert(number, {}) for number in range(rows.start, rows.stop))
        return torch.stack([expert.matrix().flatten() for expert in experts])


def find(tensors: Mapping[str, Source], method: Mapping[str, Any], plain: str) -> Found:
    """Every weight of small numbers with scales beside it. Raises CheckpointError where these are not there."""
    found = Found()
    for name, source in tensors.items():
        if source.entry.dtype not in NUMBERS or isinstance(source.entry, StoredEntry):
            continue
        if len(source.entry.shape) == 3:
            _add_stack(tensors, name, method, plain, found)
            continue
        module = name.removesuffix(".weight")
        if module == name or len(source.entry.shape) != 2:
            continue
        scale = next((f"{module}.{word}" for word in SCALES if f"{module}.{word}" in tensors), None)
        if scale is None and (source.entry.dtype == "I8" or not method):
            continue  # numbers of a kind that is not known here
        if scale is None:
            refuse(name, "its scales are missing (weight_scale_inv or weight_scale): copy the model again")
        _add(tensors, name, module, scale, method, plain, found)
    return found


def _add(
    tensors: Mapping[str, Source],
    name: str,
    module: str,
    scale: str,
    method: Mapping[str, Any],
    plain: str,
    found: Found,
) -> None:
    parts = {"weight": tensors[name], "scale": part(tensors, scale, name, ("F32", "BF16", "F16"))}
    shape, entry = parts["weight"].entry.shape, parts["scale"].entry
    grid = (1, 1) if entry.shape in ((), (1,)) else (entry.shape[0], 1) if len(entry.shape) == 1 else entry.shape[:2]
    block = _block(shape, (grid[0], grid[1]), method)
    if block is None:
        refuse(scale, f"its shape {list(entry.shape)} does not fit a weight of shape {list(shape)}")
    if (zero := f"{module}.weight_zero_point") in tensors:
        parts["zero"] = part(tensors, zero, name, ("I8", "I32"))
        if parts["zero"].entry.shape != entry.shape:
            refuse(zero, f"it has shape {list(parts['zero'].entry.shape)}, and its scales {list(entry.shape)}")
    idle = tuple(n for word in IDLE if (n := f"{module}.{word}") in tensors)
    form = ScaledForm(parts, block, (grid[0], grid[1]), FLOATS[plain])
    found.add(name, plain, shape, form, parts["weight"], idle)


def _add_stack(tensors: Mapping[str, Source], name: str, method: Mapping[str, Any], plain: str, found: Found) -> None:
    """In place: a stack of experts, where its scales lie beside it; others stay numbers that nothing reads."""
    ends = ("_scale_inv", "_scale")  # of `gate_up_proj` as of `weight`
    scale = next((name + end for end in ends if name + end in tensors), None)
    if scale is None:
        return
    parts = {"weight": tensors[name], "scale": part(tensors, scale, name, ("F32", "BF16", "F16"))}
    shape, entry = parts["weight"].entry.shape, parts["scale"].entry
    grid = (*entry.shape[1:], 1, 1)[:2]
    block = _block(shape[1:], (grid[0], grid[1]), method) if entry.shape[:1] == shape[:1] else None
    if block is None or len(entry.shape) > len(shape):
        refuse(scale, f"its shape {list(entry.shape)} does not fit experts of shape {list(shape)}")
    idle = tuple(n for word in ("_input_scale", "_activation_scale") if (n := name + word) in tensors)
    form = StackForm(parts, block, (grid[0], grid[1]), FLOATS[plain])
    found.add(name, plain, shape, form, parts["weight"], idle)


def _block(shape: tuple[int, ...], grid: tuple[int, int], method: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns that share a scale: the config's where it says them, else those that the grid divides."""
    if min(grid) < 1:
        return None
    said = method.get("weight_block_size")
    sizes = said if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said) else None
    if sizes and grid == (-(-shape[0] // sizes[0]), -(-shape[1] // sizes[1])):
        return sizes[0], sizes[1]
    if shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]
