"""What is estimated before a weight is loaded, held against what torch's own allocator counts in a real step."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lowrank import cli
from lowrank.data.batches import collate
from lowrank.data.preference import joined, one_behind_the_other
from lowrank.data.tokens import Example
from lowrank.errors import ConfigError
from lowrank.injection.quantise import what_is_held
from lowrank.study.estimate import estimate as module
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.fitting import largest_rows
from lowrank.study.estimate.machines import GPUS, Machine, Rates, named_gpu
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adapting import adapt
from lowrank.train.evaluation import Measure
from lowrank.train.head import find_head
from lowrank.train.held import load_held
from lowrank.train.loop import Loop
from lowrank.train.losses import NextToken
from lowrank.train.metrics import FIGURES
from lowrank.train.models import load_causal
from lowrank.train.preference import PreferenceLoss
from lowrank.train.reporting import Reporter
from lowrank.train.row_attention import attend_by_rows
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded
from train_models import save_llama

CPU = torch.device("cpu")


def save_model(folder, family="Llama", vocabulary=1000, width=128, **more):
    """A random model of two blocks, without a tokenizer."""
    import transformers

    if family == "GPT2":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=4, **ends)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        shape = {"intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, hidden_size=width, **shape | more)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


class SecondStep(Reporter):
    """Counts what the allocator gives and takes in the second step, when AdamW's moments are there."""

    def __init__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def stepped(self, step):
        if step == 1:
            self.profile.__enter__()
        elif step == 2:
            self.profile.__exit__(None, None, None)

    def height(self):
        events = sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        live = most = 0
        for event in events:
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most


def loaded_as(folder, settings):
    """The model as a training has it, before it is adapted."""
    dtype = getattr(torch, settings.dtype or "float32")
    if settings.quantise:
        return load_held(Path(folder), settings, dtype, CPU, ())
    return load_causal(Path(folder), dtype)


def measured(folder, settings, pairs=False):
    """(bytes that stand, bytes beside them at the most) of a training of two steps.

    pairs: each row is a chosen and a rejected answer; other rows lie end to end, as packs do.
    """
    model = loaded_as(folder, settings)
    loaded = Loaded(model, None, CPU, 0)
    adapt(loaded, settings, None)
    head, row = find_head(model), Example([1] * settings.max_length, [1] * settings.max_length)
    loss, figures = (PreferenceLoss(head=head), "preference") if pairs else (NextToken(head), "text")
    rows = one_behind_the_other if pairs else list
    measure = Measure(lambda some: collate(rows(some), 0, CPU, True), loss, FIGURES[figures], pairs, flat=not pairs)
    examples = [joined(row, row) if pairs else row] * settings.batch_size
    assert pairs or attend_by_rows(model, measure.trained(examples[:2]), head)
    reporter = SecondStep()
    loop = Loop(model, examples, [], measure, settings, reporter)
    loop.run()
    adamw = loop.state.optimiser
    moments = [t for held in adamw.adamw.state.values() for t in held.values() if torch.is_tensor(t) and t.dim()]
    masters = [m for p, m in zip(adamw.parameters, adamw.masters, strict=True) if p is not m]
    standing = [*model.parameters(), *model.buffers(), *moments, *masters]
    held = what_is_held(model)
    scales = held.bytes - sum(p.nbytes for p in model.parameters() if not p.is_floating_point()) if held else 0
    return sum(tensor.nbytes for tensor in standing) + scales, reporter.height()


LLAMA = {"targets": "all-linear", "max_length": 128, "batch_size": 4}
HALF = {"dtype": "bfloat16"}
SHAPES = {
    "all linear": ({}, LLAMA),
    "query and value": ({}, LLAMA | {"targets": "q_proj,v_proj"}),
    "a large vocabulary": ({"vocabulary": 20_000}, LLAMA | {"rank": 2}),
    "bfloat16": ({"width": 256}, LLAMA | {"dtype": "bfloat16"}),
    "activations twice": ({"num_hidden_layers": 4}, LLAMA | {"gradient_checkpointing": True}),
    "parts of a step, shared keys": ({"num_key_value_heads": 2}, LLAMA | {"micro_batch": 2, "max_length": 256}),
    "every weight": ({}, {"full": True, "max_length": 128, "batch_size": 4}),
    "GPT-2, DoRA, a head in full": (
        {"family": "GPT2"},
        LLAMA | {"targets": "c_attn,c_fc", "rank": 64, "dora": True},
    ),
}


