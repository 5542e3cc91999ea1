"""Changes that no factors can hold, kept as full tensors: PEFT's modules_to_save and trained biases."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lowrank.adapters.differences import Difference, stored
from lowrank.checkpoint.keys import Key


@dataclass(frozen=True, slots=True)
class Whole:
    """tensors: as the adapter's file holds them; modules: for modules_to_save; bias: none or lora_only."""

    tensors: Mapping[Key, Tensor] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    bias: str = "none"


def keep_whole(changed: Sequence[Difference], shared: Sequence[Difference], adapted: Collection[str]) -> Whole:
    """Everything in `changed` that a full copy can express, with the rest of the module it belongs to.

    A changed bias of an adapted module makes all adapted modules' biases trained ones (bias="lora_only"), since no
    config can name some. A changed weight or bias of another module saves that module. Tensors that are neither, or
    whose shape changed, have no place in an adapter.
    """
    owners = {one.name: one.name.rpartition(".") for one in shared}
    usable = {one.name for one in changed if one.comparable and owners[one.name][2] in ("weight", "bias")}
    biases = any(owners[name][0] in adapted and owners[name][2] == "bias" for name in usable)
    modules = {owners[name][0] for name in usable if owners[name][0] not in adapted}
    tensors = {}
    for one in shared:
        path, _, name = owners[one.name]
        if path in modules and one.comparable:
            tensors[Key(path, None, name)] = stored(one.tuned).reshape(one.tuned.entry.shape).clone()
        elif biases and path in adapted and name == "bias":
            tensors[Key(path, None, name, of_base=True)] = stored(one.tuned).reshape(one.tuned.entry.shape).clone()
    return Whole(tensors, tuple(sorted(modules)), "lora_only" if biases else "none")
