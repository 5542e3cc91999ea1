"""Laws of the loop: cutting a step up changes nothing, the schedule, the optimiser, evaluation, best weights."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.dataset import Dataset
from lowrank.data.recipe import Recipe
from lowrank.data.rows import Row
from lowrank.data.tokens import Example, encode
from lowrank.errors import Diverged, LowrankError
from lowrank.train.adamw import UPDATES
from lowrank.train.evaluation import Measure, score
from lowrank.train.head import find_head
from lowrank.train.loop import Loop, steps_of
from lowrank.train.losses import LOSSES, NextToken
from lowrank.train.metrics import FIGURES, matthews
from lowrank.train.models import checkpoint_activations, load_causal
from lowrank.train.optimiser import Optimiser
from lowrank.train.reporting import Reporter
from lowrank.train.schedule import rate_factor
from lowrank.train.settings import LoopSettings
from train_models import completion_rows, save_llama, tokenizer

CPU = torch.device("cpu")
MEASURE = Measure(lambda examples: collate(examples, 0, CPU, True), LOSSES["completion"], FIGURES["completion"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def examples(count, seed=0):
    rows = [Row(i, row) for i, row in enumerate(completion_rows(count, seed))]
    rows += [Row(count, {"prompt": "red", "completion": "the cat is a very very very good black cat ?"})]
    return encode(Dataset("d", "completion", rows), tokenizer(), Recipe("completion", "{prompt} ->", 64)).examples


def adapted(llama, dtype=torch.float32):
    torch.manual_seed(1)
    model = load_causal(llama, dtype)
    inject(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def run(model, rows, held_out=(), reporter=None, **settings):
    loop = Loop(model, rows, held_out, MEASURE, LoopSettings(**settings), reporter or Reporter())
    return loop.run()


def test_loss_is_the_mean_of_the_slow_way(llama):
    model, rows = adapted(llama).eval(), examples(5)
    total, count = 0.0, 0
    for example in rows:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0]
        for position, label in enumerate(example.labels):
            if label != -100:
                total -= float(logits[position - 1].log_softmax(-1)[label])
                count += 1
    for batch_size in (1, 4, 6):
        scores = score(model, rows, MEASURE, batch_size)
        assert scores.count == count
        assert scores.loss == pytest.approx(total / count, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(llama, micro):
    rows = examples(6)
    gradients = []
    for part in (None, micro):
        model = adapted(llama)
        with torch.no_grad():
            for parameter in trained(model):
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()), std=0.1)
        loop = Loop(model, rows, [], MEASURE, LoopSettings(batch_size=7, micro_batch=part), Reporter())
        loop._backward(rows, sum(example.trained for example in rows))
        gradients.append([p.grad for p in trained(model)])
    for whole, cut in zip(*gradients, strict=True):
        assert (cut - whole).abs().max() < 1e-5 * whole.abs().max()


def test_micro_batches_do_not_change_the_training(llama):
    weights = []
    for micro in (None, 3):
        model = adapted(llama)
        run(model, examples(20), steps=6, batch_size=8, micro_batch=micro, lr=1e-2)
        weights.append(trained(model))
    for whole, cut in zip(*weights, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-5)


def test_training_learns_and_gives_back_evaluation_mode(llama):
    model, rows = adapted(llama), examples(60)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    state = run(model, rows, rows, steps=40, batch_size=16, lr=2e-2)
    first, last = state.evaluations[0][1], state.evaluations[-1][1]
    assert last.loss < 0.6 * first.loss
    assert last.accuracy > first.accuracy + 0.2
    assert not model.training
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


class Recorder(Reporter):
    def __init__(self):
        self.progress, self.steps, self.evaluations = [], [], []

    def stepped(self, step):
        self.steps.append(step)

    def progressed(self, progress):
        self.progress.append(progress)

    def evaluated(self, step, scores):
        self.evaluations.append(step)


def test_reports_come_when_they_should(llama):
    recorder = Recorder()
    rows = examples(9)
    run(adapted(llama), rows, rows, recorder, steps=7, batch_size=5, eval_every=3, log_every=2)
    assert recorder.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [p.step for p in recorder.progress] == [2, 4, 6, 7]
    assert recorder.evaluations == [0, 3, 6, 7]
    per_pass = sum(example.trained for example in rows)
    assert recorder.progress[0].trained == per_pass
    assert recorder.progress[2].trained == 3 * per_pass


def test_best_weights_come_back(llama):
    rows = examples(30)
    # the same words in another order: the words are learned first, which helps, and then the order, which does not
    other = [
        Row(i, {**row, "completion": " ".join(row["completion"].split()[::-1])})
        for i, row in enumerate(completion_rows(30))
    ]
    held_out = encode(Dataset("d", "completion", other), tokenizer(), Recipe("completion", "{prompt} ->", 64)).examples
    for keep in ("last", "best"):
        model = adapted(llama)
        state = run(
            model, rows, held_out, steps=30, batch_size=31, lr=2e-2, schedule="constant", eval_every=3, keep=keep
        )
        losses = [scores.loss for _, scores in state.evaluations]
        assert 0 < state.best[0] < 30
        assert state.best[1].loss == min(losses) < 0.9 * losses[-1]
        wanted = losses[-1] if keep == "last" else min(losses)
        assert score(model, held_out, MEASURE, 31).loss == pytest.approx(wanted, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(llama):
    model = adapted(llama)
    with torch.no_grad():
        trained(model)[0].fill_(float("nan"))
    before = [p.clone() for p in trained(model)]
    with pytest.raises(LowrankError, match=r"step 1: the loss is nan.*smaller --lr"):
        run(model, examples(4), steps=3)
    assert all(torch.equal(p, q) for p, q in zip(trained(model)[1:], before[1:], strict=True))


@pytest.mark.parametrize(("step", "when"), [(0, "before the first step"), (2, "after step 2")])
def test_an_evaluation_that_is_not_finite_stops_with_a_sentence(llama, step, when):
    """run.json could not hold it: hours later the result would have been lost with it."""
    rows, model = examples(8), adapted(llama)
    only_there = max(set(rows[-1].ids) - {token for row in rows[:-1] for token in row.ids})

    class Poisons(Reporter):
        def stepped(self, at):
            if at == step:
                with torch.no_grad():
                    model.get_input_embeddings().weight[only_there] = math.inf

        def evaluated(self, at, scores):
            assert at < step

    reporter = Poisons()
    reporter.stepped(0)
    with pytest.raises(Diverged, match=rf"^{when}: the loss on the evaluation rows is (nan|inf), .* nothing was saved"):
        run(model, rows[:-1], rows[-1:], reporter, steps=2)


@pytest.mark.filterwarnings("ignore:no gradient reaches")
def test_an_adapter_that_no_gradient_reaches_stops_the_training_before_a_step(llama):
    model = load_causal(llama, torch.float32)
    model.unused = nn.Linear(4, 4)
    inject(model, LoraConfig(r=3, target_modules=["q_proj", "unused"]))
    before = [p.clone() for p in trained(model)]
    with pytest.raises(LowrankError, match=r"no gradient reaches the adapters of unused: .*leave them out"):
        run(model, examples(4), steps=3)
    assert all(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))


def test_gradient_checkpointing_gives_the_same_weights(llama):
    weights = []
    for checkpointing in (False, True):
        model = adapted(llama)
        if checkpointing:
            checkpoint_activations(model)
        run(model, examples(8), steps=3, lr=1e-2)
        weights.append(trained(model))
    for plain, checkpointed in zip(*weights, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_in_chunks_is_the_plain_one(llama, checkpointing):
    weights, scores = [], []
    for known in (False, True):
        model = adapted(llama)
        if checkpointing:
            checkpoint_activations(model)
        measure = replace(MEASURE, loss=NextToken(find_head(model) if known else None, 5))
        loop = Loop(model, examples(20), examples(6), measure, LoopSettings(steps=4, batch_size=8, lr=1e-2), Reporter())
        scores.append(loop.run().evaluations[-1][1])
        weights.append(trained(model))
    for plain, chunked in zip(*weights, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-3, atol=1e-5)
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-4)
    assert scores[1].figures.keys() == {"perplexity", "accuracy", "exact_match"}


def test_schedules():
    for name, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        factors = [rate_factor(name, step, 12, 2) for step in range(12)]
        assert factors[:2] == pytest.approx([1 / 3, 2 / 3])
        assert factors[2] == 1.0
        assert factors[7] == pytest.approx(middle)
        assert factors == sorted(factors[:3]) + sorted(factors[3:], reverse=True)
        assert factors[-1] > 0
    assert rate_factor("cosine", 3, 12, 0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_steps_from_epochs():
    assert steps_of(LoopSettings(batch_size=8), 17) == 3
    assert steps_of(LoopSettings(batch_size=8, epochs=2.5), 17) == 8
    assert steps_of(LoopSettings(batch_size=8, steps=5), 17) == 5
    assert steps_of(LoopSettings(batch_size=8, epochs=0.01), 17) == 1


@pytest.mark.parametrize("name", UPDATES)
def test_optimiser_is_adamw_with_clipping(name):
    """Few numbers keep their moments in float32 where bitsandbytes holds those of many in 8 bits."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(i)) * 3 for i in range(1, 4)]
    settings = LoopSettings(optimizer=name, lr=0.1, clip=1.5, weight_decay=0.2, beta1=0.8, beta2=0.9)
    parameter = nn.Parameter(start.clone())
    ours = Optimiser([parameter], settings)
    norms = []
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        norms.append(ours.step(1.0 - 0.25 * step))
    assert norms == pytest.approx([float(g.norm()) for g in gradients])
    assert parameter.grad is None

    wanted, m, v = start.double(), torch.zeros(5).double(), torch.zeros(5).double()
    for step, gradient in enumerate(gradients):
        g = gradient.double() * min(1.0, 1.5 / float(gradient.norm()))
        rate = 0.1 * (1.0 - 0.25 * step)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        update = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        wanted = wanted * (1 - rate * 0.2) - rate * update
    torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-4, atol=1e-6)


