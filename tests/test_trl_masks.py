"""Our masks beside TRL's, kept in goldens/trl_masks.json by scripts/trl_masks.py.

The tokens are the same in all rows, and the trained ones too, but where TRL is not right, as we see it:

AFTER     what the template puts behind the end token (a line end) is trained by TRL: no model is ever asked for it.
THOUGHT   an empty thought that the template itself writes before an answer is trained by TRL: serving a model that
          thinks, it would teach not to.
REWRITTEN of a conversation whose template drops the thoughts of earlier turns, TRL trains all answers in the last form
          of the text, which serving never shows at an earlier turn; ours becomes a row for each turn.
"""

import json
from pathlib import Path

import pytest

from chat_templates import FAMILIES, byte_tokenizer
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe, make_recipe
from lowrank.data.rows import Conversation, Message, Row
from lowrank.data.settings import DataSettings
from lowrank.data.tokens import IGNORED, encode
from lowrank.errors import DataError
from mask_rows import ASSISTANT, CHATS, COMPLETION, STRINGS, messages
from train_models import tokenizer as words

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "trl_masks.json").read_text())
END = {name: end for name, (_, _, end) in FAMILIES.items()}
AFTER = {"thinking": "\n", "alternating": "\n", "marked": "\n"}  # what stands behind the last end token
THOUGHT = {"thinking": "<think>\n\n</think>\n\n"}


def rows_of(turns, template, given=0, train_on=None):
    chat = Conversation(tuple(Message(fields) for fields in messages(turns)), given=given)
    tokenizer = byte_tokenizer(template)
    recipe = make_recipe(DataSettings(train_on=train_on), "chat", tokenizer, 10**6, ())
    return encode(Dataset(Path("d"), "chat", [Row(1, chat=chat)]), tokenizer, recipe).examples


def trained(example):
    return [place for place, label in enumerate(example.labels) if label != IGNORED]


def texts(name):
    """What TRL alone trains in the last answer of a row: (before the answer, behind its end)."""
    tokenizer = byte_tokenizer()
    return [len(tokenizer(found.get(name, ""))["input_ids"]) for found in (THOUGHT, AFTER)]


@pytest.mark.parametrize("name", COMPLETION)
@pytest.mark.parametrize("which", range(len(CHATS)))
def test_completions_are_trls(name, which):
    theirs = GOLDEN["completion"][name][which]
    (ours,) = rows_of(CHATS[which], COMPLETION[name], given=len(CHATS[which]) - 1)
    before, behind = texts(name)
    assert list(ours.ids) == theirs["ids"]
    assert trained(ours) == theirs["trained"][before : len(theirs["trained"]) - behind]
    assert byte_tokenizer().decode(ours.ids[trained(ours)[-1]]) == END[name]


@pytest.mark.parametrize("name", ["marked", "headers"])
@pytest.mark.parametrize("which", range(len(CHATS)))
def test_marked_answers_are_trls(name, which):
    theirs = GOLDEN["assistant"][name][which]
    (ours,) = rows_of(CHATS[which], ASSISTANT[name])
    assert (list(ours.ids), trained(ours)) == (theirs["ids"], theirs["trained"])


def test_rewritten_history_is_not_trls():
    name = "thinking"
    before, behind = texts(name)
    (short,) = rows_of(CHATS[0], ASSISTANT[name])
    theirs = GOLDEN["assistant"][name][0]
    assert list(short.ids) == theirs["ids"]
    assert trained(short) == theirs["trained"][before:-behind]
    first, last = rows_of(CHATS[1], ASSISTANT[name])
    theirs = GOLDEN["assistant"][name][1]
    assert list(last.ids) == theirs["ids"]
    start = next(i for i, (a, b) in enumerate(zip(theirs["trained"], theirs["trained"][1:], strict=False)) if b > a + 1)
    assert trained(last) == theirs["trained"][start + 1 + before : -behind]
    assert list(first.ids) != theirs["ids"][: len(first.ids)]  # it has the thought that serving would show


def test_strings_are_trls():
    tokenizer = words(pad=True)
    rows = [Row(1, {"prompt": prompt, "completion": completion}) for prompt, completion in STRINGS]
    ours = encode(Dataset(Path("d"), "completion", rows), tokenizer, Recipe("completion", "{prompt}", 64)).examples
    assert [(list(row.ids), trained(row)) for row in ours] == [
        (row["ids"], row["trained"]) for row in GOLDEN["strings"]
    ]


UNMARKED_BEFORE = (
    ASSISTANT["marked"]
    .replace("{% generation %}", "{% if loop.last %}{% generation %}")
    .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}")
)


def test_marks_are_compared_by_their_places():
    """An answer that is said twice and marked once is not marked at its first place, whatever the words are."""
    twice = [("user", "a"), ("assistant", "same"), ("user", "b"), ("assistant", "same")]
    with pytest.raises(DataError, match=r"message 1: the template's \{% generation %\} does not mark"):
        rows_of(twice, UNMARKED_BEFORE)
    (last,) = rows_of(twice, UNMARKED_BEFORE, train_on="last")
    assert byte_tokenizer().decode([last.ids[i] for i in trained(last)]) == "same<|im_end|>"


def test_words_and_calls_may_be_marked_apart():
    apart = ASSISTANT["marked"].replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{{ '\n' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
    )
    (row,) = rows_of(CHATS[0], apart)
    assert byte_tokenizer().decode([row.ids[i] for i in trained(row)]) == "c d\n<|im_end|>"
    half = apart.replace("{{ '\n' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}", "{{ '<|im_end|>' }}")
    with pytest.raises(DataError, match="does not mark"):
        rows_of(CHATS[0], half)
