"""Reading `adapter_config.json`, of PEFT 0.3 and later and of other writers that follow it.

Fields we do not know are reported, not fatal. Fields that make the adapter mean what we cannot represent are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.core.init import find_init
from lowrank.core.scaling import lora_scale
from lowrank.errors import CheckpointError, ConfigError, quoted
from lowrank.files.json_file import read_object
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import check_expressions, pattern_value

NAME = "adapter_config.json"
SETTINGS = "train.yaml"  # every setting of a run, in its folder from the beginning, where the adapter comes last

USED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "trainable_token_indices",
    "ensure_weight_tying",
)

READ = ("lora_bias",)  # and applied, with no field of our own: what it means is part of the layer's bias

# Where the adapter came from, how it was trained, or how a base stores its weights: nothing that changes ΔW.
WITHOUT_EFFECT = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "fan_in_fan_out",
    "merge_weights",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
)

UNREPRESENTABLE = {
    "layer_replication": "the base's layers are repeated: build that model first, and save the adapter for it",
    "alora_invocation_tokens": "the adapter switches itself on at certain tokens, so it cannot be merged: use PEFT",
    "arrow_config": "the adapter routes between other adapters, so it cannot be merged: use PEFT",
    "monteclora_config": "the adapter is random: use PEFT",
    "kasa_config": "the adapter goes with a base that was changed: use PEFT",
    "use_qalora": "its A reads pooled inputs: merge with PEFT",
    "use_bdlora": "its factors are block-diagonal in a layout of their own: merge with PEFT",
    "megatron_config": "its layers are Megatron's: use PEFT with Megatron",
    "enable_lora": "it is a MergedLinear adapter of PEFT 0.2: `lowrank convert` writes one that can be read",
}

# Initialisations that changed the base itself in a way the files do not tell.
LOST_BASES = ("loftq", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A config file. lora: its meaning; unknown: names of fields we do not know; raw: the file as it is.

    known: {path: (rank, scale)} of modules whose factors were put together from those of others.
    """

    lora: LoraConfig
    unknown: tuple[str, ...]
    raw: dict[str, Any]
    known: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def rank(self, path: str) -> int:
        """The rank that the file declares for the module at `path`."""
        if path in self.known:
            return self.known[path][0]
        return pattern_value(path, self.lora.rank_pattern, self.lora.r, "rank_pattern")

    def scale(self, path: str) -> float:
        """s of the module at `path`, from the declared rank and alpha."""
        if path in self.known:
            return self.known[path][1]
        alpha = pattern_value(path, self.lora.alpha_pattern, self.lora.lora_alpha, "alpha_pattern")
        return lora_scale(alpha, self.rank(path), self.lora.use_rslora)

    @property
    def moved_base(self) -> str | None:
        """The initialisation that took s·B_start·A_start off the base while this adapter was trained, if one did.

        PEFT saves such an adapter as it is unless told to convert it, and takes the same product off on load.
        """
        method = str(self.raw.get("init_lora_weights")).lower()
        return method.partition("_niter_")[0] if method.startswith(("pissa", "olora")) else None


def read_config(folder: Path) -> AdapterConfig:
    """The config of the adapter in `folder`.

    Raises CheckpointError where there is none, it is no JSON object, it is of another adapter type, or it uses a
    feature that cannot be represented.
    """
    path = folder / NAME
    raw = _load(path)
    _check_type(path, raw)
    fields = _lora_fields(raw)
    if faults := _null_faults(raw) + _kind_faults(fields):
        raise CheckpointError(f"{path}: {'; '.join(faults)}")
    try:
        lora = LoraConfig(**fields)
        for name in ("rank_pattern", "alpha_pattern"):
            check_expressions(getattr(lora, name), name)
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(getattr(lora, name), str):
                check_expressions([getattr(lora, name)], name)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    known = {*USED, *READ, *WITHOUT_EFFECT, *UNREPRESENTABLE}
    return AdapterConfig(lora, tuple(sorted(set(raw) - known)), raw)


