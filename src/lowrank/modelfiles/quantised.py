"""Whether a checkpoint's weights are stored quantised, and by what, by its config and the names of its tensors."""

from lowrank.modelfiles.base import BaseFiles

# Endings of tensors that take the place of `weight`, or lie beside it, and whose they are.
ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".weight_scale_inv": "FP8",
}


def quantisation(base: BaseFiles) -> str | None:
    """The method that quantised the checkpoint's weights, in a word; None where nothing says that they are."""
    said = (base.config or {}).get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if isinstance(method, str) and method:
        return method
    return next((name for end, name in ENDINGS.items() if any(key.endswith(end) for key in base.tensors)), None)
