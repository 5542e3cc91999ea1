"""Weights that are stored otherwise than as numbers of one dtype, one form a file: each can be read as its matrix.

fourbit     bitsandbytes NF4 and FP4, plain or double quantised      scaled      int8 and FP8 with scales
mxfp4       blocks of 32 FP4 numbers with a power of two each         requantise  from a matrix back to a form
of_module   the open table from a module's class, or its weight's, to a reader
stack       the experts of a layer, each in a form of the above      of_stack    the same table for modules of experts
"""

from lowrank.core.stored.base import Stored, Weight, dense
from lowrank.core.stored.fourbit import FourBit, Nested
from lowrank.core.stored.mxfp4 import Mxfp4
from lowrank.core.stored.requantise import requantise
from lowrank.core.stored.scaled import Int8Rows, Scaled

__all__ = ["FourBit", "Int8Rows", "Mxfp4", "Nested", "Scaled", "Stored", "Weight", "dense", "requantise"]
