"""By which path every adapted layer is computed, why not the fast one, and which layers share an input."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lowrank.injection.adapters import lora_layers
from lowrank.layers.base import LoraLayer
from lowrank.layers.linear import LoraLinear
from lowrank.layers.stack import LoraStack


@dataclass(frozen=True, slots=True)
class LayerPath:
    """A layer's path in the model, and why plain operations compute it: None where the fused function does."""

    path: str
    layer: LoraLayer
    reason: str | None

    @property
    def name(self) -> str:
        """ "fused" or "plain"."""
        return "fused" if self.reason is None else "plain"


def execution_paths(model: nn.Module) -> list[LayerPath]:
    """One entry for every adapted layer with an active adapter, in model order.

    What only a call can tell (torch.compile, torch.func, an input of another dtype) is not in it: those calls take the
    plain path too, whatever the layer.
    """
    return [LayerPath(path, layer, plain_reason(layer)) for path, layer in lora_layers(model) if layer.active_adapters]


def plain_reason(layer: LoraLayer) -> str | None:
    """Why plain operations compute the layer's active adapters, or None where the fused function does."""
    if isinstance(layer, LoraLinear):
        return layer.plain_reason
    if isinstance(layer, LoraStack):  # in the products of the module of experts
        return None
    return f"the {layer.kind} has no fused function: its base is no plain product"


def shared_inputs(model: nn.Module, run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Which adapted linear layers are called with one and the same tensor while `run()` calls the model.

    Found by watching the calls, not by names: (("…q_proj", "…k_proj", "…v_proj"), ("…gate_proj", "…up_proj"), …), in
    the order of the calls. Such layers are computed together (`kernels.together`) or share
    an input gradient (`kernels.shared_input`).
    """
    calls: list[tuple[Tensor, list[str]]] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if calls and calls[-1][0] is args[0]:
                calls[-1][1].append(path)
            else:
                calls.append((args[0], [path]))

        return note

    handles = [
        layer.register_forward_pre_hook(watch(path))
        for path, layer in lora_layers(model)
        if isinstance(layer, LoraLinear)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(paths) for _, paths in calls if len(paths) > 1]
