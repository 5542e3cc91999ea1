"""Adapters and their weights in a sum, as merging and combining are given them."""

import os
import sys
from collections.abc import Sequence

from lowrank.checkpoint.adapter_folder import AdapterPath
from lowrank.errors import ConfigError

LARGEST = sys.float_info.max
WeightedAdapter = AdapterPath | tuple[AdapterPath, float]


def weighted_pairs(
    adapters: WeightedAdapter | Sequence[WeightedAdapter], command: str
) -> list[tuple[AdapterPath, float]]:
    """[(folder, weight)] of one adapter or several, each a folder, which has the weight 1, or a pair.

    Raises ConfigError, beginning with the `command`, for none at all, and for a weight that cannot be meant.
    """
    if isinstance(adapters, str | os.PathLike) or _is_pair(adapters):
        adapters = [adapters]  # type: ignore[list-item]
    pairs = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    if not pairs:
        raise ConfigError(f"{command}: no adapter is given")
    return [(folder, _checked(weight, folder, command)) for folder, weight in pairs]  # type: ignore[misc, arg-type]


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _checked(weight: object, folder: AdapterPath, command: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < abs(weight) <= LARGEST:
        raise ConfigError(
            f"{command}: the weight of {os.fspath(folder)} must be a finite number other than 0, not {weight!r}"
        )
    return float(weight)
