"""Adapters in files: PEFT's format both ways, loralib's read."""

from lowrank.checkpoint.load import load_adapter
from lowrank.checkpoint.loralib import load_loralib
from lowrank.checkpoint.read import AdapterFiles, read_adapter
from lowrank.checkpoint.report import LoadReport
from lowrank.checkpoint.save import save_adapter

__all__ = ["AdapterFiles", "LoadReport", "load_adapter", "load_loralib", "read_adapter", "save_adapter"]
