"""Tokens that a user names, as rows of a model's tables."""

from collections.abc import Sequence
from typing import Any

from lowrank.errors import ConfigError, short
from lowrank.injection.targets import named_targets
from lowrank.injection.token_rows import input_table


def token_rows(model: Any, tokenizer: Any, words: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """{path of a table: rows} for tokens or ids: of the input embeddings, and of a head with a weight of its own.

    Raises ConfigError for a word that is several tokens, or none.
    """
    if not words:
        return None
    ids = tuple(dict.fromkeys(_id(tokenizer, word) for word in words))
    modules = named_targets(model)
    table, head = input_table(model, modules), model.get_output_embeddings()
    if table is None:
        raise ConfigError(f"--trainable-tokens: a {type(model).__name__} does not say which its table of tokens is")
    rows = {table: ids}
    if head is not None and head.weight is not modules[table].weight:
        rows |= {path: ids for path, module in modules.items() if module is head}
    return rows


def _id(tokenizer: Any, word: str) -> int:
    if word.isascii() and word.isdigit():
        return int(word)
    if word in (vocabulary := tokenizer.get_vocab()):
        return int(vocabulary[word])
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    raise ConfigError(
        f"--trainable-tokens {short(word, 80)}: this tokenizer has no such token. Add it to the model's folder first "
        "(tokenizer.add_tokens, model.resize_token_embeddings, save_pretrained of both), or give ids"
    )
