"""Every combination method against its dense float64 definition, and the two ways of compressing below them."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from combination_oracle import combined, dense, dropped, truncated
from lowrank.core.combination import METHODS, WITH_DENSITY, Options, Term, find_method
from lowrank.core.combination.dropping import drop
from lowrank.core.combination.trimming import kth_magnitude
from lowrank.core.randomised import Dense, compress
from lowrank.core.recompress import recompress
from lowrank.core.truncation import Cut
from lowrank.errors import ConfigError

SHAPES = [(13, 9), (40, 70), (70, 40)]
RANKS = (3, 5, 2)
FACTORS = (1.7, -0.6, 0.25)  # weights times scales, one of them negative


def make_terms(d: int, k: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Term]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [Term(draw(r, k), draw(d, r), factor) for r, factor in zip(RANKS, FACTORS, strict=True)]


def product(result) -> torch.Tensor:
    return result.b.double() @ result.a.double()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the second."""
    return float(torch.linalg.matrix_norm(one - other) / torch.linalg.matrix_norm(other))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("d", "k"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_result_is_the_dense_definition(method, d, k, dtype, bound):
    terms = make_terms(d, k, dtype)
    result = METHODS[method](terms, Options(rank=min(d, k), density=0.3, seed=5))
    assert distance(product(result), combined(method, terms, 0.3, 5)) < bound
    assert result.kept == pytest.approx(1.0, abs=1e-6)
    assert result.a.dtype == result.b.dtype == dtype


@pytest.mark.parametrize(("d", "k"), SHAPES)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "cat"])
def test_low_rank_result_is_the_best_one_and_says_what_it_keeps(method, d, k):
    terms = make_terms(d, k)
    whole = combined(method, terms, 0.5, 2)
    result = METHODS[method](terms, Options(rank=4, density=0.5, seed=2))
    assert result.a.shape == (4, k)
    assert result.b.shape == (d, 4)
    lost = float((whole - product(result)).square().sum() / whole.square().sum())
    best = float((whole - truncated(whole, 4)).square().sum() / whole.square().sum())
    assert result.kept == pytest.approx(1 - lost, abs=1e-9)
    assert lost - best < 1e-3 * (1 - best)
    if method in ("linear", "svd"):
        assert distance(product(result), truncated(whole, 4)) < 1e-10


def test_linear_has_no_cross_terms_and_cat_is_the_same_change():
    terms = make_terms(30, 20)
    expected = sum(dense(term) for term in terms)
    linear, cat = METHODS["linear"](terms, Options()), METHODS["cat"](terms, Options())
    assert distance(product(linear), expected) < 1e-13
    assert distance(product(cat), expected) < 1e-13
    assert cat.rank == sum(RANKS) == linear.rank
    assert cat.kept == linear.kept == 1.0


def test_linear_takes_no_more_rank_than_there_is():
    one = make_terms(30, 20)[0]
    doubled = METHODS["linear"]([one, Term(one.a, one.b, 0.5)], Options())
    assert doubled.rank == one.a.shape[0]
    assert distance(product(doubled), (one.factor + 0.5) * one.b @ one.a) < 1e-13


def test_what_cancels_is_zero_and_finite():
    one = make_terms(30, 20)[0]
    nothing = METHODS["linear"]([one, Term(one.a, one.b, -one.factor)], Options())
    assert float(product(nothing).abs().max()) < 1e-13
    zero = METHODS["ties"]([Term(one.a, torch.zeros_like(one.b))], Options(density=0.2))
    assert float(product(zero).abs().max()) == 0.0
    assert zero.kept == 1.0


def test_svd_defaults_to_the_largest_rank():
    assert METHODS["svd"](make_terms(30, 20), Options()).rank == max(RANKS)


def test_more_rank_than_the_matrix_has_is_cut_to_its_side():
    assert METHODS["linear"](make_terms(9, 4), Options(rank=50)).rank == 4


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(method):
    terms = make_terms(40, 30, torch.float32)
    first, again, other = (METHODS[method](terms, Options(4, 0.4, seed)) for seed in (1, 1, 2))
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert not torch.equal(first.a, other.a)


def test_dropping_keeps_the_expectation_and_the_density():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = torch.stack([drop(0.25, seed)(0, matrix, 0) for seed in range(600)])
    assert float((runs != 0).double().mean()) == pytest.approx(0.25, abs=0.004)
    error = (runs.mean(0) - matrix).abs() / (matrix.abs() * math.sqrt(3 / 600))  # in standard deviations
    assert float(error.max()) < 5
    assert not torch.equal(drop(0.5, 1)(0, matrix, 0) != 0, drop(0.5, 1)(1, matrix, 0) != 0)