def _load(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "copy or save the adapter again")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_why_missing(path)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _why_missing(path: Path) -> str:
    folder = path.parent
    if not folder.exists():
        return f"there is no folder {folder}: give the folder that holds the adapter's {NAME}"
    if not folder.is_dir():
        return f"{folder} is not a folder: give the folder that holds the adapter's {NAME}"
    if (folder / SETTINGS).is_file():
        return f"{folder} is a training that has not come to its end: go on with lowrank train --resume {folder}"
    below = sorted(child.parent.name for child in folder.glob(f"*/{NAME}"))
    hint = f"; did you mean one of its subfolders: {', '.join(below)}?" if below else ""
    return f"{folder} is no adapter: it has no {NAME}{hint}"


def _check_type(path: Path, raw: dict[str, Any]) -> None:
    if "peft_type" not in raw:
        raise CheckpointError(f"{path} has no field peft_type, so it is no adapter's config")
    if raw["peft_type"] != "LORA":
        raise CheckpointError(f"{path}: peft_type is {quoted(raw['peft_type'])}, and only LORA adapters can be read")
    faults = [f"{name} is set: {advice}" for name, advice in UNREPRESENTABLE.items() if raw.get(name)]
    method = str(raw.get("init_lora_weights")).lower()
    if method in LOST_BASES:
        faults.append(
            f"init_lora_weights is {quoted(method)}, which changed the base in a way the files do not tell: convert "
            "the adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if faults:
        raise CheckpointError(f"{path}: this adapter cannot be represented: {'; '.join(faults)}")


def _null_faults(raw: dict[str, Any]) -> list[str]:
    """Numbers of which the scale is made and that are null: only a field that is left out means PEFT's default."""
    return [
        f"{name} is null, which tells no scale and which PEFT fails on: write the number the adapter was trained with"
        for name in ("r", "lora_alpha")
        if name in raw and raw[name] is None
    ]


def _kind_faults(fields: dict[str, Any]) -> list[str]:
    """Fields whose JSON value is of a kind that cannot be meant, before anything interprets them."""
    faults = [
        f"{name} must be a name, a regex or a list of names, not {quoted(fields[name])}"
        for name in ("target_modules", "target_parameters", "exclude_modules", "layers_pattern")
        if name in fields and not (isinstance(fields[name], str) or _is_list(fields[name], str))
    ]
    layers = fields.get("layers_to_transform", [])
    if not (isinstance(layers, int) or _is_list(layers, int)):
        faults.append(f"layers_to_transform must be layer numbers, not {quoted(layers)}")
    if not _is_list(fields.get("modules_to_save", []), str):
        faults.append(f"modules_to_save must be a list of names, not {quoted(fields['modules_to_save'])}")
    rows = fields.get("trainable_token_indices", [])
    if not all(_is_list(one, int) for one in (rows.values() if isinstance(rows, dict) else [rows])):
        faults.append(
            f"trainable_token_indices must be token ids, or an object of modules and theirs, not {quoted(rows)}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name, {}), dict):
            faults.append(f"{name} must be an object of names and numbers, not {quoted(fields[name])}")
    return faults


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _lora_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of LoraConfig in the file; null and empty mean the default, as they do in old files."""
    fields = {name: raw[name] for name in USED if raw.get(name) not in (None, [], {}, "")}
    if "layers_to_transform" not in fields:
        fields.pop("layers_pattern", None)
    if isinstance(fields.get("target_modules"), str):
        fields.pop("layers_to_transform", None)  # PEFT ignores it beside a regex
        fields.pop("layers_pattern", None)
    try:
        find_init(fields.get("init_lora_weights", True))
    except (ConfigError, TypeError):
        fields["init_lora_weights"] = True  # nothing is initialised on load
    return fields
