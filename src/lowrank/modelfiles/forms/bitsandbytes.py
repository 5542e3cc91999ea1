"""bitsandbytes in files: four bits (`W.absmax`, `W.quant_map`, `W.quant_state.bitsandbytes__nf4`), int8 (`SCB`)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowrank.core.stored import FourBit, Int8Rows, Nested, Stored
from lowrank.errors import CheckpointError, quoted
from lowrank.files.json_file import parse_json
from lowrank.files.safetensors import DTYPES as DTYPES_IN_FILES
from lowrank.modelfiles.blocks import as_bytes, flat
from lowrank.modelfiles.forms.found import Found, check_shape, part, refuse
from lowrank.modelfiles.tensors import Source
from lowrank.modelfiles.workspace import Workspace

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LARGEST_STATE = 2**16  # bytes


@dataclass(eq=False)
class FourBitForm:
    """state: the JSON that says kind, block, dtype, shape and, where the scales are quantised too, theirs."""

    parts: dict[str, Source]
    state: dict[str, Any]
    scheme: str = "bitsandbytes 4-bit"

    def parts_of(self, stored: Stored) -> dict[str, Tensor]:
        """The packed numbers, their scales, and what describes these."""
        assert isinstance(stored, FourBit)
        weight = self.parts["weight"].entry
        found = {"weight": stored.packed.view(DTYPES_IN_FILES[weight.dtype]).view(weight.shape)}
        if isinstance(stored.absmax, Tensor):
            return found | {"absmax": stored.absmax}
        said = self.state | {"nested_offset": float(stored.absmax.offset)}
        state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        return found | {"absmax": stored.absmax.absmax, "nested_absmax": stored.absmax.scales, "state": state}

    def assembled(self, parts: dict[str, Tensor]) -> FourBit:
        """What reads these parts."""
        tensors = {role: flat(source) for role, source in self._numbers.items() if role not in parts}
        tensors |= {role: part.flatten() for role, part in parts.items() if role != "state"}
        said = parse_json(bytes(parts["state"].tolist())) if "state" in parts else self.state
        return self._of(tensors, torch.Size(self.state["shape"]), said)

    def _of(self, tensors: Mapping[str, Tensor], shape: torch.Size, said: Mapping[str, Any]) -> FourBit:
        absmax: Tensor | Nested = tensors["absmax"]
        if (code := self._tables.get("nested_quant_map")) is not None:
            offset = torch.tensor(float(said["nested_offset"]))
            absmax = Nested(tensors["absmax"], code, tensors["nested_absmax"], offset, self.state["nested_blocksize"])
        return self._code.holding(tensors["weight"].view(torch.uint8), absmax, shape)

    @cached_property
    def _numbers(self) -> dict[str, Source]:
        """The parts that differ from row to row, packed numbers as bytes."""
        own = {role: source for role, source in self.parts.items() if role in ("absmax", "nested_absmax")}
        return own | {"weight": as_bytes(self.parts["weight"])}

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        return {role: flat(source) for role, source in self.parts.items() if role.endswith("quant_map")}

    @cached_property
    def _code(self) -> FourBit:
        """The form without numbers."""
        none, code, dtype = torch.empty(0), self._tables["quant_map"], getattr(torch, self.state["dtype"])
        packed, kind = none.byte(), self.state["quant_type"]
        return FourBit(packed, none, code, self.state["blocksize"], torch.Size((0, 0)), dtype, kind)

    def stored(self) -> Stored:
        """What reads the whole."""
        return self.assembled({})

    def rows(self, rows: slice) -> Tensor:
        """Rows of the matrix."""
        return self.rows_into(rows, Workspace(), "rows")

    def rows_into(self, rows: slice, workspace: Workspace, role: str) -> Tensor:
        """Rows of the matrix, from the blocks that hold them."""
        columns, block, nested = self.state["shape"][1], self.state["blocksize"], self.state.get("nested_blocksize", 1)
        start, stop = rows.start * columns, rows.stop * columns
        first, last = start // (block * nested) * nested, -(-stop // block)  # of the blocks, whose scales have blocks
        before = first * block
        pieces = {
            "weight": (before // 2, -(-stop // 2)),
            "absmax": (first, last),
            "nested_absmax": (first // nested, -(-last // nested)),
        }
        tensors = {name: flat(source, *pieces[name], workspace, name) for name, source in self._numbers.items()}
        some = self._of(tensors, torch.Size((1, stop - before)), self.state)
        return some.numbers(start - before, stop - before, workspace, role).view(-1, columns)


@dataclass(eq=False)
class Int8Form:
    """int8 numbers and absmax (SCB) of every row."""

    parts: dict[str, Source]
    scheme: str = "bitsandbytes int8"

    def parts_of(self, stored: Stored) -> dict[str, Tensor]:
        """The numbers and the rows' scales."""
        assert isinstance(stored, Int8Rows)
        return {"weight": stored.numbers, "SCB": stored.absmax}

    def assembled(self, parts: dict[str, Tensor]) -> Int8Rows:
        """What reads these parts."""
        numbers, scales = (parts[role] if role in parts else flat(self.parts[role]) for role in ("weight", "SCB"))
        return Int8Rows(numbers.view(self.parts["weight"].entry.shape), scales)

    def stored(self) -> Stored:
        """What reads the whole."""
        return self.assembled({})

    def rows(self, rows: slice) -> Tensor:
        """Rows of the matrix."""
        columns = self.parts["weight"].entry.shape[1]
        numbers = flat(self.parts["weight"], rows.start * columns, rows.stop * columns)
        scales = flat(self.parts["SCB"], rows.start, rows.stop)
        return Int8Rows(numbers.view(len(scales), columns), scales).matrix()


