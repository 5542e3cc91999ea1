"""A fuzz target for data: damaged rows of every shape, from the file through records and rows to tokens and masks.

    python tests/hostile/rows.py --cases 10000 [--minutes 3] [--seed 0] [--keep tests/hostile]

A case is a few rows, one or two of them damaged, in one of the forms of file, under a chat template of one of the
families and settings drawn by chance. It becomes tokens, or a LowrankError, in 10 seconds and a gigabyte; and what is
trained then is right: nothing but the row's own tokens, within the longest length, and, where nobody asked for more, no
word that only a user, a tool or the system says. What breaks that is kept as a folder `rows-HASH`, which the test suite
reads again.
"""

import copy
import functools
import json
import random
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fuzz  # noqa: E402
import pyarrow  # noqa: E402
import running  # noqa: E402
from readers import bounded  # noqa: E402

from chat_templates import FAMILIES, byte_tokenizer  # noqa: E402
from lowrank.data.dataset import Dataset, label_names, read_dataset  # noqa: E402
from lowrank.data.examples import IGNORED, Encoded  # noqa: E402
from lowrank.data.recipe import make_recipe  # noqa: E402
from lowrank.data.rows import PER_TOKEN, Row  # noqa: E402
from lowrank.data.settings import DataSettings  # noqa: E402
from lowrank.data.tokens import encode  # noqa: E402
from lowrank.errors import LowrankError  # noqa: E402

SAID = re.compile(r"[uavs]\d+q")  # the words of the seeds: who says them, and which they are
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a9q"}}}
S, U, A = ({"role": role, "content": f"{role[0]}1q"} for role in ("system", "user", "assistant"))
TURNS = [S, U, A, {"role": "user", "content": "u2q"}, {"role": "assistant", "content": "a2q"}]
CALLED = [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "v3q"}, A]
SHAREGPT = [{"from": "human", "value": "u1q"}, {"from": "gpt", "value": "a1q"}]

SEEDS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": CALLED, "tools": [TOOL]},
    {"messages": CALLED, "tools": json.dumps([TOOL["function"]])},
    {"messages": [U, {**A, "reasoning_content": "a8q", "train": True}, {**U, "weight": 0}, A]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "u1q"}], "name": "Mia"}, A]},
    {"conversations": SHAREGPT, "system": "s1q"},
    {"conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps(CALL["function"])}, *SHAREGPT]},
    {"prompt": [S, U], "completion": [A]},
    {"prompt": "u1q", "completion": "a1q"},
    {"instruction": "u1q", "input": "u2q", "output": "a1q", "system": "s1q", "history": [["u3q", "a3q"]]},
    {"question": "u1q", "answer": "a1q"},
    {"text": "a1q a2q a3q"},
    {"text": "u1q", "text_pair": "u2q", "label": 1},
    {"text": "u1q", "label": "good"},
    {"text": "u1q", "label": 3.5},
    {"prompt": "u1q", "chosen": "a1q", "rejected": "a2q"},
    {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "a2q"}]},
    {"chosen": [U, A], "rejected": [U, {**A, "content": "a2q"}]},
    {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "a2q"}},
]
CHATS = 10  # so many of them are conversations
WRONG: list[Any] = [
    *fuzz.VALUES,
    *fuzz.TEXTS,
    10**400,
    float("inf"),
    " \n",
    "\x00",
    "a" * 5000,
    "\u202e",
    "{",
    "[1,",
    "42",
]
WRONG += [
    "</s>",
    "<|im_end|>",
    "<think></think>",
    "{{ 1 / 0 }}",
    "\ue000",
    "user",
    "gpt",
    [None],
    [1, "x"],
    U,
    A,
    TURNS,
]
NAMES = [
    "messages",
    "prompt",
    "label",
    "text",
    "role",
    "from",
    "content",
    "value",
    "tools",
    "train",
    "weight",
    "",
    "\ud800",
]
SPICE = [
    "</s>",
    "<|im_end|>",
    "<think>\n\n</think>\n\n",
    "<turn>",
    "{{ x }}",
    "\ue000",
    "\x00",
    "\u0301",
    " ",
    "\n\n",
    "é😀",
]
SPICE += ["<|im_start|>assistant\n", "a" * 300, "\r", "\u2028", '"', ",", "\t", "[/INST]", "<s>"]
FORMS = (*[".jsonl"] * 7, ".json", ".csv", ".tsv", ".parquet", ".txt")


@functools.cache
def tokenizer(family: str) -> Any:
    """Bytes as tokens, under the template of the family; "none" has no template."""
    return byte_tokenizer(FAMILIES[family][0] if family in FAMILIES else None)


def make_case(folder: Path, number: int, seed: int) -> None:
    """Case `number` of a run in `folder`: a file of rows, and case.json, which says how it is read."""
    dice = random.Random(f"{seed}/{number}")
    folder.mkdir(parents=True)
    shape = dice.choice(SEEDS[:CHATS] if dice.random() < 0.6 else SEEDS)
    rows = [copy.deepcopy(row) for row in ([shape] * 3 if dice.random() < 0.9 else dice.sample(SEEDS, 3))]
    for _ in range(dice.choice([1, 1, 2])):
        dice.choice([spoil, season, season])(rows[dice.choice([0, 0, 1])], dice)
    path = folder / f"rows{dice.choice(FORMS)}"
    write(path, rows)
    if dice.random() < 0.15:
        fuzz.mutate_bytes(path, dice)
    settings = {
        "kind": dice.choice([None] * 30 + ["chat", "text", "completion", "regression", "preference", "classification"]),
        "bad_rows": dice.choice(["error", "skip", "skip", "skip"]),
        "train_on": dice.choice([None, None, None, "last", "completion", "all"]) if shape in SEEDS[:CHATS] else None,
        "too_long": dice.choice([None, None, None, "cut", "drop", "error"]),
        "max_length": dice.choice([4, 24, 60, 200, 200, 100_000]),
    }
    family = dice.choice([*FAMILIES, "none"])
    (folder / "case.json").write_text(json.dumps({"settings": settings, "family": family}))


