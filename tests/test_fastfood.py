"""The projection behind the intrinsic dimension: against its dense matrix, its adjoint, and the norm it keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.core import fastfood
from lowrank.core.fastfood import Fastfood, walsh_hadamard

SIZES = st.tuples(st.integers(1, 300), st.integers(0, 700)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def dense_hadamard(n: int) -> torch.Tensor:
    """From the bits: entry (i, j) is (−1)^(number of ones in i & j), over √n."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64) / n**0.5


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 512])
def test_the_fast_transform_is_the_dense_one(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(x), x @ dense_hadamard(n), atol=1e-12)


def test_the_transform_is_its_own_inverse_also_where_it_takes_three_passes() -> None:
    x = torch.randn(2**14, dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(walsh_hadamard(x)), x, atol=1e-12)


def test_a_width_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two, not 6"):
        walsh_hadamard(torch.ones(6))


def dense(projection: Fastfood) -> torch.Tensor:
    """P (D, d) put together from its definition, factor by factor."""
    n, blocks = projection.width, []
    h = dense_hadamard(n)
    for signs, order, gauss in zip(projection._signs, projection._order, projection._gauss, strict=True):
        permutation = torch.eye(n, dtype=torch.float64)[order.long()]
        blocks.append(h @ gauss.double().diag() @ permutation @ h @ signs.double().diag())
    return torch.cat(blocks)[: projection.dimensions, : projection.d] * (n / projection.dimensions) ** 0.5


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_it_is_its_dense_matrix_and_its_adjoint_is_the_transpose(sizes: tuple[int, int], seed: int) -> None:
    d, dimensions = sizes
    projection = Fastfood(d, dimensions, seed)
    u, v = torch.randn(d, dtype=torch.float64), torch.randn(dimensions, dtype=torch.float64)
    matrix = dense(projection)
    assert torch.allclose(projection.times(u), matrix @ u, atol=1e-10)
    assert torch.allclose(projection.transposed_times(v), matrix.T @ v, atol=1e-10)
    assert torch.isclose(projection.times(u) @ v, u @ projection.transposed_times(v), atol=1e-9)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = Fastfood(10, 1000, 0)
    u, v = torch.randn(10), torch.randn(1000)
    whole = projection.times(u), projection.transposed_times(v)
    monkeypatch.setattr(fastfood, "CHUNK", 100)
    assert torch.allclose(projection.times(u), whole[0], atol=1e-6)
    assert torch.allclose(projection.transposed_times(v), whole[1], atol=1e-5)


@pytest.mark.parametrize(("d", "dimensions"), [(1, 50), (5, 1000), (64, 640), (100, 101)])
def test_norms_are_kept_in_expectation(d: int, dimensions: int) -> None:
    u = torch.randn(d, dtype=torch.float64)
    norms = [Fastfood(d, dimensions, seed).times(u).square().sum() for seed in range(400)]
    ratios = torch.stack(norms) / u.square().sum()
    assert abs(float(ratios.mean()) - 1) < 5 * float(ratios.std()) / 20  # five standard errors


def test_the_gradient_is_the_adjoint() -> None:
    projection = Fastfood(7, 40, 3)
    u = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projection, (u,))


def test_the_seed_is_all_there_is() -> None:
    u = torch.randn(9)
    assert torch.equal(Fastfood(9, 100, 5).times(u), Fastfood(9, 100, 5).times(u))
    assert not torch.equal(Fastfood(9, 100, 5).times(u), Fastfood(9, 100, 6).times(u))


@pytest.mark.parametrize(("d", "dimensions"), [(0, 5), (6, 5)])
def test_more_dimensions_than_there_are_is_refused(d: int, dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {dimensions} dimensions, not {d}"):
        Fastfood(d, dimensions, 0)
