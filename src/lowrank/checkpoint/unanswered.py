"""What an adapter's config speaks of and its weights do not hold: said, since PEFT reads such a file without a word."""

from collections.abc import Mapping

from torch import nn

from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.renaming import Renaming
from lowrank.injection.patterns import matches, matches_name
from lowrank.injection.planning import bias_names


def unanswered(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    """One sentence for targets that no tensor answers, one for trained biases that are not there."""
    return [*_targets(files), *_biases(files, modules, rename)]


def _targets(files: AdapterFiles) -> list[str]:
    targets = files.config.lora.target_modules
    if targets is None or targets == "all-linear":
        return []
    if isinstance(targets, str):
        names = [] if any(matches(path, targets, "target_modules") for path in files.low_rank) else [targets]
    else:
        names = [name for name in targets if not any(matches_name(path, name) for path in files.low_rank)]
    if not names:
        return []
    return [
        f"adapter_config.json names {', '.join(names[:5])}{', ...' if names[5:] else ''} as target_modules, "
        "and the file has no tensor of such a module"
    ]


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
