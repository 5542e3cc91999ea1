"""What to adapt and how: PEFT's field names, checked when the config is made."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from lowrank.core.init import find_init
from lowrank.errors import ConfigError, quoted, short

MOST_ROWS = 2**31  # of a table of tokens; more is a slip, and no index


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One adapter's configuration: h = W0·x + s·B·A·x on every target, s = lora_alpha/r (/√r with use_rslora).

    Field names and meanings are PEFT's, so a config carries over. Where they differ:

    target_modules: a list of names (exact, or a suffix after a dot), one regex (a string, matched as a whole),
        "all-linear" (every Linear and Conv1D but the output head, and every stack of experts), or None: the query and
        value projections of the architecture, as in the paper. A list may name parts of a fused projection:
        "c_attn[q,v]".
    target_parameters: stacked parameters of a mixture's experts (`gate_up_proj`, `down_proj` of its module of experts):
        names as in target_modules, exact or as a suffix, or one regex. Every expert gets a pair of rank r. Beside
        "all-linear" they are the only stacks that are adapted; () takes none. A list may name a gate or an up
        projection: "gate_up_proj[gate,up]" gives each an A of its own. Parameters called `weight` of other layers mean
        these layers.
    expert_rank: the rank of every expert of a stack, where rank_pattern says nothing of it; r where it is not given.
    init_lora_weights: "gaussian" (default, the paper's), "kaiming" (also True; PEFT's default), "orthogonal", "olora",
        "pissa", "pissa_niter_N", or False / "random" (ΔW ≠ 0 at the start; for tests).
    layers_to_transform: an index or several; layers_pattern names the list of layers where a model has more than one.
    lora_dropout: the probability that an entry of x is dropped on its way to A. Layers called one after the other with
        the same tensor (q, k and v) read it through one mask, as in the paper's code; in PEFT each draws its own.
    trainable_token_indices: rows of the input embeddings that are trained beside the targets (token ids), or
        {module: rows}. A head that is tied to the input embeddings follows them.
    ensure_weight_tying: raise where modules that are tied are given different rows.
    rank_pattern, alpha_pattern: {regex that ends a module's name: value}, first match wins.

    Raises ConfigError with every fault at once.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] | None = None
    target_parameters: str | tuple[str, ...] | list[str] | None = None
    expert_rank: int | None = None
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: str | tuple[str, ...] | list[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | list[str] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str | bool = "gaussian"
    trainable_token_indices: tuple[int, ...] | list[int] | Mapping[str, tuple[int, ...] | list[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        """Lists become tuples, so that two equal configs are equal; then every fault is collected."""
        for name in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        ):
            value = getattr(self, name)
            if isinstance(value, list | set | frozenset):
                object.__setattr__(self, name, tuple(value if isinstance(value, list) else sorted(value)))
        if self.modules_to_save is None:
            object.__setattr__(self, "modules_to_save", ())
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern or {}))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern or {}))
        object.__setattr__(self, "trainable_token_indices", _rows(self.trainable_token_indices))
        if faults := _faults(self):
            raise ConfigError("LoraConfig: " + "; ".join(faults))

    def with_targets(self, targets: str | tuple[str, ...]) -> "LoraConfig":
        """The same configuration for other targets."""
        return replace(self, target_modules=targets)


def _rows(given: object) -> object:
    """Lists become tuples, what is empty means None; what cannot be meant stays as it is."""
    if isinstance(given, Mapping):
        return {name: tuple(rows) if isinstance(rows, list | range) else rows for name, rows in given.items()} or None
    return (tuple(given) if isinstance(given, list | range) else given) or None


def _row_faults(given: object) -> list[str]:
    tables = given.items() if isinstance(given, Mapping) else [(None, given)] if given is not None else []
    faults = []
    for name, rows in tables:
        field = "trainable_token_indices" + ("" if name is None else f"[{quoted(name)}]")
        numbers = rows if isinstance(rows, tuple) else ()
        if not numbers or not all(type(row) is int and 0 <= row < MOST_ROWS for row in numbers):
            faults.append(f"{field} must be token ids, whole numbers from 0 up, not {short(repr(rows), 80)}")
        elif len(set(numbers)) != len(numbers):
            twice = next(row for row in numbers if numbers.count(row) > 1)
            faults.append(f"{field} names row {twice} twice")
    return faults


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _faults(config: LoraConfig) -> list[str]:
    faults = []
    if not _is_rank(config.r):
        faults.append(f"r must be a whole number of at least 1, not {quoted(config.r)}")
    if config.expert_rank is not None and not _is_rank(config.expert_rank):
        faults.append(f"expert_rank must be a whole number of at least 1, not {quoted(config.expert_rank)}")
    if not _is_number(config.lora_alpha):
        faults.append(f"lora_alpha must be a finite number, not {quoted(config.lora_alpha)}")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        faults.append(f"lora_dropout must be a probability from 0 to below 1, not {quoted(config.lora_dropout)}")
    faults += [
        f"rank_pattern[{quoted(key)}] must be a whole number of at least 1, not {quoted(rank)}"
        for key, rank in config.rank_pattern.items()
        if not _is_rank(rank)
    ]
    faults += [
        f"alpha_pattern[{quoted(key)}] must be a finite number, not {quoted(alpha)}"
        for key, alpha in config.alpha_pattern.items()
        if not _is_number(alpha)
    ]
    if config.bias not in ("none", "all", "lora_only"):
        faults.append(f'bias must be "none", "all" or "lora_only", not {quoted(config.bias)}')
    faults += _row_faults(config.trainable_token_indices)
    if isinstance(config.modules_to_save, str):
        faults.append(f"modules_to_save must be a list of names, not the string {quoted(config.modules_to_save)}")
    if config.target_modules in ((), "") and not config.target_parameters:
        faults.append("target_modules is empty: name modules, or leave it out for the query and value projections")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        faults.append("layers_to_transform needs target_modules as a list: a regex can name the layers itself")
    if config.layers_pattern is not None and config.layers_to_transform is None:
        faults.append("layers_pattern means nothing without layers_to_transform")
    try:
        find_init(config.init_lora_weights)
    except ConfigError as error:
        faults.append(str(error))
    return faults
