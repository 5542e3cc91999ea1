"""Which sections a report has."""

from lowrank.analysis.experts import others
from lowrank.analysis.inspection import Inspection
from lowrank.analysis.page import Section
from lowrank.analysis.section_against import against_section
from lowrank.analysis.section_base import base_section
from lowrank.analysis.section_change import rank_section, where_section
from lowrank.analysis.section_experts import experts_section


def sections(inspection: Inspection) -> list[Section]:
    """The sections of the report, in order; those that have nothing to show are left out."""
    layers = inspection.layers
    found = []
    if not inspection.changes_nothing:
        dense = others(layers)
        found += [where_section(inspection, dense)] if dense else []
        found.append(rank_section(layers, dense))
        found += [experts_section(inspection)] if len(dense) < len(layers) else []
        if inspection.base is not None:
            found.append(base_section(layers))
    if any(layer.against is not None and layer.against.right is not None for layer in layers):
        found.append(against_section(layers))
    return found
