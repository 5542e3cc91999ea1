"""Talking with a model: in its template, turn by turn, each answer ended by the template's own end of a turn."""

import io
import json
import sys
from dataclasses import replace

import pytest

from chat_models import save_chain
from chat_templates import CHANNELS, FAMILIES, HEADERS, INSTRUCTED, byte_tokenizer
from lowrank import train
from lowrank.cli import chat as cli_chat
from lowrank.cli import main
from lowrank.cli.signals import Ended
from lowrank.data.chat.ending import end_ids
from lowrank.data.chat.template import ChatTemplate
from lowrank.data.chat.thought import Hearing, frame_of
from lowrank.data.recipe import Recipe
from lowrank.errors import ConfigError, DataError, LowrankWarning
from lowrank.train.settings import EvalSettings, GenerateSettings
from lowrank.train.talk import Talk

END = "<|eot|>"
SAID = ("\n" + "hi" + END + "!", "?")  # behind "assistant\n\n" it says hi, ends its turn, and would go on for ever


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_chain(tmp_path_factory.mktemp("chat") / "model", HEADERS, *SAID))


def asked(model, **more):
    return GenerateSettings(**({"model": model, "device": "cpu", "max_new_tokens": 9, "chat": True} | more))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_an_answer_is_the_templates(name):
    template, _, end = FAMILIES[name]
    tokenizer = byte_tokenizer(template)
    assert end_ids(ChatTemplate(template, tokenizer)) == (tokenizer.convert_tokens_to_ids(end),)


def test_an_answer_with_calls_may_end_otherwise_and_one_in_plain_words_has_no_end():
    tokenizer = byte_tokenizer()
    calling = CHANNELS.replace("'<|return|>'", "('<turn>' if m.tool_calls else '<|return|>')")
    ids = tuple(tokenizer.convert_tokens_to_ids(end) for end in ("<|return|>", "<turn>"))
    assert end_ids(ChatTemplate(calling, tokenizer)) == ids
    assert end_ids(ChatTemplate(HEADERS.replace(END, "###"), tokenizer)) == ()
    assert end_ids(ChatTemplate("{{ raise_exception('no') }}", tokenizer)) == ()


def test_turns_are_written_whole_by_the_template(model, monkeypatch):
    talk = Talk(asked(model, system="be kind"))
    assert [talk.answer("a"), talk.answer("b")] == ["hi", "hi"]
    turns = [("system", "be kind"), ("user", "a"), ("assistant", "hi"), ("user", "b"), ("assistant", "hi")]
    assert talk.messages == [{"role": role, "content": text} for role, text in turns]
    seen = []
    monkeypatch.setattr(type(talk.writer), "write", lambda _self, ids, _on_text: seen.append(ids) or "x")
    talk.answer("c")
    messages = [*talk.messages[:5], {"role": "user", "content": "c"}]
    served = byte_tokenizer(HEADERS).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert seen == [served]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "be kind"}]


THOUGHTFUL = {
    "channels": ("<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"),
    "thinking": "<think>\n{}\n</think>\n\n{}<|im_end|>",
}


@pytest.mark.parametrize("name", THOUGHTFUL)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 400])
def test_an_answer_is_taken_apart_as_its_template_puts_it_together(name, size):
    """However it comes in pieces, no mark of the template is shown, and what was shown is never taken back."""
    template, begin, end = FAMILIES[name]
    frame = frame_of(ChatTemplate(template, byte_tokenizer(template)))
    assert frame is not None
    whole = THOUGHTFUL[name].format("one < two\nthree", "four </ five")
    for text, parts in [
        (whole, ("one < two\nthree", "four </ five")),
        (begin + "four" + end, ("", "four")),
        (whole[: whole.index("three")], ("one < two", "")),
        ("plain words", ("", "plain words")),
    ]:
        shown = []
        heard = Hearing(frame, shown.append)
        for at in range(0, len(text), size):
            heard(text[at : at + size])
        heard.end()
        assert heard.apart() == parts
        assert "".join(shown).rstrip() == "\n\n".join(filter(None, parts))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(THOUGHTFUL)))