def test_steps_smaller_than_half_a_bfloat16_unit_add_up():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimiser = Optimiser([parameter], LoopSettings(lr=1e-3))
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step(1.0)
    assert parameter.item() == pytest.approx(0.96, abs=0.004)  # bfloat16 has no number between 0.996 and 1


def test_a_gradient_that_is_not_finite_changes_nothing():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, math.inf])
    assert Optimiser([parameter], LoopSettings(lr=1.0)).step(1.0) == math.inf
    assert parameter.tolist() == [1.0, 1.0]


def test_bfloat16_base_trains_float32_factors(llama):
    model = adapted(llama, torch.bfloat16)
    rows = examples(40)
    state = run(model, rows, rows, steps=25, batch_size=16, lr=2e-2)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert state.evaluations[-1][1].loss < 0.8 * state.evaluations[0][1].loss


def correlated(true, predicted):
    """Matthews' coefficient as numpy's correlation of the two columns of 0 and 1."""
    return float(numpy.corrcoef(true, predicted)[0, 1])


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30))
def test_matthews_is_the_correlation_of_two_classes(pairs):
    true, predicted = ([pair[i] for pair in pairs] for i in (0, 1))
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for row, column in pairs:
        confusion[row, column] += 1
    wanted = correlated(true, predicted) if len(set(true)) == len(set(predicted)) == 2 else 0.0
    assert matthews(confusion) == pytest.approx(wanted, abs=1e-12)


def test_matthews_of_more_classes_is_one_where_all_are_right_and_below_where_not():
    assert matthews(torch.diag(torch.tensor([3, 1, 5]))) == pytest.approx(1.0)
    # three of four right, one of class 0 taken for class 2: (3·4 − 5)/√((16 − 6)(16 − 6)) by hand
    assert matthews(torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]])) == pytest.approx(0.7)


class Remembers(nn.Module):
    """Answers row i with logits[i]; a row's one token is its number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits[input_ids[:, 0]])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_classifier_is_scored_over_all_batches_together(batch_size):
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1], [1, 0]])  # taken for 1, 0, 1, 1, 0
    true = [1, 0, 0, 1, 1]
    rows = [Example([i], [label]) for i, label in enumerate(true)]
    measure = Measure(lambda found: collate(found, 0, CPU, False), LOSSES["classification"], FIGURES["classification"])
    scores = score(Remembers(logits), rows, measure, batch_size)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.matthews == pytest.approx(correlated(true, [1, 0, 1, 1, 0]))


def test_tokens_have_no_matthews(llama):
    assert score(adapted(llama), examples(3), MEASURE, 2).matthews is None
