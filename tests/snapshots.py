"""Everything that may be seen of a model, to show that it came back as it was."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Snapshot:
    """State bits, parameter objects, classes, flags, hooks and the instance attributes of every module."""

    state: dict[str, Tensor]
    parameters: dict[str, int]
    classes: dict[str, type]
    grads: dict[str, bool]
    attributes: dict[str, list[str]]
    hooks: dict[str, int]
    training: dict[str, bool]


def snapshot(model: nn.Module) -> Snapshot:
    """What the model is now."""
    modules = dict(model.named_modules())
    return Snapshot(
        state={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        parameters={name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        classes={path: type(module) for path, module in modules.items()},
        grads={name: p.requires_grad for name, p in model.named_parameters()},
        attributes={path: sorted(vars(module)) for path, module in modules.items()},
        hooks={path: hook_count(module) for path, module in modules.items()},
        training={path: module.training for path, module in modules.items()},
    )


def hook_count(module: nn.Module) -> int:
    """How many hooks of any sort a module has."""
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks"))


def assert_same(model: nn.Module, before: Snapshot) -> None:
    """The model is what it was: the same bits under the same keys in the same objects, and nothing left behind."""
    after = snapshot(model)
    assert list(after.state) == list(before.state)
    for name, tensor in after.state.items():
        assert same_bits(tensor, before.state[name]), name
    for aspect in ("parameters", "classes", "grads", "attributes", "hooks", "training"):
        assert getattr(after, aspect) == getattr(before, aspect), aspect


def same_bits(left: Any, right: Any) -> bool:
    """Equal bit for bit, zero's sign and NaN included; of outputs that are tensors, or hold them."""
    if isinstance(left, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if not left.is_floating_point():
            return torch.equal(left, right)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
        return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
    return len(left) == len(right) and all(same_bits(a, b) for a, b in zip(left, right, strict=True))
