"""`train --trainable-tokens`: words and ids become rows of the table, and of a head that is not tied to it."""

import pytest

from checkpoint_models import llama
from lowrank.errors import ConfigError
from lowrank.train.settings import AdapterSettings
from lowrank.train.token_rows import token_rows


class Words:
    """A tokenizer of a few words."""

    unk_token_id = 0

    def get_vocab(self) -> dict[str, int]:
        return {"<unk>": 0, "<think>": 7, "Ġmay": 9, "a,b": 11}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {" may": [9], "several words": [3, 4]}.get(text, [0])


def test_tokens_are_whatever_stands_between_commas() -> None:
    assert AdapterSettings(trainable_tokens="<think>,</think>,5").trainable_tokens == ("<think>", "</think>", "5")
    assert AdapterSettings(trainable_tokens=["<a>", " may"]).trainable_tokens == ("<a>", " may")
    assert AdapterSettings().trainable_tokens == ()


def test_words_and_ids_are_rows_of_table_and_head() -> None:
    model = llama()
    wanted = (7, 9, 21)
    assert token_rows(model, Words(), ["<think>", " may", "21", "<think>"]) == {
        "model.embed_tokens": wanted,
        "lm_head": wanted,
    }
    model.lm_head.weight = model.model.embed_tokens.weight
    assert token_rows(model, Words(), ["7"]) == {"model.embed_tokens": (7,)}
    assert token_rows(model, Words(), []) is None


@pytest.mark.parametrize("word", ["<new>", "several words", ""])
def test_words_that_are_no_token_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="this tokenizer has no such token"):
        token_rows(llama(), Words(), [word])
