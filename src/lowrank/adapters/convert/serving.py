"""PEFT's format as vLLM and SGLang read it, of which a mixture's experts need care.

vLLM reads experts as PEFT writes stacks where its class of the model says so (`is_3d_moe_weight`), and then wants both
stacks of a layer; for all other classes one by one, `experts.7.gate_proj`, by the names that checkpoints have.
https://github.com/vllm-project/vllm, lora/lora_model.py and lora/model_manager.py, September 2026.

SGLang reads experts one by one, as gate_proj, up_proj and down_proj, and takes the config's `r` as every module's rank.
https://github.com/sgl-project/sglang, srt/lora/mem_pool.py, September 2026. Neither is run in our tests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lowrank.adapters.convert.options import ConvertOptions
from lowrank.adapters.convert.uniform import refuse
from lowrank.checkpoint.adapter_folder import AdapterContent, write_adapter
from lowrank.checkpoint.companion import Companion
from lowrank.checkpoint.fusions import fusions_of
from lowrank.checkpoint.restack import padded
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError, ConfigError
from lowrank.modelfiles.base import read_json
from lowrank.modelfiles.tied import architectures

# Classes of vLLM with `is_3d_moe_weight`
READ_AS_STACKS = frozenset(
    {
        "GptOssForCausalLM",
        "InternS1ProForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
GATE_AND_UP, DOWN = "gate_up_proj", "down_proj"


def write_vllm(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """The folder `out`. Returns how the experts were written. Raises CheckpointError for what vLLM does not serve."""
    config, experts = _config(content, options, "vLLM")
    if not experts:
        write_adapter(out, content, options.dtype)
        return ()
    cls = next((name for name in architectures(config) if name in READ_AS_STACKS), None)
    if cls is not None:
        write_adapter(out, _with_both_stacks(content), options.dtype)
        return (f"experts as stacks, both of every layer, as vLLM's {cls} reads them",)
    fusions = fusions_of(config)
    names = {stack: fusions.single_names(stack) for stack in set(content.singles.values())}
    write_adapter(out, _one_by_one(content, names, "vLLM"), options.dtype)
    return ("experts one by one, under the names of checkpoints, as vLLM reads them for this class of models",)


def write_sglang(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """The folder `out`, every module of one rank. Returns how the experts were written. Raises as `write_vllm`."""
    config, experts = _config(content, options, "SGLang")
    notes: tuple[str, ...] = ()
    if experts:
        stacks, fusions = set(content.singles.values()), fusions_of(config)
        blocks = {stack: len(fusions.single_names(stack)) for stack in stacks}
        content = _one_by_one(content, {stack: _plain(stack, blocks[stack]) for stack in stacks}, "SGLang")
        notes = ("experts one by one, as SGLang reads them",)
    rank = max((len(target.a) for target in content.targets.values()), default=0)
    filled = sum(len(target.a) < rank for target in content.targets.values())
    if filled:
        notes += (f"{filled} modules filled with zeros up to rank {rank}: SGLang reads one rank for all",)
    targets = {path: _of_rank(target, rank) for path, target in content.targets.items()}
    write_adapter(out, replace(content, targets=targets), options.dtype)
    return notes


def _config(content: AdapterContent, options: ConvertOptions, name: str) -> tuple[Mapping[str, object], bool]:
    """(the base's config.json, whether experts are adapted). Raises for what the server does not read."""
    refuse(replace(content, singles={}), f"an adapter for {name}", dora=True, full=True, conv=True)
    if not content.singles:
        return {}, False
    if options.model is None:
        raise ConfigError(f"{name} reads experts in a layout that depends on the base: give it as --model")
    return read_json(options.model / "config.json"), True


def _plain(stack: str, blocks: int) -> tuple[str, ...]:
    """The names of an expert's row blocks in SGLang's words, of as many as the table knows."""
    root, _, leaf = stack.rpartition(".")
    leaves = {0: (), 1: (leaf,), 2: ("gate_proj", "up_proj")}[blocks]
    return tuple(f"{root}.*.{word}.weight" for word in leaves)


def _one_by_one(content: AdapterContent, names: Mapping[str, tuple[str, ...]], server: str) -> AdapterContent:
    """Every expert's row blocks as modules. names: {stack: how these are called, with * for the expert's number}."""
    targets = dict(_singles(content, names, server))
    said = content.names.get("target_modules")
    others = dict.fromkeys(path for path in content.targets if path not in content.singles)
    plain = said if isinstance(said, list) else [path.rpartition(".")[2] for path in others]
    experts = [".".join(path.split(".")[-3:]) for path in targets if path not in others]  # no shared ones
    fields = {"target_modules": sorted({*plain, *experts})}
    return replace(content, targets=targets, singles={}, names=fields, companion=Companion())


def _singles(
    content: AdapterContent, names: Mapping[str, tuple[str, ...]], server: str
) -> Iterator[tuple[str, Target]]:
    for path, target in content.targets.items():
        if path not in content.singles:
            yield path, target
            continue
        stack = content.singles[path]
        blocks, number = names[stack], path.split(".")[-2]
        if not blocks or target.b.shape[0] % len(blocks):
            raise CheckpointError(
                f"{stack}: transformers' table of conversions has no names for this model's single experts, which "
                f"{server} reads: merge the adapter into its base"
            )
        for name, b in zip(blocks, target.b.chunk(len(blocks)), strict=True):
            yield name.replace("*", number).removesuffix(".weight"), replace(target, a=target.a.clone(), b=b.clone())


def _with_both_stacks(content: AdapterContent) -> AdapterContent:
    """The same change, with zeros for a stack of a layer that the adapter leaves out beside the other one."""
    targets, singles = dict(content.targets), dict(content.singles)
    for path, stack in content.singles.items():
        root, _, leaf = path.rpartition(".")
        other = {GATE_AND_UP: DOWN, DOWN: GATE_AND_UP}.get(leaf)
        if other is not None and f"{root}.{other}" not in content.singles:
            target = targets[path]
            (d, k), rank = target.shape, len(target.a)
            rows, columns = (k, d // 2) if other == DOWN else (2 * k, d)
            zeros = target.b.new_zeros(rows, rank)
            targets[f"{root}.{other}"] = replace(target, a=target.a.new_zeros(rank, columns), b=zeros)
            singles[f"{root}.{other}"] = f"{stack.rpartition('.')[0]}.{other}"
    parameters = sorted({".".join(stack.split(".")[-2:]) for stack in singles.values()})
    return replace(content, targets=targets, singles=singles, names={**content.names, "target_parameters": parameters})


def _of_rank(target: Target, rank: int) -> Target:
    """The same ΔW at a larger rank."""
    if len(target.a) == rank:
        return target
    return replace(target, a=padded(target.a, rank, 0), b=padded(target.b, rank, 1))