def spoil(row: dict[str, Any], dice: random.Random) -> None:
    """In place: one fault, at any depth."""
    at: Any = row
    while True:
        if not at:
            return
        key = dice.choice(keys(at))
        if not isinstance(at[key], dict | list) or dice.random() < 0.3:
            break
        at = at[key]
    what = dice.randrange(6)
    if what == 0:
        del at[key]
    elif what == 1 and isinstance(at, list):
        at.insert(dice.randrange(len(at) + 1), copy.deepcopy(dice.choice([at[key], *WRONG])))
    elif what == 2 and isinstance(at, list):
        dice.shuffle(at)
    elif what == 3 and isinstance(at, dict):
        at[dice.choice(NAMES)] = at.pop(key)
    elif what == 4:
        for _ in range(dice.choice([1, 5, 120])):
            at[key] = [at[key]]
    else:
        at[key] = copy.deepcopy(dice.choice(WRONG))


def season(row: dict[str, Any], dice: random.Random) -> None:
    """In place: something is put into one of its texts."""
    texts = [(at, key) for at in inside(row) for key in keys(at) if isinstance(at[key], str)]
    if not texts:
        return
    at, key = dice.choice(texts)
    where = dice.randrange(len(at[key]) + 1)
    at[key] = at[key][:where] + dice.choice(SPICE) + at[key][where:]


def inside(value: Any) -> Iterator[Any]:
    """The value and all lists and objects in it."""
    if isinstance(value, dict | list):
        yield value
        for key in keys(value):
            yield from inside(value[key])


def keys(value: Any) -> list[Any]:
    """What a list or an object is asked with for its values."""
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the form that the name says; where it cannot hold them, as JSON under that name."""
    from pyarrow import parquet

    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".parquet":
        with suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError, UnicodeError):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            return
    if path.suffix in (".csv", ".tsv"):
        apart = "," if path.suffix == ".csv" else "\t"
        names = list(rows[0])
        cells = [[str(row.get(name, "")) for name in names] for row in rows]
        lines = [
            apart.join(json.dumps(cell)[1:-1] if apart == "\t" else cell for cell in line) for line in [names, *cells]
        ]
    text = f"[{','.join(lines)}]" if path.suffix == ".json" else "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")


def broken_promise(folder: Path) -> str | None:
    """Read the case in `folder`; what is wrong with how that went, or None."""
    case = json.loads((folder / "case.json").read_text())
    (path,) = folder.glob("rows.*")
    settings = DataSettings(**case["settings"], cache=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = read_dataset(path, settings)
            tok = tokenizer(case["family"])
            labels = label_names(rows) if rows.kind == "classification" else ()
            recipe = make_recipe(settings, rows.kind, tok, settings.max_length or 512, labels, speaks=rows.speaks)
            return wrong(rows, encode(rows, tok, recipe), tok, settings)
    except LowrankError as error:
        return f"a message of {len(str(error))} characters" if len(str(error)) > running.LONGEST_MESSAGE else None
    except BaseException:
        return traceback.format_exc()


def wrong(rows: Dataset, data: Encoded, tok: Any, settings: DataSettings) -> str | None:
    """What is trained and should not be."""
    for example in data.examples:
        if rows.kind not in PER_TOKEN:
            continue
        if len(example.ids) > (settings.max_length or 512):
            return "a row is longer than the longest length"
        if example.labels[0] != IGNORED or not example.trained:
            return "the first token is trained, or nothing is"
        if any(label not in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True)):
            return "a label is not its token"
    if rows.kind != "chat" or settings.train_on == "all":
        return None
    text = " ".join(tok.decode([t for t in example.labels if t != IGNORED]) for example in data.examples)
    strangers = set(SAID.findall(text)) - {word for row in rows.rows for word in trainable(row)}
    return f"trained, though nobody of the assistant's says it: {sorted(strangers)}" if strangers else None


def trainable(row: Row) -> Iterator[str]:
    """The words of a row that may be trained."""
    for message in row.chat.messages if row.chat else ():
        if message.trained or (message.trained is None and message.role == "assistant"):
            yield from SAID.findall(json.dumps(dict(message.fields), default=str))


def main() -> int:
    """Run the cases; the number of kept ones is the exit status, at most 100."""
    asked = running.options(__doc__)
    pyarrow.array(["x"])  # at its first array Arrow reserves addresses, more than a case may

    def case(place: Path, number: int) -> tuple[str | None, running.Keep]:
        folder = place / "case"
        make_case(folder, number, asked.seed)
        with bounded():
            fault = broken_promise(folder)
        return fault, lambda where: running.kept(folder, where, "rows")

    return running.search(asked, case)


if __name__ == "__main__":
    sys.exit(main())
