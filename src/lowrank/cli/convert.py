"""`lowrank convert`: adapters and pickled models in another format."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, Parameter

from lowrank.adapters.convert import convert_adapter
from lowrank.cli.base import base_folder
from lowrank.cli.flags import AsJson
from lowrank.cli.say import say_written
from lowrank.errors import LowrankError

Format = Literal["peft", "peft-bin", "loralib", "mlx", "gguf", "vllm", "sglang", "safetensors"]
Dtype = Literal["float32", "float16", "bfloat16"]
SWITCHES = {"true": True, "false": False}

command = App(
    name="convert",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank convert --source demo-out/adapter --to gguf --model nano \\
      --out skill.gguf
  lowrank convert --source demo-out/adapter --to mlx --out skill-mlx
  lowrank convert --source skill-mlx --out from-mlx

Examples with your own:
  lowrank convert --source lora.bin --alpha 16 --enable-lora true,false,true \\
      --allow-pickle --out adapter
  lowrank convert --source old-model --to safetensors --allow-pickle \\
      --out model""",
)


@command.default
def convert(
    *,
    source: Path,
    out: Path,
    to: Format = "peft",
    model: Path | None = None,
    alpha: float | None = None,
    enable_lora: str | None = None,
    dtype: Dtype | None = None,
    allow_pickle: Annotated[bool, Parameter(negative="")] = False,
    experts_packed: Literal["by-rank", "by-expert"] | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another program's format; what the source is, its files tell.

    The change of every module stays the same; what a format cannot hold is refused.

    Parameters
    ----------
    source
        An adapter: a folder of PEFT's or mlx-lm's, its name on the Hub, a file of loralib's or llama.cpp's (.gguf); or
        a model's folder with .bin files
    out
        The folder or, for loralib and gguf, the file to make
    to
        peft; peft-bin, for PEFT before 0.6; loralib; mlx; gguf; vllm and sglang, PEFT's files as these servers read
        experts; safetensors, for a whole model
    model
        The base, its folder, its name on the Hub or "nano", of which gguf needs the config.json, and so do
        vllm and sglang where experts are adapted
    alpha
        The lora_alpha that a loralib file was trained with
    enable_lora
        Which parts of its MergedLinear layers a loralib file adapts, such as true,false,true
    dtype
        Of the factors written; as they are where not given
    allow_pickle
        Read .bin files, with weights_only
    experts_packed
        How stacked experts' B lies in the source, where its files do not tell: by-rank, as PEFT has it, or by-expert
    force
        Replace the file that --out names, where there is one and it is no input
    """
    report = convert_adapter(
        source,
        out,
        to=to,
        model=base_folder(model) if model else None,
        alpha=alpha,
        enable_lora=_switches(enable_lora),
        dtype=getattr(torch, dtype) if dtype else None,
        allow_pickle=allow_pickle,
        experts_packed=experts_packed,
        force=force,
    )
    say_written(report, out, as_json)


def _switches(text: str | None) -> list[bool] | None:
    """ "true,false,true" → [True, False, True]"""
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    if any(word not in SWITCHES for word in words):
        raise LowrankError(f"--enable-lora {text}: give true or false for every part, such as true,false,true")
    return [SWITCHES[word] for word in words]
