"""Tensors in, tensors out: factors, scaling, initialisation, merging arithmetic, spectrum. Imports torch only."""
