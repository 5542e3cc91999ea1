"""The Triton kernels against float64, on a GPU where there is one and in Triton's interpreter elsewhere.

The interpreter cannot multiply bfloat16 (it sees the raw bits), so float16 stands for the half types there.
"""

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from lowrank.functional import lora_linear
from lowrank.kernels import reference
from lowrank.kernels.gpu import choice
from lowrank.kernels.gpu.gradients import two_gradients
from lowrank.kernels.gpu.product import TILES, plus_low_rank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative(got, wanted):
    return float((got.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "inner", "width", "rank"), [(150, 70, 140, 5), (128, 64, 128, 16), (3, 7, 1, 1)])
@pytest.mark.parametrize("form", ["bias", "plain", "onto"])
def test_a_product_starts_at_its_low_rank_part(dtype, tokens, inner, width, rank, form):
    x, m = draw(tokens, inner, dtype=dtype, seed=0), draw(width, inner, dtype=dtype, seed=1)
    s, n = draw(tokens, rank, dtype=dtype, seed=2), draw(width, rank, dtype=dtype, seed=3)
    bias = draw(width, dtype=dtype, seed=4) if form == "bias" else None
    onto = draw(tokens, width, dtype=dtype, seed=5) if form == "onto" else None
    wanted = x.double() @ m.double().t() + s.double() @ n.double().t()
    wanted += 0 if bias is None else bias.double()
    wanted += 0 if onto is None else onto.double()
    got = plus_low_rank(x, m.t(), s, n.t(), bias, onto)
    assert got.dtype is dtype and relative(got, wanted) < TOLERANCE[dtype]
    assert onto is None or got is onto


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_computed_once_whatever_their_size(tile):
    """Ten rows of tiles and a bit: a group of eight, and one of the rest."""
    tokens, width, inner, rank = 10 * tile.tokens + 3, 2 * tile.width + 5, tile.inner + 1, 3
    x, m = draw(tokens, inner, dtype=torch.float32, seed=0), draw(inner, width, dtype=torch.float32, seed=1)
    s, n = draw(tokens, rank, dtype=torch.float32, seed=2), draw(rank, width, dtype=torch.float32, seed=3)
    start = draw(tokens, width, dtype=torch.float32, seed=4)
    got = plus_low_rank(x, m, s, n, onto=start.clone(), tile=tile)
    assert relative(got, start.double() + x.double() @ m.double() + s.double() @ n.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank"), [(300, 70, 5), (128, 64, 16), (2, 3, 1)])
def test_both_gradients_come_from_one_reading(dtype, tokens, width, rank):
    dy, s, b = (
        draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((tokens, width), (tokens, rank), (width, rank)))
    )
    ds, db = two_gradients(dy, s, b)
    assert relative(ds, dy.double() @ b.double()) < TOLERANCE[dtype]
    assert relative(db, dy.double().t() @ s.double()) < TOLERANCE[dtype]
    again = two_gradients(dy, s, b)
    assert torch.equal(ds, again[0]) and torch.equal(db, again[1])


