"""What an adapter learned, measured from its files: no model object is built."""

from lowrank.analysis.inspection import Inspection, inspect_adapter

__all__ = ["Inspection", "inspect_adapter"]
