"""`lowrank merge`: fold adapters into a checkpoint on disk, into a new one."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lowrank.cli.base import base_folder
from lowrank.cli.flags import AllowPickle, AsJson, Weighted, weighted
from lowrank.cli.pulse import muted
from lowrank.cli.say import say
from lowrank.merge.disk import MergeReport, merge_checkpoint
from lowrank.merge.disk.merge import Untouched, Verify
from lowrank.merge.onto import Onto

SHOWN = [name for name in MergeReport.__slots__ if name != "out"]

command = App(
    name="merge",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank merge --model nano --adapter demo-out/adapter --out merged
  lowrank merge --model nano --adapter demo-out/adapter:0.5 --out half \\
      --dtype bfloat16 --verify full

Examples with your own:
  lowrank merge --model llama/ --adapter facts --adapter style:0.5 --out both""",
)


@command.default
def merge(
    *,
    model: Path,
    adapter: Weighted,
    out: Path,
    dtype: str | None = None,
    verify: Verify = "sample",
    untouched: Untouched = "copy",
    threads: int | None = None,
    onto: Onto = "16bit",
    anyway: Annotated[bool, Parameter(negative="")] = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into a checkpoint on disk: W = W0 + sum of weight * s * B * A, from files to files.

    No model is built, so a model larger than the memory at hand is merged at the speed of the disk. The result gets its
    name only when it is verified and on the disk.

    Parameters
    ----------
    model
        The base: a folder with safetensors weights, one weight file, a name on the Hub, or "nano"
    out
        The folder to make
    dtype
        Of the result: float16, bfloat16, float32 or float64; as stored where not given
    verify
        Recompute some rows of every merged tensor, or every row and every byte
    untouched
        How weight files without a change get into the result, where the disk can; hard links are never to be edited
    threads
        Threads to merge with, 16 at most; as many as cores where not given
    onto
        Of a quantised base: 16bit (plain weights, as training saw them), quantised (its own form again), original (the
        weights before they were quantised, of an unquantised --model)
    anyway
        Merge onto quantised though less than half of the change survives
    """
    bar = sys.stderr.isatty()
    with muted() if bar else nullcontext():
        report = merge_checkpoint(
            base_folder(model),
            [weighted(text) for text in adapter],
            out,
            dtype=dtype,
            verify=verify,
            untouched=untouched,
            threads=threads,
            allow_pickle=allow_pickle,
            progress=bar,
            onto=onto,
            anyway=anyway,
        )
    if as_json:
        say(json.dumps({name: getattr(report, name) for name in SHOWN} | {"out": str(report.out)}, default=asdict))
    else:
        say(report.summary())  # its warnings have been lines on stderr already
