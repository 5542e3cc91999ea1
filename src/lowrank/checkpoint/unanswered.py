"""What an adapter's config speaks of and its weights do not hold: said, since PEFT reads such a file without a word."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.renaming import Renaming
from lowrank.injection.patterns import matches, matches_name
from lowrank.injection.planning import bias_names


def unanswered(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    """One sentence for targets that no tensor answers, one for trained biases that are not there."""
    return [*_targets(files), *_biases(files, modules, rename)]


def _targets(files: AdapterFiles) -> list[str]:
    layers = [path for path in files.low_rank if path not in files.experts]
    found = [
        *_unanswered(files.config.lora.target_modules, "target_modules", layers),
        *_unanswered(files.config.lora.target_parameters, "target_parameters", files.low_rank),
    ]
    return [
        f"adapter_config.json names {', '.join(names[:5])}{', ...' if names[5:] else ''} as {field}, "
        "and the file has no tensor of such a module"
        for field, names in found
    ]


def _unanswered(
    targets: str | Sequence[str] | None, field: str, paths: Iterable[str]
) -> Iterator[tuple[str, list[str]]]:
    """(field, its names that mean none of the paths), where there are such."""
    if targets is None or targets == "all-linear":
        return
    every = [*paths, *(f"{path}.weight" for path in paths)] if field == "target_parameters" else list(paths)
    if isinstance(targets, str):
        names = [] if any(matches(path, targets, field) for path in every) else [targets]
    else:
        names = [name for name in targets if not any(matches_name(path, name) for path in every)]
    if names:
        yield field, names


def _biases(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    bias = files.config.lora.bias
    if bias == "none":
        return []
    adapted = {rename(path) for path in files.low_rank}
    wanted = [
        f"{path}.{name}"
        for path, module in modules.items()
        if bias == "all" or path in adapted
        for name in bias_names(module)
    ]
    held = {f"{rename(key.path)}.{key.name}" for key in files.full}
    lacking = [name for name in wanted if name not in held]
    if not lacking:
        return []
    return [
        f"adapter_config.json says bias={bias!r}, and the file holds {len(wanted) - len(lacking)} of {len(wanted)} "
        f"such biases: the base's own are used ({', '.join(lacking[:3])}{', ...' if lacking[3:] else ''})"
    ]
