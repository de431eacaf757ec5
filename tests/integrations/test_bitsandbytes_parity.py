"""Byte parity with bitsandbytes' CUDA backend, and of our CPU and CUDA kernels with each other.

Two correct implementations may differ where a scaled value lies on a decision threshold: bitsandbytes multiplies by an
approximate reciprocal. So a code may differ only if the value, scaled in float64, is within 2 ulp of the threshold
between the two codes, and then they must be neighbours. Scales and dequantised values are bit-equal.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora import ops, reference

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = pytest.mark.gpu

BLOCK_SIZES = (64, 128, 256, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (512, 1152)
CASES = list(itertools.product(("nf4", "fp4"), BLOCK_SIZES, DTYPES))


def weight(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(SHAPE, device="cuda", generator=generator).to(dtype)


def codes_of(packed: torch.Tensor, n: int) -> torch.Tensor:
    """[n] codes; even index high nibble, odd low."""
    packed = packed.flatten()
    return torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[:n].long().cpu()


def order_of_codes(quant_type: str) -> torch.Tensor:
    """Position of each code on the number line."""
    values = reference.code_values(quant_type)
    return torch.argsort(torch.argsort(values, stable=True), stable=True)


def assert_neighbours_at_thresholds(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    x: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: str,
) -> int:
    """Checks every differing code; returns how many there are."""
    n = x.numel()
    ours, theirs = codes_of(ours, n), codes_of(theirs, n)
    index = (ours != theirs).nonzero().flatten()
    if index.numel() == 0:
        return 0
    position = order_of_codes(quant_type)
    apart = (position[ours[index]] - position[theirs[index]]).abs()
    scaled = x.double().flatten().cpu()[index] / absmax.double().cpu()[index // block_size]
    thresholds = reference.decision_thresholds(quant_type).double()
    nearest = thresholds[(scaled[:, None] - thresholds).abs().argmin(dim=1)]
    ulp = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(nearest.abs()))
    distance = (scaled - nearest).abs() / ulp
    assert apart.max() <= 1, (
        f"codes {ours[index][apart.argmax()]} and {theirs[index][apart.argmax()]} are no neighbours"
    )
    assert distance.max() <= 2, f"codes differ {distance.max():.1f} ulp away from a threshold"
    return index.numel()


@pytest.mark.parametrize(("quant_type", "block_size", "dtype"), CASES)
def test_codes_and_scales_equal_bitsandbytes(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    x = weight(dtype)
    packed, absmax = ops.quantize_4bit(x, block_size=block_size, quant_type=quant_type)
    theirs, state = bitsandbytes.functional.quantize_4bit(x, blocksize=block_size, quant_type=quant_type)
    torch.cuda.synchronize()
    assert torch.equal(absmax, state.absmax)
    differing = assert_neighbours_at_thresholds(packed, theirs, x, absmax, block_size, quant_type)
    print(
        f"\nparity {quant_type} {block_size} {dtype}: {differing} of {x.numel()} codes differ, all at thresholds"
    )


@pytest.mark.parametrize(("quant_type", "block_size", "dtype"), CASES)
def test_cpu_and_cuda_agree(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    x = weight(dtype)
    packed, absmax = ops.quantize_4bit(x, block_size=block_size, quant_type=quant_type)
    packed_cpu, absmax_cpu = ops.quantize_4bit(x.cpu(), block_size=block_size, quant_type=quant_type)
    assert torch.equal(absmax.cpu(), absmax_cpu)
    differing = assert_neighbours_at_thresholds(packed, packed_cpu, x, absmax, block_size, quant_type)
    print(
        f"\ncpu/cuda {quant_type} {block_size} {dtype}: {differing} of {x.numel()} codes differ, all at thresholds"
    )
    dequantized = ops.dequantize_4bit(
        packed, absmax, SHAPE, block_size=block_size, quant_type=quant_type, dtype=dtype
    )
    dequantized_cpu = ops.dequantize_4bit(
        packed.cpu(), absmax.cpu(), SHAPE, block_size=block_size, quant_type=quant_type, dtype=dtype
    )
    assert torch.equal(dequantized.cpu(), dequantized_cpu)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_double_quantised_scales_equal_bitsandbytes(block_size: int) -> None:
    x = weight(torch.bfloat16)
    _, absmax = ops.quantize_4bit(x, block_size=block_size)
    codes, nested_absmax, nested_quant_map, nested_offset = ops.quantize_absmax(absmax)
    _, state = bitsandbytes.functional.quantize_4bit(
        x, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    torch.cuda.synchronize()
    assert torch.equal(nested_quant_map, state.state2.code)
    assert torch.equal(nested_offset, state.offset)
    assert torch.equal(nested_absmax, state.state2.absmax)
    differing = (codes.int() - state.absmax.int()).abs()
    assert differing.max() <= 1
    # An 8-bit code may differ only where the scaled value is within 2 ulp of the midpoint of two neighbouring codes.
    scaled = (absmax - nested_offset).double() / nested_absmax.double().repeat_interleave(256)[
        : absmax.numel()
    ]
    lower = torch.minimum(codes, state.absmax).long().clamp(max=254)
    midpoint = (nested_quant_map[lower].double() + nested_quant_map[lower + 1].double()) / 2
    ulp = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(midpoint.abs()))
    at_midpoint = (scaled - midpoint).abs() <= 2 * ulp
    assert at_midpoint[differing > 0].all()
    print(
        f"\nparity of scales, block {block_size}: {int((differing > 0).sum())} of {absmax.numel()} codes differ"
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("quant_type", "block_size", "dtype"), CASES)
def test_dequantised_values_are_bit_equal_to_bitsandbytes(
    quant_type: str, block_size: int, dtype: torch.dtype, double_quant: bool
) -> None:
    x = weight(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        x, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    nested = {}
    if double_quant:
        nested = {
            "nested_absmax": state.state2.absmax,
            "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }
    for device in ("cuda", "cpu"):
        ours = ops.dequantize_4bit(
            packed.to(device),
            state.absmax.to(device),
            SHAPE,
            block_size=block_size,
            quant_type=quant_type,
            dtype=dtype,
            **{name: value.to(device) for name, value in nested.items()},
        )
        assert torch.equal(ours.cpu(), expected.cpu()), device
