"""Adapted modules that training does not reach: after a backward pass their factors have no gradient."""

import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lowrank.errors import LowrankWarning, some
from lowrank.injection.adapters import lora_layers, trained_adapters

NUMBER = re.compile(r"\.\d+(?=\.|$)")


def without_gradient(model: nn.Module) -> list[str]:
    """The paths of adapted modules that the last backward pass gave no gradient, where none of their like got one.

    A module's like has the same path but for numbers: an expert that no token went to, or a layer that was dropped, is
    not dead while others of its sort are alive. Call it after a backward pass, before gradients are cleared.
    """
    alive: dict[str, bool] = defaultdict(bool)
    every = list(_trained(model))
    for path, has_gradient in every:
        alive[NUMBER.sub(".*", path)] |= has_gradient
    return [path for path, _ in every if not alive[NUMBER.sub(".*", path)]]


def _trained(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """(path, whether a factor has a gradient) of every adapted module that is trained."""
    trained = trained_adapters(model)
    for path, layer in lora_layers(model):
        parameters = [
            parameter
            for name in layer.adapter_names
            if name in trained
            for parameter in layer.factors(name).trainable()
            if parameter.requires_grad
        ]
        if parameters:
            yield path, any(parameter.grad is not None for parameter in parameters)


def complaint(paths: list[str]) -> str:
    """The sentence for what `without_gradient` found."""
    return (
        f"no gradient reaches the adapters of {some(paths)}: what the loss is computed from makes no use of these "
        "modules, so leave them out (exclude_modules)"
    )


class FirstBackward:
    """Warns at the end of the first backward pass that reaches a new adapter of modules that it did not reach.

    It hangs on the nodes that accumulate the gradients of the adapter's B and comes off with the first that fires. The
    nodes live as long as this does; a copy of the model has none.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._model = weakref.ref(model)
        factors = [layer.factors(adapter) for _, layer in lora_layers(model) if adapter in layer.adapter_names]
        with torch.enable_grad():  # a view's node leads to its leaf's
            views = [f.b.view_as(f.b).grad_fn for f in factors]
        self._nodes = [view.next_functions[0][0] for view in views if view is not None]
        self._handles = [node.register_hook(self._fired) for node in self._nodes if node is not None]

    def stop(self) -> bool:
        """In place: wait no longer. Returns whether it did."""
        handles, self._handles, self._nodes = self._handles, [], []
        for handle in handles:
            handle.remove()
        return bool(handles)

    def _fired(self, *_: Any) -> None:
        if self.stop():
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        model = self._model()
        if model is not None and (paths := without_gradient(model)):
            warnings.warn(complaint(paths), LowrankWarning, stacklevel=2)
