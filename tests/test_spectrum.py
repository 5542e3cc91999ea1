"""The spectrum of ΔW from its factors, against the dense matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.core import overlap
from lowrank.core.amplification import amplification
from lowrank.core.intruders import THRESHOLD, find_intruders, largest_components
from lowrank.core.krylov import Sum, leading, random_block
from lowrank.core.ranks import effective_rank, energy_kept, rank_for_energy, stable_rank
from lowrank.core.spectrum import delta_norm, delta_svd, right_directions, singular_values
from lowrank.core.subspace import random_grid, random_spread, similarity_grid


def pair(d: int, k: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, k, generator=g).to(dtype), torch.randn(d, r, generator=g).to(dtype)


def directions(n: int, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, count, generator=g, dtype=torch.float64)).Q


def decaying(d: int, k: int, power: float, seed: int) -> Tensor:
    """A (d, k) matrix with σ_i = i^−power; a standard normal one for power 0, whose σ are as close as can be."""
    if power == 0:
        return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = min(d, k)
    sigma = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    return (directions(d, n, seed) * sigma) @ directions(k, n, seed + 1).t()


sizes = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 12), st.sampled_from([0.25, 1.0, -3.0]), st.integers(0, 99))
def test_spectrum_is_that_of_the_dense_matrix(d: int, k: int, r: int, scale: float, seed: int) -> None:
    a, b = pair(d, k, r, seed)
    dense = scale * b.double() @ a.double()
    wanted = torch.linalg.svdvals(dense)[: min(r, d, k)]
    torch.testing.assert_close(singular_values(a, b, scale), wanted, rtol=1e-9, atol=1e-11)
    svd = delta_svd(a, b, scale)
    torch.testing.assert_close((svd.u * svd.sigma) @ svd.v.t(), dense, rtol=1e-9, atol=1e-11)
    for basis in (svd.u, svd.v):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(svd.rank, dtype=torch.float64))
    assert delta_norm(a, b, scale) == pytest.approx(float(dense.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_factors_are_taken_as_they_are(dtype: torch.dtype) -> None:
    a, b = pair(40, 30, 5, 0, dtype)
    wanted = torch.linalg.svdvals(0.5 * b.double() @ a.double())[:5]
    torch.testing.assert_close(singular_values(a, b, 0.5), wanted)


def test_a_change_that_cancels_is_zero() -> None:
    a, b = pair(50, 40, 4, 1)
    twice_a, difference = torch.cat([a, a]), torch.cat([b, -b], dim=1)  # PiSSA's factors before the first step
    assert singular_values(twice_a, difference, 2.0).tolist() == [0.0] * 8
    assert delta_svd(twice_a, difference, 2.0).rank == 0
    assert delta_norm(a, torch.zeros_like(b), 2.0) == 0.0


def test_a_small_change_beside_large_factors_is_kept() -> None:
    a, b = pair(50, 40, 4, 1)
    moved = a + 1e-6 * pair(50, 40, 4, 2)[0]
    twice_a, difference = torch.cat([moved, a]), torch.cat([b, -b], dim=1)
    dense = difference.double() @ twice_a.double()
    assert delta_svd(twice_a, difference, 1.0).rank == 4
    assert delta_norm(twice_a, difference, 1.0) == pytest.approx(float(dense.norm()), rel=1e-6)


def test_right_directions_are_those_of_a() -> None:
    a, _ = pair(3, 30, 5, 3)
    vh = torch.linalg.svd(a.double(), full_matrices=False)[2]
    torch.testing.assert_close((right_directions(a).t() @ vh.t()).abs(), torch.eye(5, dtype=torch.float64))


@given(st.integers(1, 40))
def test_equal_directions_use_their_number_of_ranks(n: int) -> None:
    sigma = torch.full((n,), 0.3, dtype=torch.float64)
    assert effective_rank(sigma) == pytest.approx(n)
    assert stable_rank(sigma) == pytest.approx(n)
    assert rank_for_energy(sigma, 1.0) == n
    assert rank_for_energy(sigma, 0.9) == math.ceil(0.9 * n - 1e-9)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_rank_measures_are_ordered(values: list[float], share: float) -> None:
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    n = len(values)
    assert 1 - 1e-9 <= stable_rank(sigma) <= n + 1e-9
    assert 1 - 1e-9 <= effective_rank(sigma) <= n + 1e-9
    rank = rank_for_energy(sigma, share)
    kept = energy_kept(sigma)
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share


def test_rank_measures_by_hand() -> None:
    sigma = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64).sort(descending=True).values
    p = [4 / 7, 3 / 7]
    assert effective_rank(sigma) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert stable_rank(sigma) == pytest.approx(25 / 16)
    assert energy_kept(sigma).tolist() == pytest.approx([16 / 25, 1, 1])
    assert [rank_for_energy(sigma, share) for share in (0.6, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]


@pytest.mark.parametrize("sigma", [torch.zeros(0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)])
def test_no_change_has_rank_zero(sigma: Tensor) -> None:
    assert effective_rank(sigma) == stable_rank(sigma) == rank_for_energy(sigma, 0.9) == 0
    assert energy_kept(sigma).tolist() == [0.0] * len(sigma)


@settings(deadline=None)
@given(st.integers(8, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 50))
def test_similarity_is_the_formula(n: int, p: int, q: int, seed: int) -> None:
    one, other = directions(n, p, seed), directions(n, q, seed + 100)
    grid = similarity_grid(one, other)
    for i in range(1, p + 1):
        for j in range(1, q + 1):
            phi = float((one[:, :i].t() @ other[:, :j]).norm() ** 2) / min(i, j)
            assert float(grid[i - 1, j - 1]) == pytest.approx(phi, abs=1e-12)


def test_similarity_of_equal_nested_and_orthogonal_subspaces() -> None:
    basis = directions(30, 12, 0)
    same = similarity_grid(basis, basis)
    torch.testing.assert_close(same, torch.ones(12, 12, dtype=torch.float64))
    assert similarity_grid(basis[:, :4], basis[:, 4:]).abs().max() < 1e-12
    turned = basis[:, :4] @ directions(4, 4, 1)  # another basis of the same subspace
    assert float(similarity_grid(basis, turned)[3, 3]) == pytest.approx(1)


def test_random_baseline_is_what_random_directions_give() -> None:
    n, p, q, draws = 24, 3, 7, 3000
    grids = torch.stack([similarity_grid(directions(n, p, 2 * s), directions(n, q, 2 * s + 1)) for s in range(draws)])
    baseline = random_grid(n, p, q)
    for i, j in [(1, 1), (3, 7), (2, 5), (3, 1)]:
        spread = random_spread(n, i, j)
        drawn = grids[:, i - 1, j - 1]
        assert float(drawn.mean()) == pytest.approx(float(baseline[i - 1, j - 1]), abs=4 * spread / math.sqrt(draws))
        assert float(drawn.std()) == pytest.approx(spread, rel=0.08)


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
def test_overlap_is_that_of_the_dense_matrices(d: int, k: int, r: int, s: int, seed: int) -> None:
    one, other = delta_svd(*pair(d, k, r, seed), 0.5), delta_svd(*pair(d, k, s, seed + 99), -2.0)
    w, x = ((c.u * c.sigma) @ c.v.t() for c in (one, other))
    inner = float((w * x).sum())
    assert overlap.inner_product(one, other) == pytest.approx(inner, abs=1e-9)
    assert overlap.cosine(one, other) == pytest.approx(inner / float(w.norm() * x.norm()), abs=1e-9)
    assert overlap.interference(one, other) == pytest.approx(float((x @ one.v).norm() / (w @ one.v).norm()), abs=1e-9)
    wanted = float((w + x).norm()) / math.sqrt(float(w.norm() ** 2 + x.norm() ** 2))
    assert overlap.growth(one, other) == pytest.approx(wanted, abs=1e-9)
    a, b = overlap.merged_factors(one, other)
    torch.testing.assert_close(b @ a, w + x)


def test_overlap_of_equal_opposite_and_no_change() -> None:
    a, b = pair(20, 30, 4, 5)
    change, opposite, nothing = delta_svd(a, b, 1.0), delta_svd(a, b, -1.0), delta_svd(a, 0 * b, 1.0)
    assert overlap.cosine(change, change) == pytest.approx(1)
    assert overlap.growth(change, change) == pytest.approx(math.sqrt(2))
    assert overlap.growth(change, opposite) == pytest.approx(0, abs=1e-6)
    assert overlap.interference(change, opposite) == pytest.approx(1)
    assert overlap.cosine(change, nothing) is None
    assert overlap.interference(nothing, change) is None
    assert overlap.random_interference(nothing, change) is None
    assert overlap.growth(nothing, nothing) is None
    assert overlap.interference(change, nothing) == 0


def test_random_interference_is_what_unrelated_directions_give() -> None:
    own = delta_svd(*pair(40, 200, 4, 0), 1.0)
    others = [delta_svd(*pair(40, 200, 6, seed), 3.0) for seed in range(1, 200)]
    drawn = torch.tensor([overlap.interference(own, other) for other in others]).square().mean().sqrt()
    expected = torch.tensor([overlap.random_interference(own, other) for other in others]).square().mean().sqrt()
    assert float(drawn) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize(("d", "k"), [(600, 500), (450, 900), (30, 700)])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_leading_triplets_are_those_of_the_full_decomposition(d: int, k: int, power: float) -> None:
    weight = (
        decaying(d, k, power, 0).float() if power else torch.randn(d, k, generator=torch.Generator().manual_seed(1))
    )
    sigma = torch.linalg.svdvals(weight.double())
    found = leading(Sum(weight), 10, random_block(8, k, 0, weight), keep=16)
    assert found.error[:10].max() <= 1e-3
    torch.testing.assert_close(found.sigma.double()[:10], sigma[:10], rtol=1e-4, atol=0)
    assert float((found.sigma.double() ** 2).sum()) == pytest.approx(float((sigma[:16] ** 2).sum()), rel=1e-3)
    residual = weight.t() @ found.u - found.v * found.sigma
    measured = torch.linalg.vector_norm(residual.double(), dim=0) / sigma[0]
    torch.testing.assert_close(found.error.double(), measured, rtol=0.05, atol=3e-6)


def test_sum_is_the_dense_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 70, dtype=torch.float64)
    a, b = (t.double() for t in pair(50, 70, 3, 0))
    monkeypatch.setattr("lowrank.core.krylov.CACHED", 70 * 8)  # several blocks, the last one shorter
    x = torch.randn(70, 2, dtype=torch.float64)
    for matrix, dense in ((Sum(weight, a, b), weight + b @ a), (Sum(weight), weight)):
        there, back = matrix.there_and_back(x)
        torch.testing.assert_close(there, dense @ x)
        torch.testing.assert_close(back, dense.t() @ dense @ x)


def intruders_and_truth(weight: Tensor, a: Tensor, b: Tensor) -> tuple[list[float], list[float], list[float]]:
    """(similarity found, upper bound, the truth by full decompositions)."""
    k = weight.shape[1]
    known = leading(Sum(weight), 10, random_block(16, k, 0, weight), keep=20)
    tuned = leading(Sum(weight, a, b), 10, random_block(16, k, 1, weight))
    found = find_intruders(weight, known, tuned)
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    u2, _, vh2 = torch.linalg.svd((weight + b @ a).double(), full_matrices=False)
    overlaps = u.t() @ u2 if weight.shape[0] <= k else vh @ vh2.t()
    return found.similarity, found.at_most, overlaps[:, :10].abs().amax(0).tolist()


@pytest.mark.parametrize(("d", "k"), [(500, 640), (640, 480), (60, 90), (90, 60)])
@pytest.mark.parametrize("power", [0.0, 0.4])
@pytest.mark.parametrize("strength", [0.2, 1.0, 3.0])
def test_intruders_are_those_of_the_full_decomposition(d: int, k: int, power: float, strength: float) -> None:
    torch.manual_seed(0)
    weight = decaying(d, k, power, 3).float()
    top = torch.linalg.matrix_norm(weight, 2)
    a, b = torch.randn(6, k) / k**0.5, strength * top * torch.randn(d, 6) / d**0.5
    similarity, at_most, truth = intruders_and_truth(weight, a, b)
    for low, high, true in zip(similarity, at_most, truth, strict=True):
        assert low <= true + 2e-3
        assert true <= high + 2e-3
        assert (high < THRESHOLD) == (true < THRESHOLD)
    assert strength < 1 or sum(true < THRESHOLD for true in truth) >= 4  # so that there was something to find


@settings(max_examples=12, deadline=None)
@given(st.floats(0, 2), st.integers(30, 400), st.integers(0, 20))
def test_an_amplified_weak_direction_of_the_base_is_no_certain_intruder(noise: float, index: int, seed: int) -> None:
    """ΔW may raise a direction that W0 has, far down; it is W0's own, and the bound has to allow for it."""
    weight = decaying(420, 420, 0.4, 7).float()
    u, sigma, vh = torch.linalg.svd(weight.double())
    y = u[:, index] + noise * directions(420, 1, seed)[:, 0]
    similarity, at_most, truth = intruders_and_truth(
        weight, vh[[index]].float(), (3 * sigma[0] * y / y.norm()).unsqueeze(1).float()
    )
    for low, high, true in zip(similarity, at_most, truth, strict=True):
        assert low - 2e-3 <= true <= high + 2e-3


