"""Whether a checkpoint has weights in a stored form that nothing here reads, by the names of its tensors."""

from lowrank.errors import short
from lowrank.modelfiles.base import BaseFiles

# Endings of tensors that take the place of `weight`, or lie beside it: whose they are, and what reads them.
ENDINGS = {
    ".qweight": "GPTQ or AWQ, which gptqmodel dequantises",
    ".weight_packed": "compressed-tensors' packed integers, which compressed-tensors dequantises",
    ".W_q": "HQQ, which hqq dequantises",
    ".weight_scale_2": "NVFP4, which modelopt dequantises",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


def unread_form(base: BaseFiles) -> str | None:
    """The form of weights that are not read, and who reads it; None where there are none."""
    found = next((name for end, name in ENDINGS.items() if any(key.endswith(end) for key in base.tensors)), None)
    said = (base.config or {}).get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if found is None or not isinstance(method, str):
        return found
    return f"{short(method, 60)}: {found}"
