"""Which rows of which tables an adapter trains (`trainable_token_indices`), and who shares a table: PEFT's rules."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lowrank.core.token_rows import TokenRows
from lowrank.errors import TargetError, quoted, some
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import matches_name, suggestion
from lowrank.layers.embedding import LoraEmbedding
from lowrank.layers.kinds import kind_of, refusal
from lowrank.layers.linear import LoraConv1D, LoraLinear
from lowrank.layers.quantised import LoraQuantised

Indices = tuple[int, ...]
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class RowsEntry:
    """The rows `indices` of the table (of width d) of the module at `path`; followers: paths that share them."""

    path: str
    indices: Indices
    d: int
    followers: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For the table of a plan."""
        also = f" (and {', '.join(self.followers)}, tied)" if self.followers else ""
        count = len(self.indices)
        return f"{self.path}{also}: {count} {'row' if count == 1 else 'rows'} of {self.d}"


def find_rows(model: nn.Module, modules: Modules, config: LoraConfig) -> dict[str, Indices]:
    """{path of a table: its rows}. Raises TargetError for names that match nothing and a model without a table."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        path = input_table(model, modules)
        if path is None:
            raise TargetError(
                f"trainable_token_indices: a {type(model).__name__} has no get_input_embeddings that tells its table; "
                'name it: {"embed_tokens": [...]}'
            )
        return {path: tuple(wanted)}
    found: dict[str, Indices] = {}
    for name, indices in wanted.items():
        hits = [path for path in modules if matches_name(path, name)]
        if not hits:
            raise TargetError(f"trainable_token_indices: {quoted(name)} matches no module{suggestion(name, modules)}")
        if twice := [path for path in hits if found.get(path, indices) != indices]:
            raise TargetError(f"trainable_token_indices: {twice[0]} is named twice, with other rows")
        found |= dict.fromkeys(hits, tuple(indices))
    return found


def input_table(model: nn.Module, modules: Modules) -> str | None:
    """The path of the model's input embeddings, by its own word; None where it has none."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in modules.items() if module is table), None)


def plan_rows(
    model: nn.Module, modules: Modules, config: LoraConfig, targets: Iterable[str], saved: Iterable[str]
) -> tuple[RowsEntry, ...]:
    """The rows of every table, each with the modules that are tied to it.

    Raises TargetError, all faults at once: rows that a table has not, modules that are no tables of numbers, and tables
    that the adapter changes in another way too.
    """
    found = find_rows(model, modules, config)
    rows = entries(model, modules, found, config.ensure_weight_tying)
    faults = [fault for entry in rows for fault in _faults(modules, entry, set(targets), tuple(saved))]
    faults += _untied(modules, config, {path for entry in rows for path in (entry.path, *entry.followers)}, targets)
    if faults:
        raise TargetError("these rows cannot be trained: " + "; ".join(faults))
    return rows


def entries(model: nn.Module, modules: Modules, found: Mapping[str, Indices], tie: bool) -> tuple[RowsEntry, ...]:
    """One entry a table. What is tied to the input embeddings follows them, as in PEFT, where it is not named with

    other rows. Raises TargetError where `tie` (ensure_weight_tying) forbids those.
    """
    source = input_table(model, modules)
    tied = _tied_to(model, modules, source) if source in found else []
    other = [path for path in tied if found.get(path, found[source or ""]) != found[source or ""]]
    if other and tie:
        raise TargetError(
            f"trainable_token_indices: {other[0]} is tied to {source} and has other rows, which ensure_weight_tying "
            "forbids: give both the same, or leave it off"
        )
    following = () if other else tuple(tied)
    return tuple(
        RowsEntry(path, indices, _width(modules[path]), following if path == source else ())
        for path, indices in found.items()
        if path not in following
    )


def _tied_to(model: nn.Module, modules: Modules, source: str | None) -> list[str]:
    """The other modules with the table's very weight, where the model's config says that they are tied."""
    if source is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    table = modules[source]._parameters.get("weight")
    return [p for p, m in modules.items() if p != source and table is not None and m._parameters.get("weight") is table]


