"""Writing `adapter_config.json` so that PEFT adapts the same modules at the same scale, and vLLM serves them at it.

Everything is derived from the factors themselves; the config an adapter was made with only tells its dropout, its full
copies and its variants. Same model, same bytes: keys and lists are sorted and nothing tells time or version.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank.checkpoint.describe import describe, target_names
from lowrank.checkpoint.gather import own_class
from lowrank.hub import HubId, origin
from lowrank.injection.config import LoraConfig

# PEFT wraps these heads in full, without being asked, for the task, and then expects their tensors in the file.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TASKS = (
    (re.compile(r"ForCausalLM$|LMHeadModel$"), "CAUSAL_LM"),
    (re.compile(r"ForSequenceClassification$"), "SEQ_CLS"),
    (re.compile(r"ForTokenClassification$"), "TOKEN_CLS"),
    (re.compile(r"ForQuestionAnswering$"), "QUESTION_ANS"),
)


def config_bytes(
    model: nn.Module,
    config: LoraConfig,
    modules: Mapping[str, tuple[int, float]],
    all_paths: list[str],
    *,
    stacks: Mapping[str, str],
    transposed: bool,
) -> bytes:
    """The file's content. modules: {path: (rank in the file, scale)}; transposed: some target is a Conv1D.

    stacks: {path: its name in target_parameters} of those that are stacks of experts. PEFT refuses to drop anything
    beside them, so dropout, which only training knows, is not in their file.

    s = lora_alpha/r for all, rsLoRA or not: llama.cpp's converter does not know the other formula.
    """
    ranks = describe(modules)
    layers = [path for path in modules if path not in stacks]
    task = task_type(model, config.modules_to_save, all_paths)
    base = base_name(model)
    content = {
        "alpha_pattern": ranks.alpha_pattern,
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": base and base.repo,
        "bias": config.bias,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,  # any other word could make PEFT change the base on load
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ranks.lora_alpha,
        "lora_dropout": 0.0 if stacks else config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": ranks.r,
        "rank_pattern": ranks.rank_pattern,
        "revision": base and base.revision,
        "target_modules": target_names(layers, all_paths) if layers else [],
        **({"target_parameters": sorted(set(stacks.values()))} if stacks else {}),
        "task_type": task,
        **_rows(config),
        "use_dora": config.use_dora,
        "use_rslora": False,
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _rows(config: LoraConfig) -> dict[str, Any]:
    """The fields of rows that are trained, where there are any: readers of earlier years do not know them."""
    rows = config.trainable_token_indices
    if rows is None:
        return {}
    return {"trainable_token_indices": rows, "ensure_weight_tying": config.ensure_weight_tying}


def base_name(model: nn.Module) -> HubId | None:
    """Where the base came from, as its config remembers it: a path, or for one in the Hub's cache its name and commit.

    Nothing is looked up.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return origin(name) or HubId(name)


def task_type(model: nn.Module, saved: tuple[str, ...] | list[str], all_paths: list[str]) -> str | None:
    """PEFT's word for the model's task, None where it has none or where it would demand a head that is not saved."""
    for pattern, task in TASKS:
        if pattern.search(own_class(model).__name__):
            heads = [path for path in all_paths if path.endswith(HEADS.get(task, ()))]
            return task if all(any(head.endswith(name) for name in saved) for head in heads) else None
    return None


def _auto_mapping(model: nn.Module) -> dict[str, Any] | None:
    """What PEFT's AutoPeftModel needs to find the class of a transformers model that has no task word."""
    cls = own_class(model)
    if not cls.__module__.startswith("transformers."):
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
