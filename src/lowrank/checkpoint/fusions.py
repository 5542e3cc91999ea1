"""Which tensors of files are which part of which stack of a model's experts: transformers' table, as data.

transformers fuses experts as it loads a checkpoint (`conversion_mapping`): of Qwen's `mlp.experts.7.gate_proj.weight`
and `up_proj.weight`, or Mixtral's `block_sparse_moe.experts.7.w1.weight` and `w3.weight`, it makes
`experts.gate_up_proj`. Adapters of the years when experts were modules have the same names. Other checkpoints hold
whole stacks, by the model's own names or others, a gate apart from its up projection, with rows in turn, or transposed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lowrank.layers.experts import STACKS

PLAIN = re.compile(r"(\w|\\?\.|\*)+")
WORDS = re.compile(r"(\w|\\?\.)+")
FUSED_BY = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])  # along the experts, and then the rows
Turn = Literal["", "transposed", "transposed or not", "interleaved"]  # how files turn the matrices of a stack


class Part(NamedTuple):
    """One expert's tensor: the path of its stack, which of `blocks` row blocks it is, and which expert."""

    stack: str
    number: int
    blocks: int
    expert: int


class WholePart(NamedTuple):
    """A tensor of all experts: the path of the stack, which of `blocks` row blocks it is, and how it is turned."""

    stack: str
    number: int
    blocks: int
    turn: Turn


@dataclass(frozen=True, slots=True)
class Fusions:
    """renamings: what is renamed first; rules: (how the tensors of a stack's row blocks are called, the stack);

    wholes: (how the tensors of all experts are called that are a stack's row blocks, the stack, how they are turned);
    back: what undoes renamings of plain words; names: the sources of `rules` as the table writes them.
    """

    renamings: tuple[tuple[re.Pattern[str], str], ...]
    rules: tuple[tuple[tuple[re.Pattern[str], ...], str], ...]
    wholes: tuple[tuple[tuple[re.Pattern[str], ...], str, Turn], ...] = ()
    back: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[tuple[str, ...], str], ...] = ()

    def part(self, name: str) -> Part | None:
        """What the tensor of this name is, None where it is no single expert's that is fused."""
        name = self._renamed(name)
        for sources, target in self.rules:
            for number, source in enumerate(sources):
                if match := source.fullmatch(name):
                    return Part(match["before"] + target, number, len(sources), int(match["expert"]))
        return None

    def whole(self, name: str) -> WholePart | None:
        """What the tensor (E, n, m) of this name is; None where it is no stack of experts, by its name."""
        name = self._renamed(name)
        for sources, target, turn in self.wholes:
            for number, source in enumerate(sources):
                if match := source.fullmatch(name):
                    return WholePart(match["before"] + target, number, len(sources), turn)
        return WholePart(name, 0, 1, "") if name.rpartition(".")[2] in STACKS else None

    def single_names(self, stack: str) -> tuple[str, ...]:
        """How checkpoints call the row blocks of one expert of the stack at a path, with * for its number; or ()."""
        for sources, target in self.names:
            if stack.endswith(target):
                before = stack.removesuffix(target)
                return tuple(self._as_stored(before + source) for source in sources)
        return ()

    def _as_stored(self, name: str) -> str:
        for word, original in reversed(self.back):
            name = name.replace(word, original)
        return name

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renamings:
            name = pattern.sub(replacement, name)
        return name


def fusions_of(config: object) -> Fusions:
    """The table for a model of this config (its fields, or a config of transformers); empty without one."""
    renamings: list[tuple[re.Pattern[str], str]] = []
    rules: list[tuple[tuple[re.Pattern[str], ...], str]] = []
    wholes: list[tuple[tuple[re.Pattern[str], ...], str, Turn]] = []
    back: list[tuple[str, str]] = []
    names: list[tuple[tuple[str, ...], str]] = []
    for model_type in _model_types(config):
        for entry in _entries(model_type):
            sources, targets = list(entry.source_patterns), list(entry.target_patterns)
            operations = [type(operation).__name__ for operation in getattr(entry, "operations", None) or ()]
            if not operations and len(sources) == len(targets) == 1:
                renamings.append((re.compile(sources[0]), targets[0]))
                if WORDS.fullmatch(sources[0]) and WORDS.fullmatch(targets[0]):
                    back.append((targets[0], sources[0].replace("\\", "")))
            elif operations in FUSED_BY and len(targets) == 1 and all(map(PLAIN.fullmatch, sources)):
                plain = tuple(source.replace("\\", "") for source in sources)
                rules.append((tuple(map(_numbered, plain)), targets[0]))
                names.append((plain, targets[0]))
            elif len(targets) == 1 and targets[0].rpartition(".")[2] in STACKS and (turn := _turn(entry)) is not None:
                named = tuple(re.compile(f"(?P<before>.*?){source}") for source in sources)
                wholes.append((named, targets[0], turn))
    return Fusions(tuple(renamings), tuple(rules), tuple(wholes), tuple(back), tuple(names))


def _turn(entry: Any) -> Turn | None:
    """How an entry of the table that takes whole stacks turns their matrices; None where that is not known here."""
    operations = list(getattr(entry, "operations", None) or ())
    if len(operations) != 1:
        return None
    match type(operations[0]).__name__, vars(operations[0]):
        case "Concatenate", {"dim": 1}:
            return ""
        case "Interleave", {"dim": 1, "inverse": False}:
            return "interleaved"
        case "Transpose", {"dim0": 1, "dim1": 2, "check_dims": check}:
            return "transposed or not" if check else "transposed"
    return None


def _model_types(config: object) -> Iterator[str]:
    """The type of the model, and of the language model inside of it."""
    for owner in (config, _field(config, "text_config")):
        if isinstance(model_type := _field(owner, "model_type"), str):
            yield model_type


def _field(config: object, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _entries(model_type: str) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # a transformers that stacks no experts
        return []
    return list(get_checkpoint_conversion_mapping(model_type) or ())


def _numbered(source: str) -> re.Pattern[str]:
    """`mlp.experts.*.up_proj.weight` for whole names, with the expert's number and what stands before."""
    body = re.escape(source).replace(r"\*", r"(?P<expert>\d{1,6})", 1)
    return re.compile(f"(?P<before>.*){body}" if source.startswith(".") else rf"(?P<before>(?:.*\.)?){body}")