def _width(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None or weight.dim() < 2 else weight.shape[1]


def _faults(modules: Modules, entry: RowsEntry, targets: set[str], saved: Sequence[str]) -> list[str]:
    faults = []
    for path in (entry.path, *entry.followers):
        if (why := rows_refusal(modules[path])) is not None:
            faults.append(f"{path}: {why}")
        elif path in targets:
            faults.append(f"{path} is one of target_modules too: change all of it or some rows")
        elif any(path == name or path.startswith(name + ".") for name in saved):
            faults.append(f"{path} is trained in full by modules_to_save too: leave one of the two out")
    if not faults and (fault := too_short(modules[entry.path], entry.path, entry.indices)):
        faults.append(fault)
    return faults


def _untied(modules: Modules, config: LoraConfig, rowed: set[str], targets: Iterable[str]) -> list[str]:
    """ensure_weight_tying for what is no row: PEFT adapts the tied module too, which here is named."""
    if not config.ensure_weight_tying:
        return []
    targets = set(targets)
    weights = {id(modules[path]._parameters.get("weight")): path for path in targets - rowed}
    return [
        f"ensure_weight_tying is for rows here, and {weights[id(weight)]} shares its weight with {path}: leave it off"
        for path, module in modules.items()
        if (weight := module._parameters.get("weight")) is not None and path not in targets and id(weight) in weights
    ]


def row_warnings(modules: Modules, rows: Iterable[RowsEntry], config: LoraConfig) -> list[str]:
    """Sentences for tables that other modules share and do not follow, and for ties that a model has not."""
    said = []
    for entry in rows:
        weight, along = modules[entry.path]._parameters["weight"], (entry.path, *entry.followers)
        others = [path for path, m in modules.items() if m._parameters.get("weight") is weight and path not in along]
        if others:
            said.append(
                f"{entry.path} shares its weight with {', '.join(others)}, which does not follow: a merge unties them"
            )
        elif config.ensure_weight_tying and not entry.followers:
            said.append(f"ensure_weight_tying: nothing in this model is tied to {entry.path}")
    return said


def too_short(module: nn.Module, path: str, indices: Sequence[int]) -> str | None:
    """The fault of rows that the table has not, or None."""
    weight = module._parameters["weight"]
    assert weight is not None
    over = [index for index in indices if index >= weight.shape[0]]
    if not over:
        return None
    return (
        f"{path} has {weight.shape[0]:,} rows, and no row {some(over)}: make it longer first "
        f"(model.resize_token_embeddings({max(over) + 1}))"
    )


def rows_refusal(module: nn.Module) -> str | None:
    """Why single rows of a module's weight cannot be trained, in words that end a sentence, or None."""
    kind = kind_of(module)
    if kind is None or not issubclass(kind, LoraEmbedding | LoraLinear) or issubclass(kind, LoraConv1D):
        return f"a {type(module).__name__} has no rows of tokens: only Embedding and Linear have"
    if issubclass(kind, LoraQuantised):
        return "its weight is stored in another form than numbers, whose rows cannot be replaced"
    if getattr(module, "scale_grad_by_freq", False):
        return "its scale_grad_by_freq counts tokens, which single rows do not"
    return refusal(module)


def make_rows(modules: Modules, planned: Iterable[RowsEntry]) -> dict[str, TokenRows]:
    """{path: rows} for every table and its followers, which share them: they start as the table's own."""
    made: dict[str, TokenRows] = {}
    for entry in planned:
        weight = modules[entry.path]._parameters["weight"]
        assert weight is not None
        made |= dict.fromkeys((entry.path, *entry.followers), TokenRows.of(weight, entry.indices))
    return made


def leading(model: nn.Module, modules: Modules, held: Mapping[str, TokenRows]) -> list[str]:
    """Of the modules that hold rows, one for each table: the input embeddings, and what follows nobody."""
    source = input_table(model, modules)
    leaders: dict[int, str] = {}
    for path in sorted(held, key=lambda path: (path != source, path)):
        leaders.setdefault(id(held[path]), path)
    return sorted(leaders.values())


def said_indices(
    model: nn.Module, modules: Modules, held: Mapping[str, TokenRows]
) -> Indices | dict[str, Indices] | None:
    """The config's word for rows that a model holds: a list where they are the input embeddings' alone."""
    said = {path: held[path].indices for path in leading(model, modules, held)}
    if len(said) == 1 and said.keys() == {input_table(model, modules)}:
        return next(iter(said.values()))
    return said or None
