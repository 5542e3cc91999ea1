"""The float32 products that go to oneDNN on some AMD processors: what they give, and where they are taken."""

import pytest
import torch

from lowrank.kernels import onednn, processor, reference
from lowrank.kernels.fused import fused_linear
from lowrank.kernels.processor import has_matrix_tiles
from test_kernels import relative


class TestProducts:
    """By oneDNN and without it, on whatever processor this is."""

    @pytest.fixture(params=[True, False], autouse=True)
    def chosen(self, request, monkeypatch):
        if request.param and not torch.backends.mkldnn.is_available():
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(onednn, "is_faster_here", lambda: request.param)
        calls = []
        real = onednn.times_transposed
        monkeypatch.setattr(onednn, "times_transposed", lambda *a: (calls.append(1), real(*a))[1])
        yield
        assert bool(calls) == request.param

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("expanded", [False, True])
    def test_gradients_are_those_of_the_reference(self, transposed, expanded):
        torch.manual_seed(0)
        weight = torch.randn(24, 40).t().contiguous().t() if transposed else torch.randn(24, 40)
        given = [torch.randn(2, 256, 40), torch.randn(8, 40), torch.randn(24, 8)]
        upstream = torch.randn(1, 1, 24).expand(2, 256, 24) if expanded else torch.randn(2, 256, 24)
        found = []
        for map_, dtype in ((fused_linear, torch.float32), (reference.lora_linear, torch.float64)):
            x, a, b = (tensor.to(dtype, copy=True).requires_grad_() for tensor in given)
            map_(x, weight.to(dtype), None, a, b, 2.0).backward(upstream.to(dtype))
            found.append((x.grad, a.grad, b.grad))
        for ours, exact in zip(*found, strict=True):
            assert relative(ours, exact) < 1e-6

    def test_projections_of_one_input_share_its_gradient(self):
        torch.manual_seed(0)
        x, weights = torch.randn(256, 16), torch.randn(3, 16, 16)
        factors = [(torch.randn(8, 16), torch.randn(16, 8)) for _ in weights]
        found = []
        for map_, dtype in ((fused_linear, torch.float32), (reference.lora_linear, torch.float64)):
            leaf = x.to(dtype, copy=True).requires_grad_()
            wide = [(w.to(dtype), a.to(dtype), b.to(dtype)) for w, (a, b) in zip(weights, factors, strict=True)]
            sum(map_(leaf, w, None, a, b, 0.5) for w, a, b in wide).square().sum().backward()
            found.append(leaf.grad)
        assert relative(*found) < 1e-6

    def test_an_adapter_that_changes_nothing_gives_the_answer_of_the_base_bit_for_bit(self):
        x, weight = torch.randn(256, 40), torch.randn(24, 40)
        a, b = torch.randn(8, 40, requires_grad=True), torch.zeros(24, 8, requires_grad=True)
        h = fused_linear(x, weight, None, a, b, 2.0)
        assert torch.equal(h, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
def test_onednn_serves_where_it_was_measured_and_nowhere_else(monkeypatch, capability, vendor):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("this torch has oneDNN or MKL alone: there is nothing to choose")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn, "vendor", lambda: vendor)
    for known in (processor.has_avx512, processor.has_matrix_tiles, onednn.is_faster_here):
        known.cache_clear()
    assert onednn.is_faster_here() == ((vendor, capability) == ("AuthenticAMD", "AVX512"))
    assert capability == "AVX512" or not has_matrix_tiles()
    for known in (processor.has_avx512, processor.has_matrix_tiles, onednn.is_faster_here):
        known.cache_clear()


def test_onednn_is_left_alone_where_it_is_turned_off_or_does_not_serve(monkeypatch):
    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)
    if torch.backends.mkldnn.is_available():
        assert onednn.serves(torch.empty(0), 256, 8) and onednn.serves(torch.empty(0), 1024, 8)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not onednn.serves(torch.empty(0), 256, 8)
    assert not any(onednn.serves(torch.empty(0), rows, 8) for rows in (0, 255, 257, 1000))
    assert not onednn.serves(torch.empty(0), 256, 7)
    assert not onednn.serves(torch.empty(0, dtype=torch.bfloat16), 256, 8)
    assert not onednn.serves(torch.empty(0, dtype=torch.float64), 256, 8)
