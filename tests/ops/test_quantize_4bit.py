"""quantize_4bit against the reference: bit-equal on CPU, neighbouring codes at thresholds only on CUDA."""

from __future__ import annotations

import math

import pytest
import torch

from assertions import assert_bitwise_equal, assert_codes_agree, assert_within
from op_cases import BLOCK_SIZES, DTYPES, QUANT_TYPES, SHAPES, randn
from qlora import ops, reference

NAN, INF = math.nan, math.inf


def check(x: torch.Tensor, block_size: int, quant_type: str) -> None:
    packed, absmax = ops.quantize_4bit(x, block_size, quant_type)
    expected, expected_absmax = reference.quantize_4bit(x.cpu(), block_size, quant_type)
    assert_bitwise_equal(absmax, expected_absmax)
    if x.device.type == "cpu":
        assert_bitwise_equal(packed, expected)
    assert packed.shape == expected.shape
    assert_codes_agree(packed, expected, x, absmax, block_size=block_size, quant_type=quant_type)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_and_scales_equal_the_reference(
    quant_type: str, block_size: int, dtype: torch.dtype, device: str
) -> None:
    check(randn(3, 4111, seed=block_size, dtype=dtype, device=device), block_size, quant_type)


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (2, 3, 5), (63,), (64,), (65,), (8191,)])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_odd_and_straddling_shapes_equal_the_reference(
    quant_type: str, shape: tuple[int, ...], device: str
) -> None:
    for dtype in DTYPES:
        check(randn(*shape, seed=1, dtype=dtype, device=device), 64, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_on_and_beside_each_threshold_take_the_right_code(quant_type: str, device: str) -> None:
    thresholds = reference.decision_thresholds(quant_type)
    infinity = torch.tensor(INF)
    values = torch.cat(
        [thresholds, torch.nextafter(thresholds, infinity), torch.nextafter(thresholds, -infinity)]
    )
    for absmax in (1.0, 4.0, 2.0**-100):  # a power of two: scaling is exact on every device
        x = torch.nn.functional.pad(values, (0, 63 - values.numel()))
        x = (torch.cat([x, torch.ones(1)]) * absmax).to(device)
        packed, _ = ops.quantize_4bit(x, 64, quant_type)
        expected, _ = reference.quantize_4bit(x.cpu(), 64, quant_type)
        if device == "cpu":
            assert_bitwise_equal(packed, expected)
        # CUDA flushes the subnormal beside FP4's threshold 0: code 0 instead of 8, both of value 0.
        values_of = reference.code_values(quant_type)
        got, wanted = (values_of[reference.unpack(bytes_.cpu(), 64).long()] for bytes_ in (packed, expected))
        assert_bitwise_equal(got + 0.0, wanted + 0.0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_code_quantises_to_itself(quant_type: str, device: str) -> None:
    values = reference.code_values(quant_type)
    x = values.repeat(4) * 3.0
    packed, absmax = ops.quantize_4bit(x.to(device), 64, quant_type)
    back = ops.dequantize_4bit(
        packed, absmax, x.shape, block_size=64, quant_type=quant_type, dtype=torch.float32
    )
    assert_within(back, x, 0.0)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantise_inverts_quantise_within_half_a_step(
    quant_type: str, block_size: int, device: str
) -> None:
    x = randn(5, 1001, seed=2, device=device)
    packed, absmax = ops.quantize_4bit(x, block_size, quant_type)
    back = ops.dequantize_4bit(
        packed, absmax, x.shape, block_size=block_size, quant_type=quant_type, dtype=torch.float32
    )
    # The widest gap of the code book; FP4's thresholds are rounded to 6 decimals, float32 rounding adds a few ulp.
    half_step = reference.code_values(quant_type).sort().values.diff().max().item() / 2 + 1e-6
    scales = absmax.repeat_interleave(block_size)[: x.numel()].reshape(x.shape)
    assert_within(back, x, half_step * scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_zero_block_keeps_scale_zero_and_the_code_of_zero(
    quant_type: str, byte: int, dtype: torch.dtype, device: str
) -> None:
    x = torch.zeros(3, 64, dtype=dtype, device=device)
    x[1] = 1.0
    x[2, ::2] = -0.0
    packed, absmax = ops.quantize_4bit(x, 64, quant_type)
    assert absmax.tolist() == [0.0, 1.0, 0.0]
    assert packed.view(3, 32)[0].eq(byte).all()
    assert packed.view(3, 32)[2].eq(byte).all()
    back = ops.dequantize_4bit(packed, absmax, x.shape, block_size=64, quant_type=quant_type, dtype=dtype)
    assert back[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(
    "specials", [(NAN,), (INF,), (-INF,), (INF, -INF), (NAN, INF), (-NAN, -INF, INF)], ids=str
)
def test_non_finite_values_mark_their_block_and_no_other(
    specials: tuple[float, ...], quant_type: str, dtype: torch.dtype, device: str
) -> None:
    for block_size in (32, 64, 1024):
        x = randn(3 * block_size + 5, seed=3, dtype=dtype)
        for i, value in enumerate(specials):
            x[block_size + 7 * i + 3] = value
        packed, absmax = ops.quantize_4bit(x.to(device), block_size, quant_type)
        expected, expected_absmax = reference.quantize_4bit(x, block_size, quant_type)
        assert_bitwise_equal(absmax, expected_absmax)
        bad = slice(block_size // 2, block_size)
        assert_bitwise_equal(packed[bad], expected[bad])
        assert absmax.cpu().isfinite().tolist() == [True, False, True, True]
        back = ops.dequantize_4bit(
            packed, absmax, x.shape, block_size=block_size, quant_type=quant_type, dtype=torch.float32
        ).cpu()
        block = slice(block_size, 2 * block_size)
        has_nan = any(math.isnan(value) for value in specials)
        survivors = torch.zeros(block_size, dtype=torch.bool) if has_nan else x[block].isinf()
        assert_bitwise_equal(back[block].isnan(), ~survivors)
        assert_bitwise_equal(back[block][survivors], x[block][survivors].float())
        assert back[:block_size].isfinite().all()
        assert back[2 * block_size :].isfinite().all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(
    "scale", [2.0**-149, 2.0**-140, 2.0**-128, 2.0**-126, 2.0**-120, 2.0**-103, 2.0**-101, 2.0**125, 2.0**127]
)
def test_subnormal_and_huge_blocks_equal_the_reference(scale: float, quant_type: str, device: str) -> None:
    x = (torch.linspace(-1.0, 1.0, 64) * scale).to(device)
    packed, absmax = ops.quantize_4bit(x, 64, quant_type)
    expected, expected_absmax = reference.quantize_4bit(x.cpu(), 64, quant_type)
    assert_bitwise_equal(absmax, expected_absmax)
    if device == "cpu":
        assert_bitwise_equal(packed, expected)
    assert_codes_agree(packed, expected, x, absmax, block_size=64, quant_type=quant_type)


def test_odd_count_fills_the_last_nibble_with_the_code_of_zero(device: str) -> None:
    x = torch.tensor([1.0, -1.0, 0.5], device=device)
    assert ops.quantize_4bit(x)[0][1].item() & 0xF == 7
    assert ops.quantize_4bit(x, quant_type="fp4")[0][1].item() & 0xF == 0


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("n", [1, 30, 31, 64, 1023])
def test_storage_dtype_views_the_same_bytes(storage: torch.dtype, n: int, device: str) -> None:
    x = randn(n, seed=4, device=device)
    expected, _ = ops.quantize_4bit(x)
    packed, absmax = ops.quantize_4bit(x, quant_storage=storage)
    assert packed.dtype == storage
    assert packed.shape == (-(-n // (2 * storage.itemsize)), 1)
    content = packed.view(-1).view(torch.uint8)
    assert_bitwise_equal(content[: expected.numel()], expected.flatten())
    assert content[expected.numel() :].eq(0).all()
    back = ops.dequantize_4bit(packed, absmax, x.shape, block_size=64, quant_type="nf4", dtype=torch.float32)
    assert_bitwise_equal(
        back,
        ops.dequantize_4bit(expected, absmax, x.shape, block_size=64, quant_type="nf4", dtype=torch.float32),
    )


@pytest.mark.gpu
def test_cpu_and_cuda_agree_on_a_large_tensor() -> None:
    x = randn(1024, 4096, seed=5, dtype=torch.bfloat16)
    for quant_type in QUANT_TYPES:
        packed, absmax = ops.quantize_4bit(x, 64, quant_type)
        packed_cuda, absmax_cuda = ops.quantize_4bit(x.cuda(), 64, quant_type)
        assert_bitwise_equal(absmax_cuda, absmax)
        assert_codes_agree(packed_cuda, packed, x, absmax, block_size=64, quant_type=quant_type)
