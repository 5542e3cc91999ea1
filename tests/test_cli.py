"""The command line: exit statuses, sentences on stderr, help, streams. In one process but where that cannot be."""

import json
import os
import re
import subprocess
import sys

import pytest

from lowrank import cli
from train_models import completion_rows, save_llama, write_jsonl

SENTENCE = "lowrank: error: "


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    save_llama(home / "llama")
    write_jsonl(home / "skill.jsonl", completion_rows(30))
    write_jsonl(home / "odd.jsonl", [{"mr": "a", "ref": "b"}])
    (home / "twice.yaml").write_text("rank: 4\nrank: 5\n")
    (home / "list.yaml").write_text("- rank\n")
    (home / "types.yaml").write_text("model: a\ndata: b\nout: c\ntargets: {}\nalpha_pattern: {q_proj: -3}\n")
    (home / "deep.yaml").write_text("[" * 5000)
    (home / "peft.yaml").write_text("lora_alpha: 8\nrnk: 4\n")
    return home


@pytest.fixture
def here(home, monkeypatch):
    """The folder of the models and data is the working folder, so messages are short and known."""
    monkeypatch.chdir(home)
    return home


def call(capsys, line):
    """(status, stdout, stderr) of one command line."""
    status = cli.main(line.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


GIVEN = "train --model llama --data skill.jsonl --out x"
WRONG = [
    ("trian", "there is no command 'trian', did you mean `lowrank train`?"),
    ("finetune --model nano", "did you mean `lowrank train`?"),
    ("frobnicate", "there is no command 'frobnicate', only demo, train, data"),
    ("train --rnk 4", "`lowrank train` has no --rnk, did you mean --rank?"),
    ("train --foo 4", "`lowrank train` has no --foo; `lowrank train --help` lists what there is"),
    ("merge --dat x", "`lowrank merge` has no --dat; `lowrank merge --help`"),
    ("merge --adapters a", "`lowrank merge` has no --adapters: here it is called --adapter"),
    ("train --lora-r=8", "`lowrank train` has no --lora-r: here it is called --rank"),
    ("merge", "--model is needed; see `lowrank merge --help`"),
    ("train --rank", "--rank requires an argument"),
    ("train data.jsonl", "data.jsonl: every value needs its flag in front"),
    ("train --lr fast", "--lr: input should be a valid number"),
    ("train --lr 1 --lr 2", "--lr specified multiple times"),
    ("train --data skill.jsonl", "--model is needed"),
    ("train --model none --data skill.jsonl --out x", "model none: there is no such folder"),
    ("train --model llama --data none.jsonl --out x", "none.jsonl: No such file"),
    (
        "train --model llama --data odd.jsonl --out x",
        "odd.jsonl:1: none of messages, conversations, prompt + completion",
    ),
    ("train --model llama --data odd.jsonl --prompt-column MR --out x", "no column 'MR'"),
    ("train --model llama --data skill.jsonl --out .", ". holds the base model: give another place"),
    ("train --model llama --data skill.jsonl --out x --rank 0", "r must be a whole number of at least 1, not 0"),
    ("train --model llama --data skill.jsonl --out x --targets q_prj", "'q_prj' matches no module"),
    ("train --config none.yaml", "config none.yaml: No such file"),
    ("train --config /dev/null", "config /dev/null is no file"),
    ("train --config deep.yaml", "config deep.yaml is nested too deep"),
    ("train --config twice.yaml", "config twice.yaml is not YAML: 'rank' stands there twice"),
    ("train --config list.yaml", "config list.yaml must hold lines of `name: value`, not one list"),
    ("train --config types.yaml", "--targets: input should be a valid string, not {}; --alpha-pattern: input should"),
    ("train --config peft.yaml", "'lora_alpha' is no setting: here it is called 'alpha'; 'rnk' is no setting, did you"),
    (f"{GIVEN} --init pissa_niter_99999999999", "pissa_niter_N with N up to"),
    (f"{GIVEN} --epochs 1e300", "--epochs: input should be less than or equal to 1000000"),
    (f"{GIVEN} --device mps", "--device mps: torch has no such device here, only cpu"),
    (f"{GIVEN} --device meta", "--device meta: torch has no such device here, only cpu"),
    (f"{GIVEN} --device cpu:7", "--device cpu:7: torch has no such device here, only cpu"),
    (f"{GIVEN} --batch-size 2 --micro-batch 3", "so 3 cannot be more than batch_size, 2"),
    (f"{GIVEN} --alpha -3", "--alpha: input should be greater than 0"),
    (f"{GIVEN} --rank-pattern up_proj:3", "--rank-pattern: give NAME=VALUE, several with commas, not 'up_proj:3'"),
    (f"{GIVEN} --rank-pattern up_prj=3", "rank_pattern: 'up_prj' matches no target"),
    (
        f"{GIVEN} --rank-pattern.a 4 --rank-pattern.a.b=3",
        "--rank-pattern.a and --rank-pattern.a.b: give both as --rank",
    ),
    ("rank --adapter x --out=", "--out is empty: give a path"),
    ("doctor --model none", "model none: there is no such folder"),
    ("doctor --rank 4", "--rank is about the layers of a model: give --model too"),
    ("doctor --model nano --tokens 99999999999", "--tokens 99999999999: a batch has at least one token, and at most"),
    ("generate --model llama --prompt cat --temperature 1e-45", "0 is greedy, 0.001 almost"),
    ("generate --model llama --prompt caf\udce9", "--prompt: holds a byte that is not UTF-8"),
    ("generate --model llama --prompt cat --template \udce9{prompt}", "--template: holds a byte that is not UTF-8"),
    ("generate --model llama --prompt " + "cat+" * 100, "--prompt is"),
    ("eval --model llama", "--data is needed"),
    ("eval --model llama --data skill.jsonl --adapter none", "none"),
    ("generate --model llama", "--prompt is needed"),
    ("generate --model llama --prompt cat --chat", "leave prompt out, or chat"),
    ("generate --model llama --chat --template {prompt}", "a chat has its chat template"),
    ("generate --model llama --prompt cat --system kind", "--system is said in a chat template"),
    ("generate --model llama --chat --chat-template none.jinja", "--chat-template none.jinja: No such file"),
    ("generate --model llama --prompt cat --top-p 2", "--top-p"),
    ("generate --model llama --prompt cat --template x", "{prompt} once"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_call_is_one_sentence_and_status_2(here, capsys, line, message):
    before = sorted(os.listdir())
    status = cli.main([word.replace("+", " ") for word in line.split()])
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith(SENTENCE)
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert len(err) < 400
    assert sorted(os.listdir()) == before


NAMES_OF_OTHERS = {
    "train": "learning-rate output-dir iters lora-r lora-alpha num-train-epochs per-device-train-batch-size "
    "max-seq-length target-modules early-stopping-patience model-name-or-path dataset adapter-path "
    "val-batches steps-per-eval grad-checkpoint lora_rank max_grad_norm num-layers torch-dtype cutoff-len "
    "steps-per-report lr-scheduler-type",
    "eval": "adapter-path dataset model-id val-batches max-seq-length per-device-eval-batch-size",
    "generate": "max-tokens base-model peft-model",
    "merge": "save-path adapters base-model",
}


@pytest.mark.parametrize(
    ("command", "name"), [(c, name) for c, names in NAMES_OF_OTHERS.items() for name in names.split()]
)
def test_what_other_programs_call_a_flag_is_told(capsys, command, name):
    status, _, err = call(capsys, f"{command} --{name} 3")
    assert status == 2
    assert f"`lowrank {command}` has no --{name}: here it is called --" in err


def test_the_table_of_other_names_holds_none_of_ours():
    from lowrank.train.foreign_names import FOREIGN
    from lowrank.train.settings import EvalSettings, GenerateSettings, TrainSettings

    ours = {name for kind in (TrainSettings, EvalSettings, GenerateSettings) for name in kind.model_fields}
    assert not ours & FOREIGN.keys()


def test_train_eval_generate(here, capsys, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "c.yaml").write_text("targets: all-linear\nlr: 2e-2\nsteps: 99\n")
    line = f"train --config {tmp_path}/c.yaml --model llama --data skill.jsonl --out {out} --epochs 20 --batch-size 16"
    status = cli.main([*line.split(), "--eval-split", "0.1", "--template", "{prompt} ->", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert status == 0
    assert "trained parameters" in shown
    assert "step 40/40" in shown
    assert f"saved to {out}" in shown

    evaluation = f"eval --model llama --adapter {out} --data skill.jsonl --device cpu"
    status, shown, _ = call(capsys, f"{evaluation} --rows 20 --json")
    figures = json.loads(shown)
    assert (status, figures["rows"], figures["kind"]) == (0, 20, "completion")
    assert figures["loss"] < 1.0
    status, shown, _ = call(capsys, evaluation)
    assert "loss:" in shown
    assert "rows:         30" in shown

    asked = f"generate --model llama --adapter {out} --device cpu --prompt"
    assert cli.main([*asked.split(), "what is the hat blue ?"]) == 0
    assert capsys.readouterr().out == "the blue hat\n"


def test_help(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    for name, text in cli.COMMANDS.items():
        assert f" {name} " in out
        assert text[:30] in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(capsys, name):
    status, out, _ = call(capsys, f"{name} --help")
    assert status == 0
    assert cli.COMMANDS[name][:30] in out
    assert f"lowrank {name}" in re.split(r"\nExamples?[^:\n]*:\n", out)[1]
    assert all(len(line) <= 80 for line in out.splitlines())


def test_version(capsys):
    import lowrank

    assert call(capsys, "--version")[:2] == (0, f"{lowrank.__version__}\n")


def test_interrupted(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_answer", interrupt)
    assert call(capsys, "train") == (130, "", "lowrank: interrupted\n")


def test_disk_full_is_a_sentence(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device", "log.jsonl")

    monkeypatch.setattr(cli, "_answer", full)
    assert call(capsys, "train") == (2, "", "lowrank: error: log.jsonl: No space left on device\n")


def test_our_warnings_are_lines_and_others_stay(monkeypatch, capsys):
    import warnings

    from lowrank.errors import LowrankWarning

    def warn(_):
        for _ in range(2):
            warnings.warn("watch out", LowrankWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_answer", warn)
    assert call(capsys, "train") == (0, "", "lowrank: warning: watch out\n" * 2)


def test_help_imports_no_torch_and_a_closed_pipe_is_quiet():
    code = """
import sys
from lowrank.cli import main
assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
loaded = {"torch", "transformers", "matplotlib", "pyarrow", "peft"} & set(sys.modules)
assert not loaded, loaded
import os
read, write = os.pipe()
os.dup2(write, 1)
os.close(read), os.close(write)
from lowrank import cli
cli._answer = lambda _: print("a line for nobody")
sys.exit(main(["eval"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lowrank", "no-such"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(SENTENCE)
