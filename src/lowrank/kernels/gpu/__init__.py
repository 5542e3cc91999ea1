"""Triton kernels for NVIDIA GPUs. Imported only where a tensor is on one and Triton is installed."""
