"""Rows to token ids, and which of the tokens are trained.

completion      [bos] + tokens(template with the prompt) + tokens(completion) + [eos]; trained: the completion and eos
text            [bos] + tokens(text) + [eos]; trained: all
classification  the tokenizer's own form of a text or a pair; trained: the label

The first token of a row is never trained: nothing predicts it. Rows that have bos or eos written out get no second one.
Prompt and completion are made into tokens apart, so that the tokens a completion follows in training are exactly those
it follows when the model is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe
from lowrank.errors import DataError
from lowrank.stages import stage

IGNORED = -100  # the label of a token that is not trained, in torch and transformers alike


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. labels: per token (IGNORED where not trained), or the one class of a row to classify.

    type_ids: which text of a pair a token belongs to, for tokenizers that say so.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    type_ids: Sequence[int] | None = None

    @property
    def trained(self) -> int:
        """How many of the labels count."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as tokens. cut: rows shortened to max_length; dropped: those with nothing to train left, left out."""

    examples: list[Example]
    cut: int
    dropped: int

    @property
    def tokens(self) -> int:
        """All tokens, those of the prompts included."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained(self) -> int:
        """The labels that count: tokens to predict, or rows to classify."""
        return sum(example.trained for example in self.examples)


def encode(data: Dataset, tokenizer: Any, recipe: Recipe) -> Encoded:
    """Every row as tokens, cut at `recipe.max_length`.

    Raises DataError where no row has anything left to train.
    """
    stage(f"tokenising {len(data.rows):,} rows")
    if data.kind == "chat":
        raise DataError(f"{data.path}: conversations can be read, but not trained yet")
    if data.kind == "classification":
        return _classification(data, tokenizer, recipe)
    whole = _completions(data, tokenizer, recipe) if data.kind == "completion" else _texts(data, tokenizer)
    cut = [Example(e.ids[: recipe.max_length], [IGNORED, *e.labels[1 : recipe.max_length]]) for e in whole]
    kept = [example for example in cut if example.trained]
    if not kept:
        raise DataError(
            f"{data.path}: no row has a token to train within {recipe.max_length} tokens; raise --max-length, or "
            "shorten the prompts"
        )
    shortened = sum(len(example.ids) > recipe.max_length for example in whole)
    return Encoded(kept, shortened, len(whole) - len(kept))


def prompt_ids(tokenizer: Any, recipe: Recipe, prompt: str) -> list[int]:
    """The tokens the model reads before it answers: the same as in training."""
    return _begun(_plain(tokenizer, [recipe.prompt(prompt)])[0], _bos(tokenizer))


def _bos(tokenizer: Any) -> list[int]:
    """The first token of every text, where the tokenizer itself puts one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _begun(ids: list[int], bos: list[int]) -> list[int]:
    """The row with its first token, which the text may have brought itself."""
    return ids if bos and ids[:1] == bos else [*bos, *ids]


def _ended(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The row with its last token, which the text may have brought itself; a new line after it changes nothing."""
    eos = _eos(tokenizer)
    written = bool(eos) and eos[0] in ids and text.rstrip().endswith(tokenizer.eos_token)
    return ids if written else [*ids, *eos]


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return found


def _completions(data: Dataset, tokenizer: Any, recipe: Recipe) -> list[Example]:
    bos = _bos(tokenizer)
    answers = [row.fields["completion"] for row in data.rows]
    prompts = [_begun(ids, bos) for ids in _plain(tokenizer, [recipe.prompt(r.fields["prompt"]) for r in data.rows])]
    ended = [_ended(ids, text, tokenizer) for ids, text in zip(_plain(tokenizer, answers), answers, strict=True)]
    return [
        Example([*prompt, *answer], [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(prompts, ended, strict=True)
    ]


def _texts(data: Dataset, tokenizer: Any) -> list[Example]:
    bos = _bos(tokenizer)
    texts = [row.fields["text"] for row in data.rows]
    rows = [
        _ended(_begun(ids, bos), text, tokenizer) for ids, text in zip(_plain(tokenizer, texts), texts, strict=True)
    ]
    return [Example(ids, ids) for ids in rows]


def _unframed(text: str, tokenizer: Any) -> str:
    """The text without the tokens that the tokenizer puts around every text to classify, where they are written out."""
    first, last = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    framed = tokenizer("a")["input_ids"]
    if first and framed[:1] == [tokenizer.convert_tokens_to_ids(first)]:
        text = text.removeprefix(first)
    if last and framed[-1:] == [tokenizer.convert_tokens_to_ids(last)]:
        text = text.removesuffix(last)
    return text


def _classification(data: Dataset, tokenizer: Any, recipe: Recipe) -> Encoded:
    numbers = {name: number for number, name in enumerate(recipe.labels)}
    for row in data.rows:
        if row.fields["label"] not in numbers:
            raise DataError(
                f"{data.place(row)}: label {row.fields['label']!r} is none of the labels trained on "
                f"({', '.join(map(repr, recipe.labels))})"
            )
    texts = [_unframed(row.fields["text"], tokenizer) for row in data.rows]
    paired = [row.fields["text_pair"] for row in data.rows if "text_pair" in row.fields]
    if paired and len(paired) < len(texts):
        raise DataError(f"{data.path}: {len(paired)} of {len(texts)} rows have a second text; all or none must")
    pairs = paired or None
    lengths = [len(ids) for ids in tokenizer(texts, pairs)["input_ids"]]
    found = tokenizer(texts, pairs, truncation=True, max_length=recipe.max_length)
    types = found["token_type_ids"] if "token_type_ids" in found else [None] * len(texts)
    examples = [
        Example(ids, [numbers[row.fields["label"]]], type_ids)
        for row, ids, type_ids in zip(data.rows, found["input_ids"], types, strict=True)
    ]
    return Encoded(examples, sum(length > recipe.max_length for length in lengths), 0)
