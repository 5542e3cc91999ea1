"""Every stored form gives its matrix as the format's own package does, whole and by rows."""

import pytest
import torch

import lowrank
from lowrank.core.stored import FourBit, Int8Rows, Mxfp4, Nested, Scaled, Stored, requantise
from lowrank.core.stored.mxfp4 import E2M1
from quantised_models import dequantised

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((37, 96), (64, 192), (10, 31), (300, 256))


def check_rows(stored, whole):
    """Rows are the whole's rows, and a reader in another dtype gets the format's own matrix rounded to it."""
    for rows in (slice(0, 1), slice(3, 7), slice(1, whole.shape[0])):
        assert torch.equal(stored.rows(rows), whole[rows])
    for dtype in DTYPES:
        assert torch.equal(stored.matrix(dtype), whole.to(dtype))
    assert stored.shape == whole.shape and stored.dtype is whole.dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_s(kind, dtype, double, shape):
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(torch.randn(shape).to(dtype), quant_type=kind, compress_statistics=double)
    absmax = state.absmax
    if double:
        absmax = Nested(absmax, state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    stored = FourBit(packed.flatten(), absmax, state.code, state.blocksize, state.shape, state.dtype, kind)
    check_rows(stored, dequantised(packed, state))


def test_int8_is_bitsandbytes_s():
    bnb = pytest.importorskip("bitsandbytes.functional")
    numbers, absmax, _ = bnb.int8_vectorwise_quant(torch.randn(33, 50).half())
    check_rows(Int8Rows(numbers, absmax), bnb.int8_vectorwise_dequant(numbers, absmax))


@pytest.mark.parametrize("block", [(16, 32), (40, 64), (1, 64), (1, 16)])
def test_fp8_is_transformers_s(block):
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    numbers = torch.randn(40, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-40 // block[0]), 64 // block[1]) + 0.5
    ours = Scaled(numbers, scales, block, torch.float32)
    wanted = integration._dequantize_fp8_weight(numbers, scales, list(block), torch.float32)
    check_rows(ours, wanted)


def test_a_last_block_may_be_cut():
    numbers = torch.randint(-127, 128, (10, 20), dtype=torch.int8)
    scales, zero = torch.rand(3, 3), torch.randint(-3, 4, (3, 3), dtype=torch.int8)
    wanted = torch.tensor(
        [
            [(int(numbers[i, j]) - int(zero[i // 4, j // 8])) * scales[i // 4, j // 8] for j in range(20)]
            for i in range(10)
        ]
    )
    check_rows(Scaled(numbers, scales, (4, 8), torch.float32, zero), wanted)


def test_mxfp4_goes_back_to_the_same_numbers_and_to_the_nearest():
    blocks = torch.randint(0, 256, (12, 3, 16), dtype=torch.uint8)
    stored = Mxfp4(blocks, torch.randint(110, 140, (12, 3), dtype=torch.uint8), torch.float32)
    assert torch.equal(requantise(stored.matrix(), stored).matrix(), stored.matrix())
    matrix = torch.randn(12, 96)
    got = requantise(matrix, stored)
    power = torch.floor(torch.log2(matrix.view(12, 3, 32).abs().amax(-1)))
    assert torch.equal(got.scales.float() - 127, power - 2)
    every = torch.tensor(E2M1).view(-1, 1, 1, 1) * torch.exp2(power - 2).unsqueeze(-1)
    nearest = (every - matrix.view(12, 3, 32)).abs().amin(0)
    torch.testing.assert_close((got.matrix() - matrix).abs().view(12, 3, 32), nearest)
    halves = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, *[0.0] * 22]).expand(12, 96 // 32, 32)
    even = requantise(halves.reshape(12, 96), stored).matrix()[0, :10]
    assert even.tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0, -1]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("block", [(16, 32), (1, 64), (1, 16), (40, 64)])
def test_scaled_numbers_go_back_to_themselves(kind, block):
    """Where every block has the largest number, as whoever quantises gives it one."""
    grid = (-(-40 // block[0]), 64 // block[1])
    largest = torch.finfo(kind).max if kind.is_floating_point else 127
    numbers = torch.randn(40, 64).mul(20).to(kind)
    numbers[:: block[0], :: block[1]] = largest
    scales = torch.exp2(torch.randint(-12, -4, grid).float())
    stored = Scaled(numbers, scales, block, torch.float32)
    again = requantise(stored.matrix(), stored)
    assert torch.equal(again.scales, scales) and torch.equal(again.matrix(), stored.matrix())


def test_mxfp4_is_transformers_s():
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (1, 12, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (1, 12, 3), dtype=torch.uint8)
    wanted = integration.convert_moe_packed_tensors(blocks, scales)[0].t()
    check_rows(Mxfp4(blocks[0], scales[0]), wanted.contiguous())


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_small_numbers_are_compressed_tensors_s(kind, strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    numbers = torch.randint(-127, 128, (48, 64), dtype=torch.int8)
    numbers = torch.randn(48, 64).to(torch.float8_e4m3fn) if kind == "float" else numbers
    grid = {"tensor": (1, 1), "channel": (48, 1), "group": (48, 4)}[strategy]
    options = {"group_size": 16} if strategy == "group" else {}
    arguments = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, **options)
    for dtype in (torch.bfloat16, torch.float32):
        scales = torch.rand(grid).to(dtype)
        wanted = dequantize(numbers, scales.view(-1) if strategy == "tensor" else scales, None, arguments)
        check_rows(Scaled(numbers, scales, (48 // grid[0], 64 // grid[1]), dtype), wanted.to(dtype))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_torchao_s_tensors_are_adapted(kind):
    torchao = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    if kind == "int8":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        weight = model[0].weight.dequantize()
    else:
        nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        model[0].weight = torch.nn.Parameter(nf4.to_nf4(model[0].weight.detach(), 64, 256), requires_grad=False)
        weight = model[0].weight.get_original_weight()
    lowrank.inject(model, lowrank.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    x = torch.randn(200, 64)
    assert isinstance(model[0].held(), Stored) and model[0].plain_reason is None
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight, model[0].bias))
    check_rows(model[0].held(), weight.detach())
