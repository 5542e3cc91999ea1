"""The LoraConfig that a loaded adapter has in its model."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lowrank.checkpoint.describe import describe, target_names
from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.renaming import Renaming, lies_in
from lowrank.core.factors import LoraFactors
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import matches_name
from lowrank.layers.stack import ExpertStack


def loaded_config(
    files: AdapterFiles,
    factors: Mapping[str, LoraFactors],
    full: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
    rename: Renaming,
) -> LoraConfig:
    """The config an injection of the same adapter would have: the factors' own ranks, parts by their names."""
    file = files.config.lora
    stacks = {path: f for path, f in factors.items() if isinstance(modules[path], ExpertStack)}
    layers = {path: f for path, f in factors.items() if path not in stacks}
    ranks = describe({path: (f.rank, f.scale) for path, f in factors.items()}, file.use_rslora)
    return replace(
        file,
        **ranks._asdict(),
        target_modules=_targets(files, layers, modules, rename),
        target_parameters=tuple(_with_parts(files, stacks, rename)) or None,
        expert_rank=None,
        modules_to_save=_saved(file, factors, full, modules),
        bias="lora_only" if files.config.raw.get("lora_bias") and file.bias == "none" else file.bias,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _targets(
    files: AdapterFiles, factors: Mapping[str, LoraFactors], modules: Mapping[str, nn.Module], rename: Renaming
) -> str | tuple[str, ...]:
    selectors = dict(zip(factors, _with_parts(files, factors, rename), strict=True))
    whole = [path for path, selector in selectors.items() if selector == path]
    plain = target_names(whole, [path for path in modules if path]) if whole else []
    if isinstance(plain, str):
        if len(whole) == len(factors):
            return plain
        plain = whole
    return (*plain, *(selector for path, selector in selectors.items() if selector != path))


def _with_parts(files: AdapterFiles, factors: Mapping[str, LoraFactors], rename: Renaming) -> list[str]:
    """The paths, with the parts that are adapted of a fused projection where their names are known."""
    names = {rename(path): fused.names for path, fused in files.companion.fused.items()}
    return [f"{path}[{','.join(names[path])}]" if factors[path].parts and names.get(path) else path for path in factors]


def _saved(
    file: LoraConfig,
    factors: Mapping[str, LoraFactors],
    full: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
) -> tuple[str, ...]:
    """The names in the file that mean a module here, and the paths of other modules with tensors in full."""
    named = [name for name in file.modules_to_save if any(matches_name(path, name) for path in modules)]
    return (
        *named,
        *(
            path
            for path, tensors in full.items()
            if path
            and path not in factors
            and not (file.bias != "none" and all("bias" in name for name in tensors))
            and not lies_in(path, named)
        ),
    )