def test_largest_component_bound_is_sharp_for_a_singular_vector_and_small_for_a_mixture() -> None:
    weight = torch.randn(500, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.linalg.svd(weight).U
    columns = torch.stack([u[:, 250], directions(500, 1, 1)[:, 0]], dim=1)
    bounds = largest_components(weight, columns)
    assert float(bounds[0]) == pytest.approx(1, abs=1e-3)
    assert float(bounds[1]) < THRESHOLD


@pytest.mark.parametrize(("d", "k"), [(60, 90), (500, 450)])
def test_amplification_is_table_7(d: int, k: int) -> None:
    torch.manual_seed(1)
    weight = decaying(d, k, 0.5, 1).float()
    a, b = pair(d, k, 4, 2)
    change = delta_svd(a, b, 0.01)
    known = leading(Sum(weight), 4, random_block(8, k, 0, weight))
    measured = amplification(weight, change, known.sigma, float(weight.norm()))
    dense = 0.01 * b.double() @ a.double()
    u, _, vh = torch.linalg.svd(dense)
    inner = u[:, :4].t() @ weight.double() @ vh[:4].t()
    own_u, own_sigma, own_vh = torch.linalg.svd(weight.double())
    own = own_u[:, :4].t() @ weight.double() @ own_vh[:4].t()
    assert measured.along_change == pytest.approx(float(inner.norm()), rel=1e-4)
    assert measured.factor == pytest.approx(float(dense.norm() / inner.norm()), rel=1e-4)
    assert measured.along_own == pytest.approx(float(own.norm()), rel=1e-4)
    assert measured.along_own == pytest.approx(float(own_sigma[:4].norm()), rel=1e-4)
    drawn = [
        float((directions(d, 4, 2 * s).t() @ weight.double() @ directions(k, 4, 2 * s + 1)).square().sum())
        for s in range(400)
    ]
    assert measured.along_random == pytest.approx(math.sqrt(sum(drawn) / len(drawn)), rel=0.06)


def test_amplification_of_no_change_is_none() -> None:
    weight = torch.randn(20, 30)
    a, b = pair(20, 30, 2, 0)
    assert amplification(weight, delta_svd(a, 0 * b, 1.0), torch.ones(2), 1.0).factor is None
