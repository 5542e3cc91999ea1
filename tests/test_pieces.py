"""Half-precision products in pieces: the same bits as the whole, and only where they are worth it."""

import pytest
import torch
from torch.nn import functional as F

from lowrank.functional import lora_linear
from lowrank.kernels import pieces
from lowrank.kernels.pieces import Cut, Shape

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def halves(monkeypatch):
    """Every product of two threads is cut into halves, where that keeps its bits; nothing is known from before."""
    monkeypatch.setattr(pieces, "_asked", "1")
    monkeypatch.setattr(pieces, "SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pieces.tried.cache_clear()
    yield
    pieces.tried.cache_clear()


def draw(*size, dtype=torch.bfloat16, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cut", [Cut(0, 7), Cut(1, 5), Cut(1, 16)], ids=str)
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
    monkeypatch.setattr(pieces, "_cut_of", lambda *a: Cut(0, 128))
    assert torch.equal(pieces.base(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes_are_left_alone(dtype):
    pieces.base(draw(8, 12, dtype=dtype), draw(6, 12, dtype=dtype), None)
    assert pieces.tried.cache_info().currsize == 0


def shape(onto=False, threads=2, strides=((96, 1), (1, 96))):
    return Shape(64, 96, 512, strides, False, onto, torch.bfloat16, threads)


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("onto", [False, True])
def test_pieces_with_other_bits_are_never_taken(monkeypatch, onto):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    name = "_onto_in_pieces" if onto else "_in_pieces"
    real = getattr(pieces, name)
    whole = (lambda x, m, y, cut: y.addmm_(x, m)) if onto else lambda x, m, bias, y, cut: F.linear(x, m.t(), bias)
    monkeypatch.setattr(pieces, name, whole)
    assert pieces.tried(shape(onto)) == Cut(0, 32) and "in pieces of 32 rows" in str(pieces.tried(shape(onto)))
    pieces.tried.cache_clear()
    monkeypatch.setattr(pieces, name, lambda *a: real(*a).mul_(1.01))
    assert pieces.tried(shape(onto)) is None


@pytest.mark.usefixtures("halves")
def test_a_shape_is_tried_once_and_as_it_lies_in_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(pieces, "tried", lambda one: asked.append(one))
    wide = draw(4, 8, 24)
    pieces.base(wide[..., :12], draw(6, 12, seed=1), None)
    pieces.product(draw(8, 6), draw(6, 12, seed=1), draw(8, 12))
    assert asked == [
        Shape(32, 12, 6, ((24, 1), (1, 12)), False, False, torch.bfloat16, 2),
        Shape(8, 6, 12, ((6, 1), (12, 1)), False, True, torch.bfloat16, 2),
    ]
    monkeypatch.undo()
    assert pieces.tried(shape(strides=((0, 1), (1, 96)))) is None


@pytest.mark.usefixtures("halves")
def test_one_thread_has_no_idle_core():
    assert pieces.tried(shape(threads=1)) is None


def test_without_being_asked_only_what_was_measured_is_cut(monkeypatch):
    """On processors like that one, with as many threads."""
    monkeypatch.setattr(pieces, "_asked", None)
    for tiles in (False, True):
        monkeypatch.setattr(pieces, "has_matrix_tiles", lambda tiles=tiles: tiles)
        assert (pieces._rule(1024, 768, 768, torch.bfloat16, 2) == Cut(0, 512)) == tiles
        assert pieces._rule(1024, 768, 768, torch.float16, 2) is None
        assert pieces._rule(1024, 768, 768, torch.bfloat16, 4) is None
        assert pieces._rule(1024, 768, 2048, torch.bfloat16, 2) is None
    monkeypatch.setattr(pieces, "_asked", "0")
    assert pieces._rule(1024, 768, 768, torch.bfloat16, 2) is None
    assert not pieces.explain(1024, 768, 768, torch.bfloat16)


@pytest.mark.usefixtures("halves")
def test_trying_does_not_disturb_the_random_numbers_of_the_user():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    pieces.tried(shape())
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.usefixtures("halves")
def test_training_in_pieces_has_the_bits_of_training_without():
    x, weight, bias = draw(3, 64, 256), draw(512, 256, seed=1), draw(512, seed=2)
    a, b = draw(4, 256, dtype=torch.float32, seed=3), draw(512, 4, dtype=torch.float32, seed=4)
    found = []
    for asked in ("1", "0"):
        pieces._asked = asked
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        h = lora_linear(leaves[0], weight, bias, leaves[1], leaves[2], 1.75)
        h.square().sum().backward()
        found.append([h.detach(), *(t.grad for t in leaves)])
    assert pieces.tried.cache_info().currsize
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
