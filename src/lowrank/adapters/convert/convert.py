"""From one format to another: every reader gives the same value, every writer takes it."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch

from lowrank.adapters.convert.gguf import read_gguf_adapter, write_gguf
from lowrank.adapters.convert.loralib import ENDINGS, read_loralib, write_loralib
from lowrank.adapters.convert.merged_linear import has_merged_linear, read_merged_linear
from lowrank.adapters.convert.mlx import WEIGHTS, read_mlx, write_mlx
from lowrank.adapters.convert.model_pickles import has_pickles, unpickle_model
from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.adapters.convert.partner import check_partner
from lowrank.adapters.convert.repack import to_pickle, to_safetensors
from lowrank.adapters.convert.serving import write_sglang, write_vllm
from lowrank.adapters.convert.sound import check_sound
from lowrank.checkpoint.adapter_folder import AdapterContent, AdapterPath, content_of, write_adapter
from lowrank.checkpoint.config_file import NAME
from lowrank.checkpoint.each_expert import read_each_expert
from lowrank.checkpoint.outputs import Check, any_file, claimed, new_file, new_folder
from lowrank.checkpoint.read import PICKLE, SAFETENSORS, Packing
from lowrank.errors import CheckpointError, ConfigError
from lowrank.hub import JSON, local_folder

Reader = Callable[[Path, ConvertOptions], Read]
Writer = Callable[[AdapterContent, Path, ConvertOptions], tuple[str, ...]]
Direct = Callable[[Path, Path, ConvertOptions], tuple[str, ...]]


def _read_peft(source: Path, options: ConvertOptions) -> Read:
    files = read_each_expert(source, options.allow_pickle, options.packing)
    if options.packing is not None and not files.singles:
        raise ConfigError(f"{source} has no stacked experts: leave experts_packed out")
    content = content_of(files)
    if options.packing is not None:  # which made the mark that asks for it say nothing any more
        content = replace(content, origin={**content.origin, "auto_mapping": None})
    return Read(content)


def _write_peft(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    write_adapter(out, content, options.dtype)
    return ()


READERS: dict[str, Reader] = {
    "peft": _read_peft,
    "loralib": read_loralib,
    "mlx": read_mlx,
    "gguf": read_gguf_adapter,
    "peft-0.2": read_merged_linear,
}
WRITERS: dict[str, Writer] = {
    "peft": _write_peft,
    "loralib": write_loralib,
    "mlx": write_mlx,
    "gguf": write_gguf,
    "vllm": write_vllm,
    "sglang": write_sglang,
}
DIRECT: dict[tuple[str, str], Direct] = {  # where nothing has to be understood, nothing is changed
    ("peft", "peft"): to_safetensors,
    ("peft", "peft-bin"): to_pickle,
    ("model", "safetensors"): unpickle_model,
}
FORMATS = (*WRITERS, "peft-bin", "safetensors")
FILES = {"loralib": ENDINGS, "gguf": (".gguf",)}  # how their names must end, by which they are told again


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was converted: from which format to which, how many adapted modules, and what else there is to know."""

    source_format: str
    target_format: str
    modules: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, and one for each note."""
        count = f", {self.modules} modules" if self.modules else ""
        return "\n".join([f"{self.source_format} → {self.target_format}{count}", *self.notes])


def convert_adapter(
    source: AdapterPath,
    out: AdapterPath,
    *,
    to: str = "peft",
    model: AdapterPath | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    experts_packed: str | None = None,
    force: bool = False,
) -> ConvertReport:
    """Write to `out` the adapter in `source` in the format `to`; what `source` is, its files tell.

    peft: a folder with `adapter_model.safetensors`; peft-bin: the same with the `.bin` of old versions; loralib: one
    file, `.bin` or `.safetensors`; mlx: a folder for mlx-lm; gguf: a file for llama.cpp; safetensors: a whole *model*
    folder with pickled weights, read in a process of its own. A folder of PEFT 0.2 with `enable_lora` is read too.
    vllm, sglang: PEFT's format as these servers read it, with stacked experts in the layout that they want.

    model: the base's folder, for GGUF and for experts; where it is given, every module must have the shape it has
    there; alpha, enable_lora: what a loralib file does not say; dtype: of the factors written; allow_pickle: `.bin`
    files may be read, by torch.load(weights_only=True) and never otherwise; experts_packed: how B (d, r·E) of stacked
    experts lies, "by-rank", PEFT's way, in which the expert varies fastest, or "by-expert", in which the rank does: the
    result is PEFT's; force: a file at `out` that is no input may be replaced.

    ΔW stays the same in every module; what a format cannot hold is refused. Raises ConfigError for arguments that
    cannot be meant and CheckpointError for files that cannot be read, written, or expressed.
    """
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is not known: choose one of {', '.join(FORMATS)}")
    base = None if model is None else local_folder(model, JSON)
    if experts_packed not in (None, *get_args(Packing)):
        raise ConfigError(f'experts_packed must be "by-rank" or "by-expert", not {experts_packed!r}')
    packing = cast(Packing | None, experts_packed)
    place, options = local_folder(source), ConvertOptions(base, alpha, enable_lora, dtype, allow_pickle, packing)
    found = detect(place)
    _check_options(place, found, options)
    if (found, to) not in DIRECT and (found not in READERS or to not in WRITERS):
        raise ConfigError(f"{os.fspath(source)} is {_described(found)}, which cannot become {to}")
    if endings := FILES.get(to):
        _check_ending(Path(out), to, endings)
    with claimed(out, {"source": place, "base model": base}, _check(to, force)) as target:
        if (direct := DIRECT.get((found, to))) and packing is None:
            if base is not None and found in READERS:
                check_partner(READERS[found](place, options).content, base)
            return ConvertReport(found, to, 0, direct(place, target, options))
        read = READERS[found](place, options)
        check_sound(place, read.content)
        if base is not None:
            check_partner(read.content, base)
        notes = WRITERS[to](read.content, target, options)
        return ConvertReport(found, to, len(read.content.targets), (*read.notes, *notes))


def _check_options(source: Path, found: str, options: ConvertOptions) -> None:
    """Raise ConfigError for a number that cannot be meant, and for one that this source does not need."""
    alpha = options.alpha
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"alpha must be a finite number above 0, not {alpha!r}")
    if found != "peft" and options.packing is not None:
        raise ConfigError(f"{source} is {_described(found)}, which has no stacked experts: leave experts_packed out")
    if found != "loralib" and (alpha is not None or options.enable_lora is not None):
        raise ConfigError(f"{source} is {_described(found)}, which says its scale: leave alpha and enable_lora out")


def _described(found: str) -> str:
    return "a model" if found == "model" else f"an adapter of the format {found}"


def detect(source: Path) -> str:
    """The format of `source`: a key of READERS, or "model". Raises CheckpointError for what is none."""
    if not source.exists():
        raise CheckpointError(f"there is no {source}")
    if source.is_file():
        if source.suffix == ".gguf":
            return "gguf"
        if source.suffix in ENDINGS:
            return "loralib"
        raise CheckpointError(f"{source} is none of .gguf, {', '.join(ENDINGS)}, so its format is not known")
    if (source / NAME).is_file() and (source / WEIGHTS).is_file():
        return "mlx"
    if has_merged_linear(source):
        return "peft-0.2"
    if (source / NAME).is_file() or (source / SAFETENSORS).is_file() or (source / PICKLE).is_file():
        return "peft"
    if has_pickles(source):
        return "model"
    raise CheckpointError(f"{source} holds no adapter and no pickled model: nothing there can be converted")


def _check_ending(out: Path, to: str, endings: Sequence[str]) -> None:
    if out.suffix not in endings and not out.is_dir():  # a folder is refused where all places are looked at
        raise ConfigError(f"{out}: the name of a {to} file must end in {' or '.join(endings)}, by which it is known")


def _check(to: str, force: bool) -> Check:
    """What may be at the place of a result of the format `to`."""
    if to in FILES:
        return any_file if force else new_file
    return new_folder
