"""`lowrank data show`: what is trained, in brackets or marked, and nothing of the data is obeyed."""

import json

from lowrank.cli import main
from lowrank.data.examples import IGNORED, Encoded, Example
from lowrank.data.preference import joined
from lowrank.data.recipe import Recipe
from lowrank.data.survey import described, runs, survey
from lowrank.errors import printable
from train_models import WORDS, tokenizer, write_jsonl


def ids(text):
    return [WORDS.index(word) for word in text.split()]


ROW = Example(ids("what is red ? the cat </s>"), [*[IGNORED] * 4, *ids("the cat </s>")])
TEXTS = Recipe("text", "", 64)
OTHER = Example(ids("what is red ? a dog </s>"), [*[IGNORED] * 4, *ids("a dog </s>")])


def test_runs_are_cut_where_training_begins_and_ends():
    assert runs(ROW, tokenizer()) == [("what is red ?", False), ("the cat </s>", True)]
    assert runs(ROW, tokenizer(), "|")[1] == ("the|cat|</s>", True)
    assert runs(Example(ids("the cat"), [1]), tokenizer()) == [("the cat", False)]


def test_figures():
    found = survey(Encoded([ROW, ROW, OTHER, Example(ids("the cat"), [IGNORED, ids("cat")[0]])]), tokenizer(), TEXTS)
    assert sum(count for _, count in found.lengths) == 4
    assert found.lengths[-1] == (7, 3)
    assert found.first == (("the", 2), ("a", 1), ("cat", 1))
    assert found.last == (("</s>", 3), ("cat", 1))
    assert found.duplicates == 1
    assert printable("a\x1b[31m\n\tb", "\n\t") == "a\\x1b[31m\n\tb"


def test_rows_with_labels_and_preferences_are_described_by_them():
    classes = Recipe("classification", "", 64, ("bad", "good"))
    rows = [Example(ids("the"), [1]), Example(ids("the cat"), [0]), Example(ids("the dog"), [1])]
    assert described(rows[0], classes) == [("1 tokens, label 'good'", rows[0])]
    found = survey(Encoded(rows), tokenizer(), classes)
    assert (found.first, found.labels) == ((), (("'good'", 2), ("'bad'", 1)))
    assert described(Example(ids("the cat"), [3.5]), Recipe("regression", "", 64))[0][0] == "2 tokens, label 3.5"
    both = described(joined(ROW, OTHER), Recipe("preference", "", 64))
    assert [said for said, _ in both] == ["chosen, 7 tokens, 3 trained", "rejected, 7 tokens, 3 trained"]
    assert [row.ids for _, row in both] == [ROW.ids, OTHER.ids]


def show(capsys, *words):
    assert main(["data", "show", "--model", "nano", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_rows_to_evaluate_that_are_trained_on_too_are_named(tmp_path, capsys):
    for name, texts in (("train", "abc"), ("valid", "bx"), ("test", "yz")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "p", "completion": text} for text in texts])
    shown = show(capsys, "--data", tmp_path)
    valid = tmp_path / "valid.jsonl"
    assert f"rows of {valid} that are trained on too: 1 of 2 ({valid}:1)" in shown
    assert f"rows of {tmp_path / 'test.jsonl'} that are trained on too: 0 of 2\n" in shown
    said = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    chats = write_jsonl(
        tmp_path / "chats.jsonl", [{"messages": said}, {"messages": [said[0], {**said[1], "content": "b"}]}]
    )
    other = write_jsonl(tmp_path / "other.jsonl", [{"conversations": said}])
    assert f"trained on too: 1 of 1 ({other}:1)" in show(capsys, "--data", chats, "--eval-data", other)


def test_the_command(tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    said = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "yo <i> \x1b[31m"}]
    data.write_text((json.dumps({"messages": said, "id": 3}) + "\n") * 2)
    page = tmp_path / "rows.html"
    call = ["data", "show", "--model", "nano", "--data", str(data), "--html", str(page)]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "⟦yo <i> \\x1b[31m<|end|>⟧" in shown
    assert "not used:   columns 'id' (2 rows)" in shown
    assert "template:   the plain one of lowrank" in shown
    assert "rows that stand in it once more: 1" in shown
    assert "last trained tokens: '<|end|>' 2" in shown
    assert "\x1b" not in shown
    text = page.read_text(encoding="utf-8")
    assert "<mark>yo &lt;i&gt;" in text
    assert "<i>" not in text
    assert main(call) == 2  # the page is there
    assert main([*call[:-1], str(data), "--force"]) == 2  # the data itself
    assert main([*call, "--force", "--rows", "-5"]) == 2 and "--rows -5: give how many" in capsys.readouterr().err
    assert main([*call, "--force", "--rows", "0", "--tokens"]) == 0


def test_a_wrong_call_is_one_sentence(tmp_path, capsys):
    assert main(["data", "show", "--model", "nano", "--data", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
