"""The differentiable functions behind the layers, for use without any module."""

from lowrank.kernels.linear import lora_linear

__all__ = ["lora_linear"]
