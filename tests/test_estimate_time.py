"""The time that is estimated: from the very operations of a real step, each of which is tried, or its like."""

from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.data.batches import collate
from lowrank.data.tokens import Example
from lowrank.study.estimate import replaying, updating
from lowrank.study.estimate.counting import Counting
from lowrank.study.estimate.operation import ATTENTION, ATTENTION_BACKWARD, Operation, noted
from lowrank.study.estimate.prepared import prepared
from lowrank.study.estimate.rehearse import rehearse
from lowrank.study.estimate.replaying import Replayed, shortened
from lowrank.study.estimate.settings import EstimateSettings
from lowrank.train.adapting import adapt
from lowrank.train.evaluation import Measure
from lowrank.train.head import find_head
from lowrank.train.losses import NextToken
from lowrank.train.metrics import FIGURES
from lowrank.train.row_attention import attend_by_rows
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded
from test_estimate import CPU, LLAMA, loaded_as, save_model

FEW_ROWS = True


class Products(TorchDispatchMode):
    """Counts the products of what runs inside, by what is called and how much it computes."""

    def __init__(self):
        super().__init__()
        self.done = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (one := noted(func, args, kwargs or {}, out)).arithmetic:
            self.done[func, one.arithmetic] += 1
        return out


WAYS = {
    "plain": {},
    "few rows": {"batch_size": 1, "max_length": 40},
    "bfloat16": {"dtype": "bfloat16"},
    "activations twice": {"gradient_checkpointing": True},
    "four bits": {"quantise": "nf4"},
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_rehearsed_are_the_products_of_a_real_step(tmp_path, name):
    if "quantise" in WAYS[name]:
        pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "model")
    asked = LLAMA | WAYS[name] | {"model": folder, "device": "cpu"}
    rows, length = asked["batch_size"], asked["max_length"]
    settings = TrainSettings(**asked, data="d", out="o")
    made = prepared(EstimateSettings(**asked), getattr(torch, settings.dtype or "float32"))
    found = Counter()
    for one, times in rehearse(made.model, rows, length, False, "cpu").done.items():
        found[one.func, one.arithmetic] += times if one.arithmetic else 0

    model = loaded_as(folder, settings)
    adapt(Loaded(model, None, CPU, 0), settings, None)
    model.train()
    head, row = find_head(model), Example([1] * length, [1] * length)
    measure = Measure(lambda some: collate(some, 0, CPU, True), NextToken(head), FIGURES["text"], flat=rows > 1)
    batch = measure.trained([row] * rows)
    assert rows == 1 or attend_by_rows(model, batch, head)
    for _ in range(2):  # layers that share an input know each other from the second step on
        with Products() as real:
            measure.loss(model, batch).total.backward()
    assert {key: times for key, times in found.items() if times} == side_by_side(real.done, rows)


def side_by_side(done, rows):
    """What is done for rows end to end, as if it were done for rows side by side."""
    found = Counter()
    for (func, arithmetic), times in done.items():
        if func in (ATTENTION, ATTENTION_BACKWARD):  # row by row
            arithmetic, times = rows * arithmetic, times // rows
        elif func is torch.ops.aten.bmm.default:  # the head, of the first position of each
            arithmetic *= rows
        found[func, arithmetic] += times
    return dict(found)


class Ticking:
    """A clock on which everything takes a second."""

    def __init__(self):
        self.seconds = count()

    def perf_counter(self):
        return float(next(self.seconds))


def an(func, *args, **options):
    return noted(func, args, options, func(*args, **options))


MM, ADD = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor


def test_an_operation_is_tried_once_and_counted_as_often_as_it_is_done(monkeypatch):
    monkeypatch.setattr(replaying, "time", Ticking())
    x = torch.ones(8, 16)
    done = Counter({an(MM, x, x.t()): 3, an(ADD, x, x): 4})
    assert Replayed(lambda _: 1e9)(done) == 7.0


