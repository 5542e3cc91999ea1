"""The names of tensors in an adapter file, and what they say: which module, and which of its tensors.

base_model.model.<module path>.lora_A.weight            Linear, Conv1D, convolutions; B likewise
base_model.model.<module path>.lora_embedding_A         Embedding; B likewise
base_model.model.<module path>.lora_magnitude_vector    DoRA
base_model.model.<module path>.token_adapter.trainable_tokens_delta    rows of a table: those that the config names
base_model.model.<module path>.lora_B.bias               a bias of B itself (lora_bias): s times it goes to the layer's
base_model.model.<module path>.base_layer.bias          a trained bias of an adapted module
base_model.model.<module path>.weight                   a tensor kept in full (modules_to_save, other biases)
"""

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
A, B = "lora_A", "lora_B"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "token_adapter.trainable_tokens_delta"  # PEFT's word: these are the rows, no change of them
B_BIAS = "lora_B.bias"
ROLES = (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE)

# An adapter's name between role and `weight` is left by those who save a PEFT model's state_dict as it is.
_LOW_RANK = re.compile(rf"(?:(?P<path>.*)\.)?(?P<role>{'|'.join(ROLES)})(?:\.(?!bias$)[^.]+?)??(?:\.weight)?")
_B_BIAS = re.compile(rf"(?:(?P<path>.*)\.)?{B}(?:\.[^.]+)?\.bias")
_IN_ATTENTION = (".base_layer.out_proj", ".out_proj")  # PEFT wraps nn.MultiheadAttention around its out_proj
_TOKENS = re.compile(rf"(?:(?P<path>.*)\.)?{re.escape(TOKENS)}(?:\.[^.]+)?")

_WRAPS = re.compile(r"(?:(?:^|\.)(?:base_layer|token_adapter))+$")  # modules of experts are wrapped for each stack


@dataclass(frozen=True, slots=True)
class Key:
    """What a file key says. role: one of ROLES, TOKENS or B_BIAS, or None for a tensor kept in full.

    name: what that is called in its module; of_base: the key has the infix `base_layer`, as only adapted modules have.
    """

    path: str
    role: str | None
    name: str = "weight"
    of_base: bool = False


def parse(key: str) -> Key:
    """The meaning of a file key, with or without the prefix and without regard to any model."""
    bare = key.removeprefix(PREFIX)
    for role, expression in ((TOKENS, _TOKENS), (B_BIAS, _B_BIAS)):
        if match := expression.fullmatch(bare):
            return Key(match["path"] or "", role)
    if match := _LOW_RANK.fullmatch(bare):
        return Key((match["path"] or "").replace(*_IN_ATTENTION), match["role"])
    path, _, name = bare.rpartition(".")
    owner = _WRAPS.sub("", path)
    return Key(owner, None, name, of_base=owner != path)


def low_rank_key(path: str, role: str) -> str:
    """The file key of a factor or magnitude of the module at `path`."""
    ending = ".weight" if role in (A, B) else ""
    return f"{PREFIX}{path}.{role}{ending}"


def full_key(path: str, name: str, *, adapted: int) -> str:
    """The file key of a tensor kept in full; `adapted`: how often the module is, and has the infix `base_layer`."""
    owner = [path] if path else []
    return PREFIX + ".".join([*owner, *["base_layer"] * adapted, name])
