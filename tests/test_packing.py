"""Laws of packing: every token once, no row sees another, loss and gradients those of the unpacked rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import shrink
from lowrank import train
from lowrank.data.batches import collate, epoch_order
from lowrank.data.examples import IGNORED, Encoded, Example
from lowrank.data.packing import best_fit, end_to_end, pack, parts
from lowrank.errors import ConfigError
from lowrank.train.evaluation import Measure
from lowrank.train.head import find_head
from lowrank.train.loop import Loop
from lowrank.train.losses import NextToken
from lowrank.train.metrics import FIGURES
from lowrank.train.packing import apart, check_apart
from lowrank.train.reporting import Reporter
from lowrank.train.settings import LoopSettings, TrainSettings
from lowrank.train.tried_rows import has_window, tried_rows
from test_train_loop import adapted, examples, llama, trained  # noqa: F401
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl

CPU = torch.device("cpu")
ROOM = 24
APART = ["llama", "qwen2", "gemma3_text", "mixtral", "gpt2"]
LEAKING = ["qwen3_next", "mamba", "bloom"]


def measure(model):
    loss = NextToken(find_head(model))
    return Measure(lambda rows: collate(rows, 0, CPU, True), loss, FIGURES["completion"])


def rows_of(*sizes, vocabulary=64):
    torch.manual_seed(3)
    found = [torch.randint(3, vocabulary, (size,)).tolist() for size in sizes]
    return [Example(ids, [IGNORED, *ids[1:]]) for ids in found]


def causal(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = shrink(AutoConfig.for_model(model_type))
    if model_type == "gemma3_text":
        config.sliding_window, config.layer_types = 4, ["sliding_attention", "full_attention"]
    if model_type == "qwen3_next":
        config.layer_types = ["linear_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_every_row_is_in_one_pack_and_no_pack_is_longer_than_allowed(lengths, room):
    packs = best_fit(lengths, room)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in members) for members in packs]
    assert all(0 < size <= room for size in sizes)
    assert sum(size <= room // 2 for size in sizes) <= 1  # two of these would have been one
    assert list(packs) == list(best_fit(lengths, room))


def test_best_fit_takes_the_fullest_pack_that_has_room():
    assert list(best_fit([5, 6, 4, 3, 2], 10)) == [[1, 2], [0, 3, 4]]
    assert list(best_fit([7, 6, 3], 10)) == [
        [0, 2],
        [1],
    ]  # a first fit from the front would do too


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_the_rows_of_a_pack_are_the_rows(sizes):
    rows = rows_of(*sizes)
    whole = end_to_end(rows)
    assert [(list(p.ids), list(p.labels)) for p in parts(whole)] == [(r.ids, r.labels) for r in rows]
    assert whole.trained == sum(row.trained for row in rows)


def test_positions_restart_and_there_is_no_mask():
    batch = collate([end_to_end(rows_of(3, 1, 2)), *rows_of(4)], 0, CPU, True)
    assert "attention_mask" not in batch.inputs
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert batch.tokens == 10


def test_rows_that_predict_their_first_token_do_not_when_packed():
    bold = Example([5, 6, 7], [5, 6, 7])
    assert list(end_to_end([bold, bold]).labels) == [IGNORED, 6, 7, IGNORED, 6, 7]


def test_order_of_packs_is_a_function_of_seed_and_epoch():
    data = pack(Encoded(rows_of(*range(1, 21))), ROOM)
    again = pack(Encoded(rows_of(*range(1, 21))), ROOM)
    assert [e.ids for e in data.examples] == [e.ids for e in again.examples]
    assert epoch_order(len(data.examples), 3, 5, 1) == epoch_order(len(again.examples), 3, 5, 1)
    assert data.tokens == sum(range(1, 21)) and data.packed == 20 and len(data.examples) == math.ceil(210 / ROOM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro", [None, 1])
def test_packed_loss_and_gradients_are_those_of_the_rows(llama, dtype, micro):  # noqa: F811
    model = adapted(llama, dtype)
    torch.manual_seed(2)
    for parameter in trained(model):
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    rows = examples(9)
    packs = list(pack(Encoded(rows), 40).examples)
    assert 1 < len(packs) < len(rows)
    found = []
    for some in (rows, packs):
        settings = LoopSettings(batch_size=len(some), micro_batch=micro, lr=1e-30, clip=0)
        loop = Loop(model, some, [], measure(model), settings, Reporter())
        model.zero_grad()
        count = loop.measure.count(some)
        loss = loop._backward(some, count)
        found.append((count, loss, [p.grad.clone() for p in trained(model)]))
    (count, loss, gradients), (packed_count, packed_loss, packed_gradients) = found
    assert packed_count == count
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, packed_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("model_type", APART)
def test_attention_keeps_packed_rows_apart(model_type):
    model = causal(model_type)
    packs = pack(Encoded(rows_of(11, 9, 8, 7, 5, 4, 3, 2, 2)), ROOM).examples
    check_apart(model, packs, measure(model), find_head(model))


@pytest.mark.parametrize("model_type", LEAKING)
def test_a_model_whose_packed_rows_see_each_other_is_refused(model_type):
    model = causal(model_type)
    packs = pack(Encoded(rows_of(11, 9, 8, 7, 5, 4, 3, 2, 2)), ROOM).examples
    with pytest.raises(ConfigError, match=r"--pack: .*; leave --pack out"):
        check_apart(model, packs, measure(model), find_head(model))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text", "gpt_neo"])
def test_few_rows_cut_short_are_tried_where_no_window_ends_within_them(model_type):
    model = causal(model_type)
    for name in [name for name in model.config.to_dict() if "window" in name and "layers" not in name]:
        if type(getattr(model.config, name)) is int:
            setattr(model.config, name, 300)
    whole = model_type in ("mistral", "gemma3_text", "gpt_neo")
    assert has_window(model, 301) == whole and has_window(model, 300) == (model_type == "gemma3_text")
    rows = tried_rows(model, rows_of(100, 20, 90, 30, 61))
    assert [len(row.ids) for row in rows] == ([100, 20, 90, 30, 61] if whole else [64, 20, 64, 30])
    assert all(list(row.labels) == [IGNORED, *row.ids[1:]] for row in rows)


def test_the_probe_changes_nothing_and_sees_a_mask_that_is_missing(llama):  # noqa: F811
    model = adapted(llama).train()
    rows = rows_of(7, 6, 5, vocabulary=20)
    state = torch.get_rng_state()
    one, other = (collate(some, 0, CPU, True) for some in ([end_to_end(rows)], rows))
    assert apart(model, one, other, None) < 1e-5
    one.inputs["attention_mask"] = torch.ones_like(one.inputs["input_ids"])  # now transformers packs nothing
    assert apart(model, one, other, None) > 0.01
    assert model.training and torch.equal(state, torch.get_rng_state())


class Panel(Reporter):
    """Keeps the lines that a run begins with, and its evaluations."""

    def __init__(self):
        self.lines, self.scores = {}, []

    def started(self, summary, steps):
        self.lines = dict(summary)

    def evaluated(self, step, scores):
        self.scores.append(scores)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    save_bert(home / "bert")
    write_jsonl(home / "skill.jsonl", completion_rows(60))
    write_jsonl(home / "labels.jsonl", label_rows(20))
    return home


def run(home, name, **changes):
    panel = Panel()
    basic = {
        "model": str(home / "llama"),
        "data": str(home / "skill.jsonl"),
        "template": "{prompt} ->",
        "device": "cpu",
    }
    basic |= {"steps": 4, "batch_size": 2, "lr": 0.02, "max_length": 64, "out": str(home / name)}
    return train.run(TrainSettings(**{**basic, **changes}), panel), panel


def test_a_packed_run_says_what_it_packs_evaluates_rows_and_can_be_repeated(home):
    result, panel = run(home, "one", pack=True, eval_split=0.2, micro_batch=1)
    _, plain = run(home, "plain", eval_split=0.2, micro_batch=1, steps=1)
    again, _ = run(home, "two", pack=True, eval_split=0.2, micro_batch=1)
    assert panel.lines["packing"] == "48 rows in 10 of up to 64 tokens, 90.0% filled"
    assert panel.lines["data"].endswith("48 rows of completion") and "packing" not in plain.lines
    assert panel.scores[0] == plain.scores[0]  # of rows, packed or not
    assert result.after.loss < result.before.loss
    name = "adapter_model.safetensors"
    assert (result.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_rows_to_classify_are_grouped_by_length_instead(home):
    changes = {"model": str(home / "bert"), "data": str(home / "labels.jsonl"), "targets": "query,value"}
    packed, panel = run(home, "grouped", pack=True, **changes)
    plain, _ = run(home, "by-length", group_by_length=True, **changes)
    assert panel.lines["packing"].startswith("rows of classification are not put end to end")
    name = "adapter_model.safetensors"
    assert (packed.folder / name).read_bytes() == (plain.folder / name).read_bytes()