def find(tensors: Mapping[str, Source], method: Mapping[str, Any], plain: str) -> Found:  # noqa: ARG001
    """Every weight in a form of bitsandbytes'."""
    found = Found()
    for name, source in tensors.items():
        weight, _, kind = name.rpartition(STATE)
        if weight:
            _add_four_bit(tensors, weight, kind, source, found)
        elif name.endswith(".SCB"):
            _add_int8(tensors, name.removesuffix(".SCB"), found)
    lone = [name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")]
    if lost := [weight for weight in lone if weight not in found.weights]:
        refuse(lost[0], "its part quant_state is missing: copy the model again")
    return found


def _add_four_bit(tensors: Mapping[str, Source], weight: str, kind: str, state: Source, found: Found) -> None:
    if kind not in KINDS:
        refuse(weight, f"its four-bit kind {quoted(kind)} is not known, only {' and '.join(KINDS)}")
    said = _state(weight, kind, state)
    parts = {"weight": part(tensors, weight, weight, ("U8", "BF16", "F16", "F32")), "state": state}
    shape, block = tuple(said["shape"]), said["blocksize"]
    numbers = math.prod(shape)
    blocks = -(-numbers // block)
    if parts["weight"].entry.nbytes != -(-numbers // 2):
        refuse(weight, f"it has {parts['weight'].entry.nbytes} bytes for {numbers} numbers of four bits")
    nested = "nested_blocksize" in said
    parts["absmax"] = part(tensors, f"{weight}.absmax", weight, ("U8",) if nested else ("F32",))
    parts["quant_map"] = part(tensors, f"{weight}.quant_map", weight, ("F32",))
    check_shape(parts["absmax"].entry, (blocks,))
    check_shape(parts["quant_map"].entry, (16,))
    if nested:
        parts["nested_absmax"] = part(tensors, f"{weight}.nested_absmax", weight, ("F32",))
        parts["nested_quant_map"] = part(tensors, f"{weight}.nested_quant_map", weight, ("F32",))
        check_shape(parts["nested_absmax"].entry, (-(-blocks // said["nested_blocksize"]),))
        check_shape(parts["nested_quant_map"].entry, (256,))
    found.add(weight, DTYPES[said["dtype"]], shape, FourBitForm(parts, said), parts["weight"])


def _state(weight: str, kind: str, source: Source) -> dict[str, Any]:
    """The quant_state's JSON, every number in it checked."""
    if source.entry.dtype != "U8" or source.entry.nbytes > LARGEST_STATE:
        refuse(weight, "its quant_state is no text")
    try:
        said = parse_json(bytes(flat(source).tolist()))
    except ValueError as error:
        raise CheckpointError(
            f"the quantised weight {weight} cannot be read: its quant_state is no JSON ({error})"
        ) from error
    faults = [] if isinstance(said, dict) else ["it is no table"]
    if not faults:
        shape = said.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            faults.append("shape")
        faults += [key for key in ("blocksize",) if said.get(key) not in BLOCKS]
        faults += ["dtype"] if said.get("dtype") not in DTYPES else []
        faults += ["quant_type"] if said.get("quant_type") != kind else []
        if "nested_blocksize" in said:
            good = type(said["nested_blocksize"]) is int and 0 < said["nested_blocksize"] <= 2**20
            offset = said.get("nested_offset")
            faults += [] if good else ["nested_blocksize"]
            faults += [] if isinstance(offset, float | int) and math.isfinite(offset) else ["nested_offset"]
    if faults:
        refuse(weight, f"its quant_state says nothing that can be meant of {', '.join(faults)}")
    return dict(said)


def _add_int8(tensors: Mapping[str, Source], module: str, found: Found) -> None:
    weight = f"{module}.weight"
    parts = {
        "weight": part(tensors, weight, weight, ("I8",)),
        "SCB": part(tensors, f"{module}.SCB", weight, ("F32",)),
    }
    shape = parts["weight"].entry.shape
    if len(shape) != 2:
        refuse(weight, f"it has shape {list(shape)}, and should be a matrix")
    check_shape(parts["SCB"].entry, (shape[0],))
    idle = (f"{module}.weight_format",)
    found.add(weight, "F32", shape, Int8Form(parts), parts["weight"], tuple(name for name in idle if name in tensors))
