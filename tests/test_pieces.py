"""Half-precision products in pieces: the same bits as the whole, and only where they are worth it."""

import pytest
import torch
from torch.nn import functional as F

from lowrank.functional import lora_linear
from lowrank.kernels import pieces
from lowrank.kernels.pieces import Cut, Shape

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def known(monkeypatch):
    """An empty memory of shapes, sizes as small as they come, and two threads."""
    memory = {}
    monkeypatch.setattr(pieces, "_known", memory)
    monkeypatch.setattr(pieces, "SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return memory


def draw(*size, dtype=torch.bfloat16, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cut", [Cut(0, 7, 0.5), Cut(1, 5, 0.5), Cut(1, 16, 0.5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_make_up_the_whole(monkeypatch, cut, dtype, transposed, bias):
    """Uneven last pieces, more dimensions than two, and a result that lies as the whole's does."""
    x, weight = draw(4, 5, 12, dtype=dtype), draw(13, 12, dtype=dtype, seed=1)
    weight = weight.t().contiguous().t() if transposed else weight
    added = draw(13, dtype=dtype, seed=2) if bias else None
    monkeypatch.setattr(pieces, "_cut_of", lambda *a: cut)
    got = pieces.base(x, weight, added)
    wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert got.dtype is dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    rows, start = draw(20, 13, dtype=dtype, seed=3), draw(20, 12, dtype=dtype, seed=4)
    product = rows.double() @ weight.double()
    torch.testing.assert_close(pieces.product(rows, weight).double(), product, rtol=2e-2, atol=3e-2)
    onto = start.clone()
    assert pieces.product(rows, weight, onto) is onto
    torch.testing.assert_close(onto.double(), start.double() + product, rtol=2e-2, atol=4e-2)


LAYOUTS = {
    "one matrix": lambda x: x.flatten(0, 1),
    "contiguous": lambda x: x,
    "turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns of a wider one": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_into_a_given_tensor_it_has_the_bits_of_the_linear_layer(layout, bias, dtype):
    """Where torch adds the bias depends on how x lies in memory."""
    x = LAYOUTS[layout](draw(4, 64, 96, dtype=dtype))
    weight, added = draw(80, 96, dtype=dtype, seed=1), draw(80, dtype=dtype, seed=2) if bias else None
    wanted = F.linear(x, weight, added)
    out = torch.empty(wanted.shape, dtype=dtype)
    assert pieces.base(x, weight, added, out) is out
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_by_rows_with_a_bias_it_has_the_bits_of_the_linear_layer(monkeypatch, layout):
    x, weight, bias = LAYOUTS[layout](draw(4, 64, 96)), draw(80, 96, seed=1), draw(80, seed=2)
    monkeypatch.setattr(pieces, "_cut_of", lambda *a: Cut(0, 128, 0.5))
    assert torch.equal(pieces.base(x, weight, bias), F.linear(x, weight, bias))


def test_a_shape_is_timed_once_it_was_met_often_enough(monkeypatch, known):
    asked = []
    monkeypatch.setattr(pieces, "find_cut", lambda shape: asked.append(shape))
    x, weight = draw(8, 12), draw(6, 12, seed=1)
    for _ in range(3 * pieces.MEETINGS):
        pieces.base(x, weight, None)
    assert asked == [Shape(8, 12, 6, True, False, False, torch.bfloat16, 2)] and known == {asked[0]: None}
    for _ in range(pieces.MEETINGS + 1):
        pieces.product(draw(8, 6), weight)
    assert len(asked) == 2 and not asked[1].transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes_are_left_alone(known, dtype):
    for _ in range(pieces.MEETINGS + 1):
        pieces.base(draw(8, 12, dtype=dtype), draw(6, 12, dtype=dtype), None)
    assert not known


def shape(onto=False, threads=2, d=512):
    return Shape(64, 96, d, True, False, onto, torch.bfloat16, threads)


@pytest.mark.parametrize(("times", "wanted"), [((0.7, 0.5, 0.6), 192), ((0.5, 0.5, 0.7), 32), ((0.9, 0.9, 0.79), 256)])
def test_the_fastest_pieces_are_taken_where_the_bits_are_the_whole_s(monkeypatch, times, wanted):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(pieces, "_in_pieces", lambda x, m, bias, out, cut: out.copy_(F.linear(x, m.t(), bias)))
    monkeypatch.setattr(pieces, "_seconds", lambda jobs: [1.0, *times])
    cut = pieces.find_cut(shape(d=384))
    assert (
        cut.size == wanted and cut.share == min(times) and f"{wanted} {'rows' if wanted == 32 else 'col'}" in str(cut)
    )


def test_pieces_that_gain_little_are_not_taken(monkeypatch):
    monkeypatch.setattr(pieces, "_seconds", lambda jobs: [1.0] + [0.9] * (len(jobs) - 1))
    assert pieces.find_cut(shape()) is None


@pytest.mark.parametrize("onto", [False, True])
def test_pieces_with_other_bits_are_never_taken(monkeypatch, onto):
    name = "_onto_in_pieces" if onto else "_in_pieces"
    real = getattr(pieces, name)
    monkeypatch.setattr(pieces, name, lambda *a: real(*a).mul_(1.01))
    monkeypatch.setattr(pieces, "_seconds", lambda jobs: [1.0] + [0.1] * (len(jobs) - 1))
    assert pieces.find_cut(shape(onto)) is None


def test_one_thread_has_no_idle_core():
    assert pieces.find_cut(shape(threads=1)) is None


def test_timing_does_not_disturb_the_random_numbers_of_the_user():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    pieces.find_cut(shape())
    assert torch.equal(torch.rand(3), wanted)


def test_training_gives_the_same_bits_before_and_after_a_shape_is_timed(known):
    """Whatever this machine finds, it is not seen in the answer, nor in a gradient."""
    x, weight, bias = draw(3, 64, 256), draw(512, 256, seed=1), draw(512, seed=2)
    a, b = draw(4, 256, dtype=torch.float32, seed=3), draw(512, 4, dtype=torch.float32, seed=4)
    found = []
    for _ in range(pieces.MEETINGS + 2):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        h = lora_linear(leaves[0], weight, bias, leaves[1], leaves[2], 1.75)
        h.square().sum().backward()
        found.append([h.detach(), *(t.grad for t in leaves)])
    assert any(not isinstance(outcome, int) for outcome in known.values())
    for later in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], later, strict=True))