def test_masks_do_not_depend_on_the_pass(monkeypatch):
    """A matrix of many blocks: every pass recomputes the entries, and they must be the same ones."""
    monkeypatch.setattr("lowrank.core.merging.BLOCK_ELEMENTS", 90)
    terms = make_terms(40, 30)
    result = METHODS["dare_ties"](terms, Options(rank=30, density=0.5, seed=3))
    assert distance(product(result), combined("dare_ties", terms, 0.5, 3)) < 1e-12
    assert dropped(dense(terms[0]), 0.5, 3, 0).count_nonzero() < 40 * 30


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=300), st.data())
def test_kth_magnitude_is_that_of_a_sorted_list(values, data):
    count = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype)
        wanted = x.abs().sort(descending=True).values[count - 1]
        assert torch.equal(kth_magnitude(partial(x.split, 7), count, dtype), wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_recompress_is_the_truncated_svd(d, k, big, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(big, k, generator=generator, dtype=torch.float64)
    b = torch.randn(d, big, generator=generator, dtype=torch.float64)
    result = recompress(a, b, Cut(rank))
    whole = b @ a
    assert result.rank == min(rank, d, k, big)
    error = float(torch.linalg.matrix_norm(product(result) - truncated(whole, result.rank)))
    assert error < 1e-10 * float(torch.linalg.matrix_norm(whole))
    assert result.kept == pytest.approx(
        float(truncated(whole, result.rank).square().sum() / whole.square().sum()), abs=1e-10
    )


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_no_method_forms_a_matrix_of_the_weights_size(monkeypatch, method):
    monkeypatch.setattr("lowrank.core.merging.BLOCK_ELEMENTS", 4000)
    terms = make_terms(600, 500, torch.float32)
    with Largest() as largest:
        METHODS[method](terms, Options(rank=None if method == "cat" else 4, density=0.5))
    assert 600 * sum(RANKS) <= largest.elements < 600 * 500 / 3


def test_factors_are_balanced():
    term = make_terms(30, 20)[0]
    result = recompress(term.a * 1e4, term.b * 1e-4, Cut())
    assert torch.allclose(result.a.square().sum(1), result.b.square().sum(0))
    assert torch.allclose(result.a.square().sum(1), result.sigma)


def spectrum(kind: str, n: int) -> torch.Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return {"flat": 1 + 0 * i, "slow": 1 / (1 + i).sqrt(), "fast": torch.exp(-i / 8), "low": (i < 6).double()}[kind]


def matrix_of(kind: str, d: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    n = min(d, k)
    u = torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64)).Q
    return (u * spectrum(kind, n)) @ v.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "k"), [(300, 500), (500, 300), (20, 700)])
@pytest.mark.parametrize("kind", ["flat", "slow", "fast", "low"])
def test_randomised_compression_keeps_what_the_best_one_keeps(kind, d, k, dtype):
    matrix = matrix_of(kind, d, k)
    sigma = torch.linalg.svdvals(matrix)
    result = compress(Dense(matrix.to(dtype)), Cut(8))
    best = float(sigma[:8].square().sum() / sigma.square().sum())
    real = 1 - float((matrix - product(result)).square().sum() / matrix.square().sum())
    assert result.kept == pytest.approx(real, abs=1e-5)
    assert best - real < 1e-3 * best
    assert result.shortfall <= 1e-3 * result.kept


@pytest.mark.parametrize(("kind", "slack"), [("slow", 10), ("fast", 2), ("low", 0)])
def test_randomised_compression_reaches_an_energy_with_few_more_values_than_it_takes(kind, slack):
    matrix = matrix_of(kind, 300, 400)
    shares = torch.linalg.svdvals(matrix).square().cumsum(0)
    fewest = int((shares / shares[-1] < 0.8).sum()) + 1
    result = compress(Dense(matrix), Cut(energy=0.8))
    assert result.kept >= 0.8 * (1 - 1e-12)
    assert fewest <= result.rank <= fewest + slack


def test_a_rank_caps_the_energy():
    result = compress(Dense(matrix_of("slow", 100, 80)), Cut(3, energy=0.99))
    assert result.rank == 3


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError, match=r"method 'tie' is not known: choose one of linear, cat"):
        find_method("tie")
    assert set(WITH_DENSITY) < set(METHODS)
