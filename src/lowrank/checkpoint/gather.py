"""A model that FSDP2 shards, seen as it was: tensors with all their values, and its own class."""

from collections.abc import Callable

from torch import Tensor, nn

from lowrank.core.factors import LoraFactors

Values = Callable[[Tensor], Tensor]


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of `model` before `fully_shard` put its own in front."""
    first, *rest = type(model).__bases__
    return rest[0] if first.__name__ == "FSDPModule" and rest else type(model)


def whole_factors(factors: LoraFactors, values: Values) -> LoraFactors:
    """The same factors of whole tensors; `factors` themselves where they are."""
    got = {name: values(parameter).detach() for name, parameter in factors.named_parameters()}
    if all(tensor.data_ptr() == factors.get_parameter(name).data_ptr() for name, tensor in got.items()):
        return factors
    start = (got["start_a"], got["start_b"]) if "start_a" in got else None
    return LoraFactors(
        got["a"],
        got["b"],
        factors.scale,
        factors.dropout,
        magnitude=got.get("magnitude"),
        start=start,
        parts=factors.parts,
        out_features=factors.out_features,
    )
