"""Gradient checkpointing over frozen inputs.

A reentrant checkpoint segment only gets gradients if one of its inputs requires them, and with every base weight frozen
the embedded tokens do not. A hook on the input embeddings makes their output require gradients while the model says it
is checkpointing, and only then, since it costs the lowest layer an input gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class RequireGradHook:
    """A forward hook for an input embedding of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Make the output require gradients, in place, while the model checkpoints."""
        checkpointing = getattr(self.model, "is_activation_checkpointing", None)
        if checkpointing is None:  # transformers before 5.20 knew it by another name
            checkpointing = getattr(self.model, "is_gradient_checkpointing", False)
        if checkpointing and torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
            output.requires_grad_(True)


def _input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if callable(getter):
            try:
                embedding = getter()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(embedding, nn.Module):
                yield embedding


def add_hooks(model: nn.Module) -> None:
    """In place: hook every input embedding once."""
    for embedding in {id(e): e for e in _input_embeddings(model)}.values():
        if not any(isinstance(hook, RequireGradHook) for hook in embedding._forward_hooks.values()):
            embedding.register_forward_hook(RequireGradHook(model))


def remove_hooks(model: nn.Module) -> None:
    """In place: take our hooks off again."""
    for module in model.modules():
        ours = [key for key, hook in module._forward_hooks.items() if isinstance(hook, RequireGradHook)]
        for key in ours:
            del module._forward_hooks[key]
