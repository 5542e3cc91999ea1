"""Claim: on packed rows a step of `lowrank.train` takes at most 1.05 of the frozen model's own forward and backward.

    python benchmarks/packed_floor.py [--dtype f32 bf16] [--rounds 4] [--out results.json]

The packed task of `whole_training`: one step of two packs of 1,024 tokens, by turns in one process, on all cores that
it may use. No optimiser takes part.

floor    all weights frozen, rows attended one by one: forward, and back to the input embeddings
lowrank  as `lowrank.train` takes the step
whole    the same with the last feed-forward part at every position
peft     PEFT's model under transformers' mask of packed rows
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import whole_training as of
from common import conditions, keep

Jobs = dict[str, Callable[[], None]]


def jobs(folder: Path, dtype: str) -> Jobs:
    """The steps, each on the same two packs."""
    import peft
    import transformers

    from lowrank.data.examples import Example
    from lowrank.train.preparing import prepare
    from lowrank.train.row_attention import NAME

    of.run_job("rows", "packed", dtype, "0", str(folder))
    rows = json.loads((folder / "rows-0.json").read_text())[2:4]
    found = prepare(of.settings("packed", dtype, 0, folder / "run"))
    batch = found.measure.trained([Example(row["ids"], row["labels"], starts=tuple(row["starts"])) for row in rows])
    model = found.loaded.model.train()
    loss: Any = found.measure.loss
    load = transformers.AutoModelForCausalLM.from_pretrained
    frozen = load(folder / "random", dtype=getattr(torch, of.DTYPES[dtype])).requires_grad_(False)
    frozen.set_attn_implementation(NAME)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    theirs = peft.get_peft_model(load(folder / "random", dtype=getattr(torch, of.DTYPES[dtype])), config).train()

    def floor() -> None:
        x = frozen.get_input_embeddings()(batch.inputs["input_ids"]).requires_grad_()
        places = batch.inputs["position_ids"]
        frozen(inputs_embeds=x, position_ids=places, labels=batch.labels, use_cache=False).loss.backward()

    def ours(how: Any) -> None:
        answer = how(model, batch)
        torch.autograd.backward(answer.total / answer.count)
        model.zero_grad()

    def by_peft() -> None:
        theirs(**of.collate(rows), use_cache=False).loss.backward()
        theirs.zero_grad()

    whole = replace(loss, head=replace(loss.head, last=""))
    return {"floor": floor, "lowrank": lambda: ours(loss), "whole": lambda: ours(whole), "peft": by_peft}


def measured(steps: Jobs, rounds: int) -> dict[str, Any]:
    """Seconds of each job, and the medians over the rounds of PEFT's time over each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first one warms up
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            began = of.CLOCK()
            steps[name]()
            seconds[name].append(round(of.CLOCK() - began, 3))
    kept = {name: taken[1:] for name, taken in seconds.items()}
    over = {n: statistics.median(p / s for p, s in zip(kept["peft"], kept[n], strict=True)) for n in kept}
    return {"peft_over": {name: round(ratio, 3) for name, ratio in over.items()}, "seconds": kept}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=of.DTYPES, default=list(of.DTYPES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(of.THREADS)
    here, lines = conditions(of.THREADS), {}
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as place:
            lines[dtype] = measured(jobs(Path(place), dtype), options.rounds)
        print(dtype, lines[dtype]["peft_over"], flush=True)
    keep({"conditions": here, "lines": lines}, options.out)


if __name__ == "__main__":
    main()
