"""Which layer kind adapts which module."""

from torch import nn

from lowrank.core.stored.of_module import FLOATING, is_stored
from lowrank.layers.attention import LoraAttention
from lowrank.layers.base import LoraLayer
from lowrank.layers.conv import LoraConv
from lowrank.layers.embedding import LoraEmbedding
from lowrank.layers.experts import stack_names
from lowrank.layers.extended import REPLACED, forward_is_replaced
from lowrank.layers.linear import LoraConv1D, LoraLinear
from lowrank.layers.quantised import LoraQuantised
from lowrank.layers.stack import ExpertStack, LoraStack, kind_of_stack

KINDS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Linear: LoraLinear,
    nn.Embedding: LoraEmbedding,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
    nn.Conv3d: LoraConv,
    nn.MultiheadAttention: LoraAttention,
}
NAMED_KINDS: dict[tuple[str, str], type[LoraLayer]] = {  # classes of packages that are not imported for this
    ("transformers.pytorch_utils", "Conv1D"): LoraConv1D,
}

IN_FULL = "modules_to_save trains it in full"
REFUSED: dict[type[nn.Module], str] = {  # torch's layers with weights that are no W0 of the kinds above, and why
    nn.RNNBase: f"the matrices of its gates, layers and directions go into one kernel, past any change: {IN_FULL}",
    nn.RNNCellBase: f"its forward reads its matrices by names of their own (weight_ih, weight_hh): {IN_FULL}",
    nn.Bilinear: f"its weight is a matrix for each output, between two inputs: {IN_FULL}",
    nn.EmbeddingBag: f"it sums rows by itself, with weights of its own choice for each: {IN_FULL}",
    nn.ConvTranspose1d: f"its kernel (in, out, ...) runs backwards, which no format of adapters writes: {IN_FULL}",
    nn.ConvTranspose2d: f"its kernel (in, out, ...) runs backwards, which no format of adapters writes: {IN_FULL}",
    nn.ConvTranspose3d: f"its kernel (in, out, ...) runs backwards, which no format of adapters writes: {IN_FULL}",
}

MAKERS = {  # packages whose quantised layers are no linear maps that are read here, and what they make
    "gptqmodel": "GPTQ or AWQ (gptqmodel)", "auto_gptq": "GPTQ (auto_gptq)", "awq": "AWQ", "hqq": "HQQ",
    "optimum": "quanto or GPTQ (optimum)", "eetq": "EETQ", "aqlm": "AQLM",
}  # fmt: skip

# Subclasses of Linear in transformers whose answer is not W0·x + bias: a tuple of scores, groups apart, more columns.
NOT_LINEAR_MAPS = frozenset({"Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear", "IdeficsDecoupledLinear"})


def kind_of(module: nn.Module) -> type[LoraLayer] | None:
    """The layer kind for `module`, by its class or the nearest parent class that has one; None where there is none.

    A linear map whose weight is stored in another form than numbers is of a kind of its own.
    """
    if isinstance(module, LoraQuantised) or (isinstance(module, nn.Linear) and is_stored(module)):
        return LoraQuantised
    if isinstance(module, ExpertStack):
        return kind_of_stack(module)
    for cls in type(module).__mro__:
        kind = KINDS.get(cls) or NAMED_KINDS.get((cls.__module__, cls.__name__))
        if kind is not None:
            return kind
    return None


def is_linear(module: nn.Module) -> bool:
    """True for what "all-linear" means: nn.Linear, its subclasses that are linear maps, and transformers' Conv1D."""
    kind = kind_of(module)
    return kind is not None and issubclass(kind, LoraLinear) and not _answers_otherwise(module)


def _maker(module: nn.Module) -> str | None:
    """The package whose quantised layer this is, where it is one that nothing here reads."""
    package = type(module).__module__.partition(".")[0]
    return MAKERS.get(package)


def _answers_otherwise(module: nn.Module) -> bool:
    return any(c.__name__ in NOT_LINEAR_MAPS and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _unfit(weight: nn.Parameter | None) -> str | None:
    """Why a change cannot be added to the weight, or None."""
    if weight is None:
        return "its weight is no parameter of its own: a parametrisation (weight_norm, spectral_norm, ...) computes it"
    if weight.dtype in FLOATING:
        return None
    if weight.is_complex():
        return f"its weight is {weight.dtype}, and changes are real"
    if weight.is_floating_point():
        return f"its weight is {weight.dtype}, which holds a scaled copy at best: load the base in 16 or 32 bits"
    return f"its weight is {weight.dtype}, a stored form that is not known here: register_reader can teach it"


OFFLOADED = (
    "accelerate offloads its weight: adapt the model before, and name the class it has then (LoraLinear, ...) in "
    "accelerate's preload_module_classes"
)


def refusal(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted, in words that end a sentence, or None where it can."""
    kind = kind_of(module)
    if isinstance(module, ExpertStack):
        return _refusal_of_stack(module)
    if kind is None and (maker := _maker(module)) is not None:
        return (
            f"a {type(module).__name__} holds its weight in the form of {maker}, which is not read here: load the base "
            "in NF4 or int8 by bitsandbytes, or in 16 bits"
        )
    if kind is None and (names := stack_names(module)):
        return (
            f"a {type(module).__name__} holds experts as stacked parameters: name these in target_parameters "
            f"({', '.join(names)})"
        )
    if kind is None and (why := next((REFUSED[cls] for cls in type(module).__mro__ if cls in REFUSED), None)):
        return f"a {type(module).__name__} is not adapted: {why}"
    if kind is None:
        name = type(module).__name__
        return f"a {name} is none of Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention"
    if _answers_otherwise(module):
        return f"a {type(module).__name__} does not answer W0·x + bias, so a change of W0 cannot be added to its answer"
    if (why := kind.refusal(module)) is not None:
        return why
    if not issubclass(kind, LoraQuantised) and (why := _unfit(module._parameters.get(kind.weight_name))) is not None:
        return why
    if forward_is_replaced(module):
        return REPLACED
    if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return OFFLOADED
    return None


def _refusal_of_stack(stack: ExpertStack) -> str | None:
    if not is_stored(stack) and (why := _unfit(stack.experts._parameters.get(stack.parameter))) is not None:
        return why
    if forward_is_replaced(stack.experts):
        return REPLACED
    if hasattr(stack.experts, "_hf_hook") and stack.weight.is_meta:
        return OFFLOADED
    return LoraStack.refusal(stack)
