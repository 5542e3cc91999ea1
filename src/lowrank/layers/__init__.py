"""Modules that carry adapters, one file a kind."""

from lowrank.layers.base import LoraLayer

__all__ = ["LoraLayer"]