HELD = {
    "four bits": ({"width": 256}, LLAMA | {"quantise": "nf4"}),
    "four bits, their scales too, bfloat16": ({"width": 256}, LLAMA | {"quantise": "nf4", "double": True} | HALF),
    "eight bits": ({"width": 256}, LLAMA | {"quantise": "int8"}),
    "four bits of GPT-2": ({"family": "GPT2", "width": 256}, LLAMA | {"targets": "c_attn,c_fc", "quantise": "fp4"}),
}


MIXTURES = {
    dtype: ({"family": "Mixtral", "num_local_experts": 4}, LLAMA | {"rank": 4, "dtype": dtype})
    for dtype in ("float32", "bfloat16")
}


@pytest.mark.parametrize("dtype", MIXTURES)
def test_memory_of_experts_too(tmp_path, monkeypatch, dtype):
    """Torch's grouped product without numbers knows bfloat16 alone."""
    check_memory(tmp_path, monkeypatch, *MIXTURES[dtype])


KINDS = {
    "pairs": ({"vocabulary": 5000}, LLAMA, {"pairs": True}),
    "pairs in parts, activations twice": (
        {},
        LLAMA | {"micro_batch": 2, "gradient_checkpointing": True},
        {"pairs": True},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_memory_of_preferences_too(tmp_path, monkeypatch, name):
    check_memory(tmp_path, monkeypatch, *KINDS[name])


@pytest.mark.parametrize("name", HELD)
def test_memory_of_a_quantised_base_too(tmp_path, monkeypatch, name):
    pytest.importorskip("bitsandbytes")
    check_memory(tmp_path, monkeypatch, *HELD[name])


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_within_15_per_cent_of_what_was_measured(tmp_path, monkeypatch, name):
    check_memory(tmp_path, monkeypatch, *SHAPES[name])


def check_memory(tmp_path, monkeypatch, shape, asked, kind=MappingProxyType({})):
    monkeypatch.setattr(module, "pace_of", lambda *_: Rates(1e12, 1e11, 0.0))
    model = save_model(tmp_path / "model", **shape)
    asked = asked | {"model": model, "device": "cpu"}
    found = estimate(EstimateSettings(**asked, preferences=kind.get("pairs", False)))
    standing, beside = measured(model, TrainSettings(**asked, data="d", out="o", steps=2), **kind)
    assert found.weights + found.factors + found.optimiser == pytest.approx(standing, rel=0.01)
    ours = found.height - found.weights - found.factors - found.optimiser
    assert ours == pytest.approx(beside, rel=0.15)
    assert found.height == pytest.approx(standing + beside, rel=0.15)


def quick(monkeypatch, model, **asked):
    monkeypatch.setattr(module, "pace_of", lambda *_: Rates(1e12, 1e11, 0.0))
    return estimate(EstimateSettings(model=model, **{"device": "cpu", "max_length": 32, **asked}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("models") / "llama"))


def test_what_does_not_change_the_numbers_does_not_change_the_estimate(monkeypatch, llama):
    one = quick(monkeypatch, llama)
    for asked in ({"init": "pissa"}, {"dropout": 0.1}, {"alpha": 3}):
        other = quick(monkeypatch, llama, **asked)
        assert (other.activations, other.logits, other.trained) == (one.activations, one.logits, one.trained)
    assert quick(monkeypatch, llama, init="pissa").factors == 2 * one.factors


def test_the_time_is_that_of_the_arithmetic_or_of_the_bytes(monkeypatch, llama):
    """A machine that moves bytes in no time needs one that grows with the operations, and the other way round."""

    monkeypatch.setattr(module, "update_of", lambda *_: 0.0)

    def seconds(rates, **asked):
        monkeypatch.setattr(module, "pace_of", lambda *_: rates)
        return estimate(EstimateSettings(model=llama, device="cpu", **asked)).seconds

    sums, bytes_ = Rates(1e9, 1e30, 0.0), Rates(1e30, 1e9, 0.0)
    linear = 2 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)  # of both layers' matrices, for one token
    least = 8 * 64 * linear * 2 / 1e9  # forward, and the gradient of the inputs
    assert least < seconds(sums, max_length=64) < 2 * least
    assert seconds(sums, max_length=64) == pytest.approx(2 * seconds(sums, max_length=64, batch_size=4), rel=0.01)
    assert seconds(bytes_, max_length=64) > 1.5 * seconds(bytes_, max_length=32)


@pytest.mark.parametrize("room", [0, 9, 10, 25, 1000, 10**9])
def test_the_largest_micro_batch_is_the_last_that_fits(room):
    asked = []

    def height(rows):
        asked.append(rows)
        return 5 + 5 * rows + (rows > 20) * 7  # a line but for one step

    found = largest_rows(height, room)
    wanted = max((rows for rows in range(1, 4097) if height(rows) <= room), default=0)
    assert found <= wanted
    assert found >= wanted - max(1, wanted // 50)
    assert found == wanted or wanted > 2


def test_machines():
    assert named_gpu("rtx 4090") == named_gpu("NVIDIA RTX-4090") == "RTX-4090"
    with pytest.raises(ConfigError, match=r"--gpu 9000: not known, only T4, V100-32GB"):
        named_gpu("9000")
    assert all(0 < Machine(name, "gpu", memory * 10**9).room < memory * 10**9 for name, (memory, *_) in GPUS.items())


def test_the_command(monkeypatch, capsys, llama):
    line = ["estimate", "--model", llama, "--targets", "all-linear", "--gpu", "t4", "--max-length", "64"]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == {"name": "T4", "kind": "gpu", "memory": 16 * 10**9}
    assert found["dtype"] == "bfloat16"
    assert found["fits"] and found["largest"] > 8
    assert cli.main([*line, "--micro-batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "a step:       8 rows of 64 tokens in parts of 2" in out
    for kind in ("weights", "factors", "gradients", "optimiser", "activations", "logits"):
        assert f"\n{kind}: " in out


def test_rows_of_trained_tokens_are_counted(capsys, llama):
    def trained(*more):
        assert cli.main(["estimate", "--model", llama, "--gpu", "t4", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["trained"]

    model = load_causal(Path(llama), torch.float32)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert trained("--trainable-tokens", "cat,7") - trained() == len(tables) * 2 * model.config.hidden_size


WRONG = [
    ("--gpu t4 --device cpu", "give one of them"),
    ("--micro-batch 9", "micro_batch, 9, cannot be more than batch_size, 8"),
    ("--max-length 65", "--max-length 65: this model holds 64 tokens"),
    ("--batch-size 1000000000000", "are more than any machine holds: give fewer by --micro-batch"),
    ("--full --quantise nf4", "full trains every weight, and shard and quantise are for frozen ones"),
    ("--full --shard --processes 2", "full trains every weight, and shard and quantise are for frozen ones"),
    ("--shard", "say how many, --processes N"),
    ("--shard --processes 2 --quantise nf4", "quantised ones have not: leave one of both out"),
    ("--init loftq", "say quantise too"),
    ("--targets q_prj", "'q_prj' matches no module"),
    ("--trainable-tokens dodo", "this tokenizer has no such token"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_calls(monkeypatch, capsys, llama, flags, message):
    assert cli.main(["estimate", "--model", llama, *flags.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_model_that_comes_quantised_or_answers_no_tokens_is_refused(tmp_path, capsys, llama):
    (tmp_path / "q").mkdir()
    config = json.loads((Path(llama) / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, "comes quantised"),
        ({"vocab_size": "x"}, "its config is none that transformers reads"),
        ({"intermediate_size": -1}, "its config makes no model"),
        ({"num_hidden_layers": 2**31}, "its config says that it has 2147483648 layers, beyond any model"),
        ({"architectures": 1}, "names no architecture"),
        ({"architectures": ["pipeline"]}, "names no architecture"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no head over a vocabulary"),
    ):
        (tmp_path / "q" / "config.json").write_text(json.dumps(config | changes))
        assert cli.main(["estimate", "--model", str(tmp_path / "q")]) == 2
        assert message in capsys.readouterr().err