def test_what_is_too_long_is_counted_up_from_its_like(monkeypatch):
    monkeypatch.setattr(replaying, "time", Ticking())
    monkeypatch.setattr(replaying, "MOST_ARITHMETIC", 2.0 * 8 * 8 * 8)
    monkeypatch.setattr(replaying, "MOST_MOVED", 3 * 4 * 8 * 8)
    x = torch.ones(32, 32)
    assert Replayed(lambda _: 1e9)(Counter([an(MM, x, x)])) == 4.0**3
    assert Replayed(lambda _: 1e9)(Counter([an(ADD, x, x)])) == 4.0**2


def test_what_cannot_be_done_by_itself_goes_by_the_rates():
    one = Operation(torch.ops.aten.mm.default, (), (), 8.0, 4)
    assert Replayed(lambda done: 5.0 * done.total())(Counter({one: 3})) == 15.0


def test_a_like_has_the_shapes_strides_and_dtypes():
    x, mask = torch.rand(6, 4).t(), torch.zeros(4, 1, dtype=torch.bool).expand(4, 6)
    one = an(torch.ops.aten.where.self, mask, x, x.double())
    args, options = one.called_with("cpu")
    for made, wanted in zip(args, (mask, x, x.double()), strict=True):
        assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert not args[0].any() and (args[1] == 1).all() and options == {}


def test_sides_that_are_equal_stay_equal():
    """(2, 64, 8) + (64, 1), the rows of both are halved; the other sides of a transposed tensor stay in its order."""
    x = torch.ones(2, 8, 64).transpose(1, 2)
    half = an(ADD, x, torch.ones(64, 1)).halved()
    assert [like.shape for like in half.args] == [(2, 32, 8), (32, 1)]
    assert half.args[0].strides == (8 * 32, 1, 32)
    cat = an(torch.ops.aten.cat.default, [torch.ones(64, 3), torch.ones(64, 5)], 1).halved()
    assert [like.shape for like in cat.args[0]] == [(32, 3), (32, 5)]


def test_of_attention_a_half_is_counted_and_its_backward_pass_is_two_and_a_half_times_that():
    q = torch.ones(2, 3, 32, 8, requires_grad=True)
    with Products() as seen:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    forward, backward = sorted(arithmetic for _, arithmetic in seen.done)
    assert forward == 2 * (2 * 2 * 3 * 32 * 32 * 8) / 2 and backward == 2.5 * forward
    assert ATTENTION in {func for func, _ in seen.done}


def test_operations_of_others_are_not_shortened():
    """Theirs may read past the end of what is too short."""
    foreign = SimpleNamespace(namespace="bitsandbytes")
    one = Operation(foreign, (), (), 1e12, 1 << 40)
    assert one.halved() is None and shortened(one, 1.0, 1) is one


def test_the_update_grows_with_what_is_trained(monkeypatch):
    monkeypatch.setattr(updating, "time", Ticking())
    monkeypatch.setattr(updating, "MOST_NUMBERS", 100)
    trained = [torch.nn.Parameter(torch.ones(10, 5)) for _ in range(8)]
    assert updating.update_of(trained, "adamw", lambda _: 1e9, "cpu") == 4.0
    assert updating.update_of(trained, "adamw", lambda done: sum(one.moved for one in done), "gpu") == 7 * 4 * 400


def test_a_grouped_product_counts_as_the_batched_one_of_even_groups():
    """Forward, the gradient of its input and that of its weights: each as much arithmetic."""
    rows, experts, k, n = 24, 4, 8, 16
    x, weight = torch.empty(rows, k, device="meta"), torch.empty(experts, k, n, device="meta")
    dy, ends = torch.empty(rows, n, device="meta"), torch.empty(experts, dtype=torch.int32, device="meta")
    with Counting(()) as counting:
        answer = torch.ops.aten._grouped_mm(x, weight, ends)
        dx = torch.ops.aten._grouped_mm(dy, weight.transpose(-2, -1), ends)
        dweight = torch.ops.aten._grouped_mm(x.t(), dy, ends)
    assert (answer.shape, dx.shape, dweight.shape) == ((rows, n), (rows, k), (experts, k, n))
    products = [one for one in counting.done.elements() if one.arithmetic]
    assert [one.arithmetic for one in products] == [2 * rows * k * n] * 3
    assert {one.func for one in products} == {torch.ops.aten.bmm.default}
