"""What a model writes for the prompts of rows, beside what it should have written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lowrank.data.batches import chunks
from lowrank.data.tokens import IGNORED, Example
from lowrank.stages import stage
from lowrank.train.lockstep import idle_passes
from lowrank.train.models import quiet
from lowrank.train.processes import gathered, largest, share
from lowrank.train.sharding import is_in_parts

ROOM = 8  # tokens that an answer may have beyond twice those of the longest reference


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's: what was written, and every reference that rows with this prompt give, each once."""

    written: str
    references: tuple[str, ...]


def answers(
    model: nn.Module,
    tokenizer: Any,
    pad: int,
    ends: Sequence[int] | None,
    examples: Sequence[Example],
    batch_size: int,
) -> list[Answer]:
    """The likeliest answer to every prompt, token by token, in the order of the rows; equal prompts are asked once.

    ends: the tokens that end an answer (`train.ends`).

    Of a row with several answers the last one is asked for. Prompts of one length are asked together, so that none is
    padded and the answers are those of prompts asked alone. Several processes share the prompts out.
    """
    asked: dict[tuple[int, ...], list[list[int]]] = {}
    for example in examples:
        prompt, reference = _parted(example)
        asked.setdefault(prompt, []).append(reference)
    written: list[tuple[tuple[int, ...], str]] = []
    of_a_length = [list(group) for _, group in groupby(sorted(asked, key=len), key=len)]
    parts = [part for group in of_a_length for part in chunks(group, batch_size)]
    for prompts in share(parts):
        stage("writing answers", len(written), len(asked))
        longest = max(len(reference) for prompt in prompts for reference in asked[prompt])
        written += zip(prompts, _texts(model, tokenizer, pad, ends, prompts, 2 * longest + ROOM), strict=True)
    for _ in range(idle_passes(model, len(parts))):
        _texts(model, tokenizer, pad, ends, parts[0][:1], 1)
    found = {tuple(prompt): text for part in gathered(written) for prompt, text in part}
    return [
        Answer(found[prompt], tuple(dict.fromkeys(_text(tokenizer, ids) for ids in references)))
        for prompt, references in asked.items()
    ]


def _parted(example: Example) -> tuple[tuple[int, ...], list[int]]:
    """(the tokens before the last trained span, its tokens)."""
    labels = list(example.labels)
    end = next(i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORED), 0)
    return tuple(example.ids[:start]), list(example.ids[start:end])


def _texts(
    model: Any,
    tokenizer: Any,
    pad: int,
    ends: Sequence[int] | None,
    prompts: Sequence[tuple[int, ...]],
    length: int,
) -> Iterator[str]:
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None)
    room = length if positions is None else min(length, _room(model, positions - len(prompts[0])))
    how = GenerationConfig(
        max_new_tokens=max(1, room),
        do_sample=False,
        eos_token_id=None if ends is None else list(ends),
        pad_token_id=pad,
    )
    ids = torch.tensor(prompts, device=next(model.parameters()).device)
    with quiet():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return (_text(tokenizer, row) for row in found[:, ids.shape[1] :])


def _room(model: nn.Module, own: int) -> int:
    """Tokens that may be written: where every forward is one of all processes, until the last of them has ended."""
    return -largest(-own) if is_in_parts(model) else own


def _text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
