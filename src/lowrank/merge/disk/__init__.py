"""Merging on disk: W0 + Σ s·B·A streamed from safetensors files to safetensors files, without building the model.

adapters    the adapters and their ΔW                       match       one adapter against the base
requantised a merged weight that keeps a stored form        changes     ΔW of one tensor
as_trained  a float base that is quantised again as in the training
tie         what becomes of a shared tensor                 recipe      where a result's tensor comes from
plan        all of it, before a byte is written             write       reading, arithmetic, writing, overlapped
exact       the same rows in float64                        verify      before the result gets its name
sidefiles   what lies beside the weights                    card        what was merged from what
"""

from lowrank.merge.disk.merge import merge_checkpoint
from lowrank.merge.disk.report import MergeReport

__all__ = ["MergeReport", "merge_checkpoint"]
