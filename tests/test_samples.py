"""`--sample-prompts`: what is asked, that each evaluation tells the answers, and that nothing of a training sees it."""

import io
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from chat_models import save_chain
from chat_templates import HEADERS
from lowrank import cli, train
from lowrank.cli.console import RunDisplay
from lowrank.data.prompts import MOST, MOST_BYTES, read_prompts
from lowrank.errors import ConfigError, DataError, OutputError
from lowrank.train.reporting import Reporter, Sample
from lowrank.train.settings import GenerateSettings
from lowrank.train.sinks.sink import ToSink
from resumed_runs import kill, made, make_home, settings
from train_models import write_jsonl

END = "<|eot|>"
ASKED = ("the red", "what is the cat ?")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def evaluated(home, out, **changes):
    return settings(home, out, **{"eval_data": str(home / "unseen.jsonl"), "eval_every": 3, "dropout": 0.1, **changes})


def samples_of(out):
    """{step: [(prompt, answer)]} of a run's log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["samples"] for line in lines if "samples" in line}
    return {step: [(one["prompt"], one["answer"]) for one in told] for step, told in found.items()}


PACKED = {"pack": True, "max_length": 40, "batch_size": 2}  # whose attention is another one


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"quantise": "nf4"}, PACKED])
def test_a_training_does_not_see_them(home, tmp_path, changes):
    if "quantise" in changes:
        pytest.importorskip("bitsandbytes")
    train.run(evaluated(home, tmp_path / "without", **changes))
    train.run(evaluated(home, tmp_path / "with", sample_prompts=ASKED, **changes))
    one, other = made(tmp_path / "without"), made(tmp_path / "with")
    other["log"] = [line for line in other["log"] if "samples" not in line]
    assert one == other
    assert (tmp_path / "without" / "README.md").read_bytes() == (tmp_path / "with" / "README.md").read_bytes()


def test_each_evaluation_tells_what_generate_would_write(home, tmp_path):
    """At the end, of the adapter that is saved; before the first step, of the model as it was."""
    out = tmp_path / "run"
    train.run(evaluated(home, out, sample_prompts=ASKED, sample_tokens=5, lr=0.1))
    found = samples_of(out)
    assert list(found) == [0, 3, 6, 9]
    for step, adapter in ((0, None), (9, str(out))):
        for prompt, answer in found[step]:
            asked = {"model": str(home / "llama"), "adapter": adapter, "prompt": prompt, "max_new_tokens": 5}
            asked |= {"template": "{prompt}\n"} if adapter is None else {}
            assert train.generate(GenerateSettings(**asked, device="cpu")).strip() == answer
    assert [prompt for prompt, _ in found[9]] == list(ASKED)
    assert found[0] != found[9]
    assert all(len(answer.split()) <= 5 for told in found.values() for _, answer in told)


def test_a_run_that_goes_on_tells_the_same(home, tmp_path):
    train.run(evaluated(home, tmp_path / "whole", sample_prompts=ASKED))
    kill(evaluated(home, tmp_path / "killed", sample_prompts=ASKED), 5)
    train.resume(tmp_path / "killed")
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def test_others_may_be_asked_when_a_run_goes_on(home, tmp_path):
    train.run(evaluated(home, tmp_path / "whole"))
    kill(evaluated(home, tmp_path / "killed", sample_prompts=ASKED), 5)
    train.resume(tmp_path / "killed", sample_prompts=["red"], sample_tokens=3)
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [len(told) for told in samples_of(tmp_path / "killed").values()] == [2, 2, 1, 1]


def test_a_chat_is_asked_in_its_template_and_ends_where_that_says(tmp_path):
    """Behind "assistant\\n\\n" the model says hi, ends its turn, and would go on for ever."""
    save_chain(tmp_path / "llama", HEADERS, "\n" + "hi" + END + "!", "?")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    first = {"role": "system", "content": "be kind"}
    write_jsonl(tmp_path / "ask.jsonl", [{"messages": [first, *turns, *turns]}, {"prompt": "who?", "other": 1}])
    asked = {"sample_prompts": [str(tmp_path / "ask.jsonl"), "there"], "sample_tokens": 9, "lr": 1e-8, "steps": 1}
    train.run(settings(tmp_path, tmp_path / "run", eval_split=0.3, batch_size=2, **asked))
    assert set(map(tuple, samples_of(tmp_path / "run").values())) == {(("a", "hi"), ("who?", "hi"), ("there", "hi"))}


def test_what_a_prompt_may_be(tmp_path):
    text = tmp_path / "ask.txt"
    text.write_bytes("\ufefffirst \r\n\n  \nsecond\n".encode())
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = write_jsonl(tmp_path / "ask.jsonl", [{"messages": turns}, {"prompt": "c"}, {"prompt": turns[:1]}])
    found = read_prompts([str(text), "on its own, with a comma", str(rows), "x" * 5000])
    assert [one.text for one in found] == ["first ", "second", "on its own, with a comma", "a", "c", "a", "x" * 5000]
    assert [one.place for one in found[:2]] == [f"{text}:1", f"{text}:4"]
    assert len(found[2].place) < 100


REFUSED = {
    "missing.txt": (None, r"missing\.txt: No such file"),
    "missing.jsonl": (None, r"missing\.jsonl: No such file"),
    "empty.txt": (" \n", r"empty\.txt: no prompt is in it"),
    "latin.txt": (b"\xe9\n", r"latin\.txt: .*can't decode"),
    "bad.jsonl": ("{\n", r"bad\.jsonl:1: not JSON"),
    "text.jsonl": ('{"text": "a"}\n', r"text\.jsonl:1: a prompt is an object with `prompt`"),
    "said.jsonl": ('{"messages": [{"role": "assistant", "content": "a"}]}\n', r"said\.jsonl:1: it asks nothing"),
    "turn.jsonl": ('{"prompt": "a"}\n{"messages": [{"role": "x"}]}\n', r"turn\.jsonl:2: field 'messages'\[0\]"),
    "many.txt": ("a\n" * (MOST + 1), rf"{MOST + 1} prompts, and at most {MOST}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_ask_nothing_are_a_sentence(name, tmp_path):
    content, said = REFUSED[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        read_prompts([str(path)])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_file_of_prompts_is_not_waited_for(tmp_path):
    for name in ("pipe.txt", "pipe.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=rf"--sample-prompts: .*{name} is no regular file but a pipe"):
            read_prompts([str(tmp_path / name)])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt is no regular file but a folder"):
        read_prompts([str(tmp_path / "folder.txt")])
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(DataError, match=r"huge\.txt has 16,777,217 bytes, and at most 16,777,216 can be meant"):
        read_prompts([str(tmp_path / "huge.txt")])


def test_what_cannot_be_asked_is_said_before_the_first_step(home, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError, match=r"the prompt is 201 tokens long, and this model holds 64; shorten it"):
        train.run(evaluated(home, out, sample_prompts="red " * 200))
    turns = write_jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": one} for one in "ab"]}])
    with pytest.raises(DataError, match=r"t\.jsonl:1: turns are for a training on chats"):
        train.run(evaluated(home, out, sample_prompts=str(turns)))
    labels = {"model": str(home / "bert"), "data": str(home / "labels.jsonl"), "targets": None, "eval_data": None}
    with pytest.raises(ConfigError, match=r"--sample-prompts: .* rows of classification, .* writes no answers"):
        train.run(evaluated(home, out, **labels, eval_split=0.3, sample_prompts="red"))
    with pytest.raises(ValueError, match="sample_prompts need eval_data"):
        settings(home, out, sample_prompts="red")
    with pytest.raises(ValueError, match="sample_tokens is of the answers to sample_prompts"):
        evaluated(home, out, sample_tokens=3)
    assert not out.exists()
    prompts = out / "ask.txt"
    out.mkdir()
    prompts.write_text("red\n")
    with pytest.raises(OutputError, match=r"holds the file of prompts"):
        train.run(evaluated(home, out, sample_prompts=str(prompts)))


def test_the_command_takes_several_and_shows_the_answers(home, tmp_path, capsys):
    out = tmp_path / "run"
    line = ["train", "--model", str(home / "llama"), "--data", str(home / "rows.jsonl"), "--out", str(out)]
    line += ["--eval-split", "0.3", "--steps", "1", "--device", "cpu", "--sample-tokens", "2"]
    assert cli.main([*line, "--sample-prompts", "the red", "--sample-prompts", "cat, dog"]) == 0
    told = capsys.readouterr().out
    assert "samples:    answers of up to 2 tokens at each evaluation" in told
    for step, answers in samples_of(out).items():
        for prompt, answer in answers:
            assert f"\nstep {step}/1  {prompt} → {answer}\n" in told


def test_answers_are_shown_as_text_in_their_place():
    stream = io.StringIO()
    with RunDisplay() as display:
        display.console = Console(file=stream, force_terminal=True, width=100)
        display.sampled(3, [Sample("a [bold]\x1b[2J", "one\ntwo" + "." * 1000)])
    text = stream.getvalue()
    assert r"a [bold]\x1b[2J → one\ntwo..." in text
    assert len(text) < 600


SINKS = {
    "tensorboard": ("torch.utils.tensorboard", ("eval/samples", "    a\n    → b\n\n    c\n    → d", 4)),
    "wandb": ("wandb", ({"eval/samples": "a\n→ b\n\nc\n→ d"},)),
    "trackio": ("trackio", ({"eval/samples": "a\n→ b\n\nc\n→ d"},)),
    "mlflow": ("mlflow", ("a\n→ b\n\nc\n→ d", "samples/step-4.txt")),
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks_are_given_them(name, tmp_path, monkeypatch):
    module, wanted = SINKS[name]
    calls = []
    note = lambda *args, **_named: calls.append(args)  # noqa: E731
    inner = SimpleNamespace(log=note, add_text=note, flush=lambda: None)
    fake = ModuleType(module)
    for function in ("init", "SummaryWriter"):
        setattr(fake, function, lambda *_, **_named: inner)
    for function in ("log", "log_text"):
        setattr(fake, function, note)
    for function in ("set_experiment", "start_run", "log_params"):
        setattr(fake, function, lambda *_, **_named: None)
    monkeypatch.setitem(sys.modules, module, fake)
    opening = __import__(f"lowrank.train.sinks.{name}", fromlist=["open_sink"]).open_sink
    sink: Reporter = ToSink(name, lambda: opening(tmp_path, {}, None))
    sink.sampled(4, [Sample("a", "b"), Sample("c", "d")])
    assert calls == [wanted]
