"""Claim: at a vocabulary of 151,936 the loss of tokens takes no more time than the plain one, and little memory.

A Llama-shaped model of two layers (hidden 896) with an all-linear adapter takes a training step, forward and backward,
on 4 rows of 256 tokens, of which half or all are trained. Every form runs in processes of its own, in turns.

    python benchmarks/chunked_loss.py [--rounds 3] [--threads 2] [--out benchmarks/results/chunked_loss.json]

transformers  model(labels=...).loss: all logits, float32
selected      all logits, the loss of the trained ones
chunked       lowrank: trained positions alone reach the head, some at a time
trl           TRL's fused forward (ChunkedLogProbFunction; needs `pip install trl`, left out where it is not there)
floor         no loss at all: the backbone's step, and the head's two products of the trained positions
peak_mb is the highest resident memory of the first step over what was resident before it (VmHWM).
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ALL_LINEAR, conditions, keep
from torch import Tensor, nn

from lowrank import LoraConfig, inject
from lowrank.data.batches import Batch
from lowrank.data.tokens import IGNORED
from lowrank.train.chunked import chunk_size
from lowrank.train.head import find_head
from lowrank.train.losses import NextToken

VOCABULARY, HIDDEN, ROWS, LENGTH = 151_936, 896, 4, 256
Step = Callable[[], Tensor]


def model_with_adapter() -> nn.Module:
    """The same numbers each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2432, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=ALL_LINEAR))
    return model.train()


def batch_of(share: float) -> Batch:
    """Rows whose last `share` is trained."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : 1 + round((1 - share) * (LENGTH - 1))] = IGNORED
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, ids.numel())


def transformers_form(model: Any, batch: Batch) -> Step:
    """Its own loss."""
    return lambda: model(**batch.inputs, labels=batch.labels, use_cache=False).loss


def selected_form(model: Any, batch: Batch) -> Step:
    """All logits, then those that are trained."""
    targets = batch.labels[:, 1:]
    trained = targets != IGNORED

    def loss() -> Tensor:
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1][trained]
        return nn.functional.cross_entropy(logits.float(), targets[trained])

    return loss


def chunked_form(model: Any, batch: Batch) -> Step:
    """Ours."""
    loss_of = NextToken(find_head(model))

    def loss() -> Tensor:
        found = loss_of(model, batch)
        return found.total / found.count

    return loss


def trl_form(model: Any, batch: Batch) -> Step:
    """TRL's, on the same layers."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return lambda: model(**batch.inputs, labels=batch.labels, fused_lm_head=True).loss


def floor_form(model: Any, batch: Batch) -> Step:
    """The backbone, and states·Wᵀ and its gradient in pieces."""
    trained = batch.labels[:, 1:] != IGNORED
    weight, size = model.get_output_embeddings().weight.detach(), chunk_size(VOCABULARY)

    def loss() -> Tensor:
        states = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1][trained]
        with torch.no_grad():
            gradient = torch.cat([(part @ weight.t()) @ weight for part in states.split(size)])
        return (states * gradient).sum()

    return loss


FORMS = {
    "transformers": transformers_form,
    "selected": selected_form,
    "chunked": chunked_form,
    "trl": trl_form,
    "floor": floor_form,
}


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(form: str, share: float, threads: int) -> dict[str, float]:
    """One process: the first step's memory, the time of two more, and the loss."""
    torch.set_num_threads(threads)
    model, batch = model_with_adapter(), batch_of(share)
    step = FORMS[form](model, batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    loss = step()
    loss.backward()
    found = {"peak_mb": round(resident("VmHWM") - before, 1), "loss": loss.item()}
    seconds = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step().backward()
        seconds.append(time.perf_counter() - started)
    return found | {"seconds": round(min(seconds), 3)}


def main() -> None:
    """Every form in turns, in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=1.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.form:
        print(json.dumps(measure(asked.form, asked.share, asked.threads)))
        return
    names = [name for name in FORMS if name != "trl" or importlib.util.find_spec("trl")]
    report: dict[str, Any] = {
        "claim": __doc__.split("\n")[0],
        "vocabulary": VOCABULARY,
        "positions": ROWS * LENGTH,
        "conditions": conditions(asked.threads),
    }
    for share in (0.5, 1.0):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(asked.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                command = [sys.executable, __file__, "--form", name, "--share", str(share)]
                command += ["--threads", str(asked.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        report[f"{share:.0%} trained"] = {
            name: {figure: statistics.median(run[figure] for run in found) for figure in found[0]}
            | {"time_to_transformers": round(statistics.median(
                run["seconds"] / plain["seconds"] for run, plain in zip(found, runs["transformers"], strict=True)
            ), 3)}
            for name, found in runs.items()
        }  # fmt: skip
    keep(report, asked.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
