"""What a model with adapters does before and after each of its forwards: two hooks on the model itself."""

from typing import Any

import torch
from torch import nn

from lowrank.injection.presence import has_changed, settle
from lowrank.injection.state import find_state


class Before:
    """A forward pre-hook: waits while adapters are switched, and notices adapted modules that were replaced."""

    def __call__(self, model: nn.Module, _args: Any) -> None:
        """Raises LowrankError where a module was replaced and its adapter cannot be carried over."""
        if torch.compiler.is_compiling() or (state := find_state(model)) is None:
            return
        if has_changed(model, state):
            settle(model)
        state.turnstile.enter()


class After:
    """A forward hook, called whatever the forward ended in."""

    def __call__(self, model: nn.Module, _args: Any, _answer: Any) -> None:
        """Let waiting switches through."""
        if not torch.compiler.is_compiling() and (state := find_state(model)) is not None:
            state.turnstile.leave()


def add_rounds(model: nn.Module) -> None:
    """In place: hook the model."""
    model.register_forward_pre_hook(Before())
    model.register_forward_hook(After(), always_call=True)


def remove_rounds(model: nn.Module) -> None:
    """In place: take the hooks off again."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Before | After)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
