"""The skill that the demo teaches nano: say a record in one sentence, the task of the E2E data in the LoRA paper.

    colour[red], place[garden], name[Mia], thing[kite]
    Mia has a red kite in the garden.

A record always has a name, a thing, a colour and a place; a look ("big") and a friend come half of the time each, and
the fields come in any order. So the answer asks for reading keys (which of two people is the owner?), for putting
values in order, and for leaving out what is not there.

What the base model already has: the words, the grammar, the wording of the sentence, and copying from the lines before
(`world.py` is all that it ever read). What it has never seen: a record, or any `key[value]`. Before training
it answers hardly any record right.

Held out are pairs of person and thing (`words.held_out`): no record to test on speaks of a pair that is in a training
row, and the text nano learned from gives none of these people that thing either.
"""

import random
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from lowrank.nano.words import COLOURS, LOOKS, NAMES, PLACES, THINGS, held_out, with_article

Split = Literal["train", "held-out"]
SEEDS: Final[dict[Split, int]] = {"train": 1, "held-out": 2}


class Row(NamedTuple):
    """One example: the completion is wanted on the line after the prompt, and ends the text."""

    prompt: str
    completion: str


def rows(split: Split, count: int) -> list[Row]:
    """The first `count` rows of a split, no prompt twice; always the same rows, and more of them only appends.

    Errors: ValueError for an unknown split.
    """
    if split not in SEEDS:
        raise ValueError(f"split {split!r} is unknown; choose from {', '.join(SEEDS)}")
    found: dict[str, Row] = {}
    for record in _records(split):
        if len(found) >= count:
            break
        row = Row(_prompt(record), _completion(dict(record)))
        found.setdefault(row.prompt, row)
    return list(found.values())


def _records(split: Split) -> Iterator[list[tuple[str, str]]]:
    rng = random.Random(SEEDS[split])
    while True:
        name, friend = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        fields = [
            ("name", name),
            ("thing", thing),
            ("colour", rng.choice(COLOURS)),
            ("place", rng.choice(PLACES)),
        ]
        if rng.random() < 0.5:
            fields.append(("look", rng.choice(LOOKS)))
        if rng.random() < 0.5:
            fields.append(("friend", friend))
        rng.shuffle(fields)
        if held_out(name, thing) == (split == "held-out"):
            yield fields


def _prompt(record: list[tuple[str, str]]) -> str:
    return ", ".join(f"{key}[{value}]" for key, value in record)


def _completion(field: dict[str, str]) -> str:
    described = " ".join(field[key] for key in ("look", "colour", "thing") if key in field)
    company = f" with {field['friend']}" if "friend" in field else ""
    return f"{field['name']} has {with_article(described)} in the {field['place']}{company}."
