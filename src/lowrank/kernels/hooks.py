"""Saved-tensor hooks, by which gradient checkpointing and offloading see what autograd keeps."""

import weakref
from collections.abc import Hashable

import torch

# there is no public name for it
_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def are_saved_tensors_watched() -> bool:
    """Whether saved-tensor hooks are set, as gradient checkpointing does; yes where this torch does not tell."""
    return _top is None or _top(True) is not None


def watcher() -> Hashable:
    """Who watches: the same for all calls under the same hooks, as in one pass of one checkpointed block; None: nobody.

    Where this torch does not tell, no call is like another.
    """
    if _top is None:
        return object()
    hooks = _top(True)
    return None if hooks is None else weakref.ref(hooks[0])
