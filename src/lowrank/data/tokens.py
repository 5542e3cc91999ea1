"""Rows to token ids, and which of the tokens are trained.

completion      [bos] + tokens(template with the prompt) + tokens(completion) + [eos]; trained: the completion and eos
text            [bos] + tokens(text) + [eos]; trained: all (the parts of a long text have bos and eos at its ends)
chat            tokens(the chat template's text); trained: what the assistant says, each time to its end token
classification  the tokenizer's own form of a text or a pair; trained: the label, a class
regression      the same; trained: the label, a number
preference      two answers to one prompt, each as a completion or a chat, one behind the other (data.preference)

The first token of a row is never trained: nothing predicts it. Rows that have bos or eos written out get no second one.
Prompt and completion are made into tokens apart, so that the tokens a completion follows in training are exactly those
it follows when the model is asked.
"""

from collections.abc import Callable
from typing import Any

from lowrank.data.cache.keys import tokens_key
from lowrank.data.cache.store import get, keep
from lowrank.data.cache.tokens import encoded
from lowrank.data.cache.warned import repeat
from lowrank.data.chat.encoding import chat_prompt, encode_chats
from lowrank.data.classification import encode_labelled
from lowrank.data.dataset import Dataset
from lowrank.data.encoding import STAGE, Encoding
from lowrank.data.examples import IGNORED, Encoded, Example
from lowrank.data.preference import encode_preferences
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Kind
from lowrank.data.tally import Tally
from lowrank.data.too_long import CUT, ERROR, SPLIT, pieces, policy_of, without_beginning
from lowrank.stages import stage

__all__ = ["IGNORED", "Encoded", "Example", "encode", "prompt_ids"]


def encode(data: Dataset, tokenizer: Any, recipe: Recipe) -> Encoded:
    """Every row as tokens, at most `recipe.max_length` of them; those that the cache has from an earlier run.

    Raises DataError where no row has anything left to train, and for what is wrong with rows as tokens.
    """
    stage(STAGE, 0, len(data.rows))
    key = tokens_key(data.key, tokenizer, recipe)
    kept = get(key) if key else None
    if kept is None:
        found, _ = keep(key, lambda: Encoding(data, tokenizer, recipe, ENCODERS[data.kind]))
        return encoded(found)
    repeat(kept.header["warned"])
    return encoded(kept, reused=True)


def prompt_ids(tokenizer: Any, recipe: Recipe, prompt: str) -> list[int]:
    """The tokens the model reads before it answers: the same as in training."""
    if recipe.chat_template:
        return chat_prompt(tokenizer, recipe, [{"role": "user", "content": prompt}])
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
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _completions(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    bos = _bos(tokenizer)
    answers = [row.fields["completion"] for row in data.rows]
    prompts = [_begun(ids, bos) for ids in _plain(tokenizer, [recipe.prompt(r.fields["prompt"]) for r in data.rows])]
    ended = [_ended(ids, text, tokenizer) for ids, text in zip(_plain(tokenizer, answers), answers, strict=True)]
    rows = []
    for prompt, answer in zip(prompts, ended, strict=True):
        given = prompt if recipe.train_on == "all" else [IGNORED] * len(prompt)
        rows.append(Example([*prompt, *answer], given + answer))
    return _fitted(data, rows, recipe, bos, tally)


def _preferences(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    bos = _bos(tokenizer)

    def row(prompt: str, answer: str) -> Example:
        given = _begun(_plain(tokenizer, [recipe.prompt(prompt)])[0] if prompt else [], bos)
        said = _ended(_plain(tokenizer, [answer])[0], answer, tokenizer)
        said = said[len(bos) :] if not prompt and bos and said[: len(bos)] == bos else said
        labels = [*[IGNORED] * len(given), *said]
        return Example([*given, *said], [IGNORED, *labels[1:]])

    return encode_preferences(data, tokenizer, recipe, row, bos, tally)


def _texts(data: Dataset, tokenizer: Any, recipe: Recipe, tally: Tally) -> list[Example]:
    bos = _bos(tokenizer)
    texts = [row.fields["text"] for row in data.rows]
    rows = []
    for row, text, ids in zip(data.rows, texts, _plain(tokenizer, texts), strict=True):
        begun = _begun(ids, bos) if row.begins else ids
        whole = _ended(begun, text, tokenizer) if row.ends else begun
        rows.append(Example(whole, whole))
    return _fitted(data, rows, recipe, bos, tally)


def _fitted(data: Dataset, whole: list[Example], recipe: Recipe, bos: list[int], tally: Tally) -> list[Example]:
    """The rows at the longest length, and none of those that have nothing to train."""
    policy = policy_of(data.kind, recipe.too_long)
    longest = recipe.max_length
    trained: list[Example] = []
    for row, example in zip(data.rows, whole, strict=True):
        long = len(example.ids) > longest
        if long and policy == ERROR:
            tally.long.add(data.place(row))
            continue
        parts = FIT[policy](example, longest, bos) if long else [example]
        firsts = [Example(part.ids, [IGNORED, *part.labels[1:]]) for part in parts]
        kept = [part for part in firsts if any(label != IGNORED for label in reversed(part.labels))]
        trained += kept
        tally.cut += long and policy == CUT and bool(parts)
        tally.split += long and policy == SPLIT
        tally.dropped += (1 if policy != SPLIT else len(parts)) - len(kept)
    return trained


def _cut(example: Example, longest: int, bos: list[int]) -> list[Example]:
    """Of a text the end is cut, of a completion the beginning of its prompt."""
    if example.labels == example.ids:
        return [Example(example.ids[:longest], example.labels[:longest])]
    shorter = without_beginning(example, longest, bos)
    return [] if shorter is None else [shorter]


FIT: dict[str, Callable[[Example, int, list[int]], list[Example]]] = {
    CUT: _cut,
    SPLIT: lambda example, longest, _bos: pieces(example, longest),
    "drop": lambda _example, _longest, _bos: [],
}

ENCODERS: dict[Kind, Callable[[Dataset, Any, Recipe, Tally], list[Example]]] = {
    "text": _texts,
    "completion": _completions,
    "chat": encode_chats,
    "classification": encode_labelled,
    "regression": encode_labelled,
    "preference": _preferences,
}
