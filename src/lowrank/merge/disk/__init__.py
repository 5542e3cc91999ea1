"""Merging on disk: W0 + Σ s·B·A streamed from safetensors files to safetensors files, without building the model.

layout      the file format, every number checked          base        a checkpoint's files
adapters    the adapters and their ΔW                       names       which tensor a module's name means
orientation how the base stores W0                          match       one adapter against the base
tied, tie   embeddings and heads that share a tensor        recipe      where a result's tensor comes from
plan        all of it, before a byte is written             write       reading, arithmetic, writing, overlapped
exact       the same rows in float64                        verify      before the result gets its name
staging     the name, and what a crash leaves               card        what was merged from what
"""

from lowrank.merge.disk.merge import merge_checkpoint
from lowrank.merge.disk.report import MergeReport

__all__ = ["MergeReport", "merge_checkpoint"]
