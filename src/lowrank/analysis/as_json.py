"""An inspection as plain values that `json.dumps` takes: every number, none of them rounded."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.measure import mean_energy_kept
from lowrank.analysis.summary import summary

FORMAT = 1


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection, with its summary in words; what is not finite or does not exist is null."""
    unshared = inspection.unshared
    plain = {
        "format": FORMAT,
        "adapter": inspection.adapter,
        "made_for": inspection.made_for,
        "base": inspection.base,
        "against": inspection.other,
        "summary": summary(inspection),
        "notes": inspection.notes,
        "energy_kept_by_rank": mean_energy_kept([layer.measure for layer in inspection.layers]),
        "kept_in_full": inspection.full,
        "not_compared": None if unshared is None else asdict(unshared),
        "layers": [_layer(layer) for layer in inspection.layers],
    }
    cleaned: dict[str, Any] = _clean(plain)
    return cleaned


def _layer(layer: Layer) -> dict[str, Any]:
    measure = asdict(layer.measure)
    measure["rank_for"] = {f"{share:.0%}".replace("%", ""): rank for share, rank in layer.measure.rank_for.items()}
    values = {"path": measure.pop("path"), "layer": layer.place.layer, "module": layer.place.module, **measure}
    if layer.base is not None:
        values["base"] = asdict(layer.base)
        if layer.base.amplification is not None:
            values["base"]["amplification"]["factor"] = layer.base.amplification.factor
        intruders = layer.base.intruders
        values["base"]["intruders"] |= {"certain": intruders.certain, "undecided": intruders.undecided}
    if layer.against is not None:
        values["against"] = asdict(layer.against)
        del values["against"]["path"]
    return values


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
