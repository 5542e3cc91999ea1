"""Adapters in other programs' formats: read into one value, written from it."""

from lowrank.adapters.convert.convert import FORMATS, ConvertReport, convert_adapter

__all__ = ["FORMATS", "ConvertReport", "convert_adapter"]