def test_a_template_that_writes_no_thoughts_frames_nothing(name):
    assert frame_of(ChatTemplate(FAMILIES[name][0], byte_tokenizer(FAMILIES[name][0]))) is None


def test_a_talk_in_channels_shows_words_and_remembers_what_was_said(tmp_path):
    said = "assistant<|channel|>final<|message|>yo<|return|>"  # behind "<|start|>assistant", token by token
    talk = Talk(asked(str(save_chain(tmp_path / "model", CHANNELS, said[8:])), max_new_tokens=20))
    shown = []
    assert talk.answer("a", shown.append) == "yo"
    assert "".join(shown) == "yo"
    assert talk.messages[-1] == {"role": "assistant", "content": "yo"}
    thought = THOUGHTFUL["channels"].format("hm", "yo")
    talk.writer.write(talk.writer.ids(talk.messages), None)
    heard = talk.writer.hearing(None)
    heard(thought)
    talk._remember(talk.messages, heard)
    assert talk.messages[-1] == {"role": "assistant", "content": "yo", "reasoning_content": "hm"}


def test_the_oldest_exchanges_are_forgotten_where_the_model_is_full(tmp_path):
    talk = Talk(asked(str(save_chain(tmp_path / "small", HEADERS, *SAID, positions=72)), system="s"))
    talk.answer("first")
    with pytest.warns(LowrankWarning, match="holds 72 tokens: the oldest 1 of the exchanges were forgotten"):
        talk.answer("second")
    assert [turn["content"] for turn in talk.messages] == ["s", "second", "hi"]
    with pytest.raises(ConfigError, match=r"this is \d+ tokens long, and this model holds 72; say less"):
        talk.answer("x" * 80)
    assert [turn["content"] for turn in talk.messages] == ["s", "second", "hi"]


