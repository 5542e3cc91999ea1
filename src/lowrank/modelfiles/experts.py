"""Where a base's files keep the experts that the model has as one stack: one by one, by transformers' own table.

transformers fuses them as it loads (`conversion_mapping`): of Qwen's `mlp.experts.7.gate_proj.weight` and
`up_proj.weight`, or Mixtral's `block_sparse_moe.experts.7.w1.weight` and `w3.weight`, it makes `experts.gate_up_proj`.
The table is read as data: which names are fused, in which order, and what was renamed before.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.modelfiles.base import BaseFiles

PLAIN = re.compile(r"[\w.*]+")
FUSIONS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # along the experts, and then the rows


@dataclass(frozen=True, slots=True)
class StackInFiles:
    """parts: the row blocks of the stack's matrices, one after another, each by the tensors of all experts in order."""

    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Fusion:
    sources: tuple[re.Pattern[str], ...]
    target: str


def stacks_in_files(base: BaseFiles) -> dict[str, StackInFiles]:
    """{the stack's path in the model: where its experts are} of all that the base stores one by one, and whole."""
    found: dict[tuple[str, int], dict[int, dict[int, str]]] = {}
    fusions: dict[tuple[str, int], _Fusion] = {}
    for model_type in _model_types(base.config):
        renamings, rules = _rules(model_type)
        for name in base.tensors:
            model_name = name
            for pattern, replacement in renamings:
                model_name = pattern.sub(replacement, model_name)
            for number, rule in enumerate(rules):
                for part, source in enumerate(rule.sources):
                    if match := source.fullmatch(model_name):
                        key = match["before"] + rule.target, number
                        found.setdefault(key, {}).setdefault(part, {})[int(match["expert"])] = name
                        fusions[key] = rule
    return {
        path: StackInFiles(tuple(tuple(parts[i][e] for e in range(len(parts[i]))) for i in range(len(parts))))
        for (path, number), parts in found.items()
        if _is_whole(parts, len(fusions[path, number].sources))
    }


def _is_whole(parts: Mapping[int, Mapping[int, str]], count: int) -> bool:
    """Whether every part is there, with the same experts, from 0 on."""
    experts = set(range(len(parts.get(0, ()))))
    return set(parts) == set(range(count)) and all(set(part) == experts for part in parts.values())


def _model_types(config: Mapping[str, Any] | None) -> Iterator[str]:
    """The type of the model, and of the language model inside of it."""
    for fields in (config, (config or {}).get("text_config")):
        if isinstance(fields, Mapping) and isinstance(fields.get("model_type"), str):
            yield fields["model_type"]


def _rules(model_type: str) -> tuple[list[tuple[re.Pattern[str], str]], list[_Fusion]]:
    """What is renamed, and what is fused then, in a model of this type; nothing where transformers has no table."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # a transformers that stacks no experts
        return [], []
    renamings, fusions = [], []
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        sources, targets = list(entry.source_patterns), list(entry.target_patterns)
        operations = [type(operation).__name__ for operation in getattr(entry, "operations", None) or ()]
        if not operations and len(sources) == len(targets) == 1:
            renamings.append((re.compile(sources[0]), targets[0]))
        elif operations in FUSIONS and len(targets) == 1 and all(PLAIN.fullmatch(source) for source in sources):
            fusions.append(_Fusion(tuple(map(_numbered, sources)), targets[0]))
    return renamings, fusions


def _numbered(source: str) -> re.Pattern[str]:
    """`mlp.experts.*.up_proj.weight` for whole names, with the expert's number and what stands before."""
    body = re.escape(source).replace(r"\*", r"(?P<expert>\d{1,6})", 1)
    return re.compile(rf"(?P<before>(?:.*\.)?){body}" if not source.startswith(".") else rf"(?P<before>.*){body}")
