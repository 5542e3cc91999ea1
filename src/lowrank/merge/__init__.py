"""Folding ΔW into the base: W = W0 + Σ s·B·A, a plain model again."""