def test_a_prompt_of_a_chat_ends_as_the_template_does(model, tmp_path):
    other = tmp_path / "mine.jinja"
    other.write_text(HEADERS.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"))
    assert train.generate(asked(model, chat=False, prompt="a", chat_template=str(other))) == "hi"
    assert train.generate(asked(model, chat=False, prompt="a\n")) == "hi!!!!!!"  # a bare prompt knows no turns
    with pytest.raises(ConfigError, match="--system is said in a chat template"):
        train.generate(asked(model, chat=False, prompt="a", system="be kind"))
    with pytest.raises(ConfigError, match="--prompt is needed"):
        train.generate(asked(model))


def test_answers_to_be_scored_end_there_too(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hi"}]
    rows.write_text(json.dumps({"messages": said}) + "\n")
    found = train.evaluate(EvalSettings(model=model, data=str(rows), device="cpu", metrics="f1"))
    assert found.scores.figures["f1"] == 1.0
    assert found.scores.figures["exact_match"] == 1.0


def adapter(folder, recipe):
    """A folder that says how it was trained, and an adapter that changes no answer: the chain has no attention."""
    from merge_disk_models import linear_factors, write_adapter

    path = "model.layers.0.self_attn.q_proj"
    size = len(byte_tokenizer()) + len(byte_tokenizer()) % 2
    write_adapter(folder, linear_factors(path, size, size))
    (folder / "run.json").write_text(json.dumps({"recipe": recipe.as_json()}))
    return str(folder)


TRAINED = Recipe("chat", "{prompt}\n", 64, chat_template=HEADERS, template_of="the tokenizer's own")


def test_the_template_trained_with_holds_and_another_of_the_tokenizer_is_noticed(model, tmp_path, monkeypatch):
    mine = adapter(tmp_path / "mine", TRAINED)
    Talk(asked(model, adapter=mine))  # nothing to say
    foreign = adapter(tmp_path / "other", replace(TRAINED, chat_template=INSTRUCTED))
    for call in ({}, {"chat": False, "prompt": "a"}):
        with pytest.warns(LowrankWarning, match="is not the one the adapter was trained with"):
            writer = train.generation.open_writer(asked(model, adapter=foreign, **call))
        assert writer.recipe.chat_template == INSTRUCTED
    given = tmp_path / "given.jinja"
    given.write_text(CHANNELS)
    assert Talk(asked(model, adapter=foreign, chat_template=str(given))).writer.recipe.chat_template == CHANNELS
    plain = adapter(tmp_path / "plain", Recipe("completion", "{prompt} ->", 64))
    with pytest.warns(LowrankWarning, match="was trained on rows of completion, not on chats"):
        talk = Talk(asked(model, adapter=plain))
    assert talk.answer("a") == "hi"


def test_a_template_that_is_none_is_said_before_anyone_waits(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank.train.generation.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"--chat-template none\.jinja: No such file"):
        Talk(asked(model, chat_template="none.jinja"))
    monkeypatch.undo()
    (tmp_path / "bad.jinja").write_text("{% if")
    with pytest.raises(DataError, match="the prompt: the chat template refuses it"):
        Talk(asked(model, chat_template=str(tmp_path / "bad.jinja")))
    (tmp_path / "none.jinja").write_text("{# nothing #}")
    with pytest.raises(DataError, match="the prompt: the chat template writes nothing for it"):
        Talk(asked(model, chat_template=str(tmp_path / "none.jinja")))
    (tmp_path / "empty.jinja").write_text("")
    with pytest.raises(ConfigError, match=r"--chat-template .*empty\.jinja is empty: it would write nothing"):
        Talk(asked(model, chat_template=str(tmp_path / "empty.jinja")))


def piped(monkeypatch, capsys, text, *more):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    status = main(["generate", *more, "--chat", "--device", "cpu", "--max-new-tokens", "9"])
    return status, *capsys.readouterr()


def test_a_pipe_is_answered_line_by_line(model, monkeypatch, capsys):
    heard = []
    answer = Talk.answer
    monkeypatch.setattr(
        Talk, "answer", lambda self, text, on: heard.append((len(self.messages), text)) or answer(self, text, on)
    )
    text = "\ufeffone\n\n  two\n/clear\nth\xe9\n/exit\nfour\n".encode() + b"\xff"
    assert piped(monkeypatch, capsys, text, "--model", model) == (0, "hi\n" * 3, "")
    assert heard == [(0, "one"), (2, "two"), (0, "th\xe9")]
    status, out, err = piped(monkeypatch, capsys, b"\xff\n" + b"x" * 999, "--model", model)
    assert (status, out, err.count("\n")) == (2, "hi\n", 1)  # a script must hear of it
    assert "say less" in err


def typed(monkeypatch, *lines):
    left = iter(lines)

    def type_one(_prompt):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_one)
    monkeypatch.setattr(cli_chat.sys, "stdin", io.StringIO())
    monkeypatch.setattr(cli_chat.sys.stdin, "isatty", lambda: True)


def test_on_a_terminal_an_error_or_ctrl_c_ends_a_turn_and_not_the_talk(model, monkeypatch, capsys):
    answer = Talk.answer

    def interrupted(self, text, on_text):
        if text != "stop":
            return answer(self, text, on_text)
        on_text("wai")
        raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "answer", interrupted)
    typed(monkeypatch, "a", "x" * 999, "stop", "b")
    cli_chat.converse(asked(model))
    out, err = capsys.readouterr()
    assert out == "hi\nwai\nhi\n\n"
    assert "lowrank: error: this is" in err
    typed(monkeypatch, KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt(), "b")
    with pytest.raises(KeyboardInterrupt):  # the second of two that follow each other; one alone came a moment too late
        cli_chat.converse(asked(model))
    assert capsys.readouterr().out == "\nhi\n\n"
    typed(monkeypatch, Ended(15), "a")
    with pytest.raises(Ended):
        cli_chat.converse(asked(model))


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(model, monkeypatch):
    talk = Talk(asked(model))

    def write(_self, _ids, on_text):
        on_text("so f")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(talk.writer), "write", write)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("a")
    assert talk.messages[-1] == {"role": "assistant", "content": "so f"}
