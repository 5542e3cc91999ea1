"""Which matrices are lookup tables, told from names alone: files do not say."""

import re

from lowrank.modelfiles.tied import head_of

WORDS = re.compile(r"(^|_)(embed|embeds|embedding|embeddings|embd|wte|wpe|shared)(_|$)")


def is_table(path: str) -> bool:
    """True where the module's name is one that families of models give to what is looked up by rows.

    The last part decides: `model.embed_tokens`, `transformer.wte`, `embeddings.word_embeddings`, T5's `shared`.
    """
    return head_of(path) is not None or WORDS.search(path.rpartition(".")[2]) is not None