def test_the_fused_map_through_the_kernels(monkeypatch):
    """Every product of three projections of one input goes through a kernel; the gradients are the reference's."""
    used = []
    monkeypatch.setattr(choice, "available", lambda x: True)
    monkeypatch.setattr(choice, "product_tile", lambda *_: (used.append("product"), TILES[-1])[1])
    monkeypatch.setattr(choice, "serves_gradients", lambda *_: (used.append("gradients"), True)[1])

    def run(linear, dtype):
        x = draw(40, 24, dtype=torch.float32, seed=0).to(dtype).requires_grad_()
        hidden, total, leaves = x * 2, 0, [x]
        for seed in range(3):
            weight, bias = (draw(*s, dtype=torch.float32, seed=9 + seed).to(dtype) for s in ((32, 24), (32,)))
            a, b = (draw(*s, dtype=torch.float32, seed=5 + seed).to(dtype).requires_grad_() for s in ((4, 24), (32, 4)))
            leaves += [a, b]
            total = total + (seed + 1) * linear(hidden, weight, bias, a, b, 1.75).square().sum()
        return torch.autograd.grad(total, leaves)

    got = run(lora_linear, torch.float32)
    assert used.count("gradients") == 3 and used.count("product") == 6
    for mine, theirs in zip(got, run(reference.lora_linear, torch.float64), strict=True):
        assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("by_kernel", [set(), {32}, {24, 32}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_group_of_which_some_products_are_kernels(monkeypatch, by_kernel, dropout):
    """q, k and v as one node, where the kernel serves for outputs of some widths only, against autograd's."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(20, d) for name, d in (("q", 32), ("k", 24), ("v", 24))}).to(DEVICE)
    lowrank.inject(model, LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights="random"))
    for layer in model.values():
        layer.factors("default").dropout = dropout
    x = draw(40, 20, dtype=torch.float32, seed=0).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients():
        torch.manual_seed(1)
        hidden = x * 2
        return torch.autograd.grad(sum(layer(hidden).square().sum() for layer in model.values()), leaves)

    gradients()
    wanted, used = gradients(), []
    monkeypatch.setattr(choice, "available", lambda x: True)
    monkeypatch.setattr(choice, "serves_gradients", lambda *_: True)

    def product_tile(x, width, *_):
        used.append(width)
        return TILES[-1] if {x.shape[1], width} & by_kernel else None

    monkeypatch.setattr(choice, "product_tile", product_tile)
    for mine, theirs in zip(gradients(), wanted, strict=True):
        assert relative(mine, theirs) < 1e-5
    assert len(used) == (6 if not dropout else 3)


@pytest.fixture
def nothing_known():
    """No choice is kept from before, nor for after."""
    for known in (choice._product_tile, choice._serves_gradients):
        known.cache_clear()
    yield
    for known in (choice._product_tile, choice._serves_gradients):
        known.cache_clear()


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(("tokens", "width", "tile"), [(64, 48, TILES[-1]), (130, 128, TILES[1])])
def test_the_tiles_follow_from_the_shape_and_are_tried_once(monkeypatch, tokens, width, tile):
    """The largest that the output fills; the user's random numbers stay what they were."""
    tried = []

    def kernel(x, m, s, n, bias=None, onto=None, out=None, tile=None):
        tried.append(tile)
        return x @ m + s @ n

    monkeypatch.setattr("lowrank.kernels.gpu.product.plus_low_rank", kernel)
    state = torch.random.get_rng_state()
    x = draw(tokens, 32, dtype=torch.float32, seed=0)
    assert [choice.product_tile(x, width, 4, False) for _ in range(2)] == [tile] * 2
    assert choice.serves_gradients(draw(20, 8, dtype=torch.float32, seed=0), 4)
    assert tried == [tile] and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("fault", ["fails", "is wrong", "is no number"])
@pytest.mark.parametrize("onto", [False, True])
def test_a_kernel_that_does_not_serve_is_not_used_and_that_is_said(monkeypatch, fault, onto):
    def broken(x, m, s, n, bias=None, onto=None, out=None, tile=None):
        if fault == "fails":
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        return (x @ m + s @ n) * (1.1 if fault == "is wrong" else float("nan"))

    monkeypatch.setattr("lowrank.kernels.gpu.product.plus_low_rank", broken)
    x = draw(64, 32, dtype=torch.float32, seed=0)
    with pytest.warns(
        lowrank.LowrankWarning, match=r"does not serve on .*, torch's products are used: .*Error: "
    ) as said:
        assert choice.product_tile(x, 48, 4, onto) is None
    assert len(said) == 1 and "Required" not in str(said[0].message)


@pytest.mark.usefixtures("nothing_known")
def test_one_tile_that_serves_is_enough(monkeypatch, recwarn):
    def small(x, m, s, n, bias=None, onto=None, out=None, tile=None):
        if tile != TILES[-1]:
            raise RuntimeError("out of resource: shared memory")
        return x @ m + s @ n

    monkeypatch.setattr("lowrank.kernels.gpu.product.plus_low_rank", small)
    assert choice.product_tile(draw(300, 32, dtype=torch.float32, seed=0), 300, 4, False) == TILES[-1]
    assert not recwarn


def test_without_a_gpu_no_kernel_is_considered():
    assert not choice.available(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("asked", "gpu", "wanted"), [(None, "A", False), (None, "B", True), ("1", "A", True), ("0", "B", False)]
)
def test_kernels_are_for_gpus_they_were_measured_on_and_for_who_asks(monkeypatch, asked, gpu, wanted):
    monkeypatch.setattr(choice, "ASKED", asked)
    monkeypatch.setattr(choice, "MEASURED", frozenset({"B"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    choice._wanted.cache_clear()
    assert choice._wanted(torch.device("cuda")) == wanted
    choice._wanted.cache_clear()
