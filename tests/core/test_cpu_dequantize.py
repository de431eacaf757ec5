"""Dequantise and embedding on CPU: code * scale in fp32, rounded once, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_library import DTYPES, FORMATS, Library, Weight, assert_same_bits, dequantize

# rows, cols, block size: whole, straddling, odd and partial blocks.
SHAPES = [(4, 64, 64), (5, 48, 64), (7, 33, 32), (1, 1, 32), (3, 1001, 4096), (40, 513, 128), (2, 31, 64)]


def random_weight(
    lib: Library, shape: tuple[int, int], block_size: int, quant_type: str, *, is_nested: bool
) -> Weight:
    """Random bytes, and scales over the whole range that matters to 16-bit dtypes."""
    rng = np.random.default_rng(sum(shape) + block_size)
    n = shape[0] * shape[1]
    num_blocks = -(-n // block_size)
    weight = Weight(shape, block_size, quant_type, rng.integers(0, 256, (n + 1) // 2, np.uint8))
    if is_nested:
        weight.absmax_codes = rng.integers(0, 256, num_blocks, np.uint8)
        weight.nested_absmax = rng.uniform(0.01, 3, -(-num_blocks // 256)).astype(np.float32)
        weight.nested_code = lib.nested_code()
        weight.nested_offset = np.float32([1.2345678])
    else:
        weight.absmax = np.exp(rng.uniform(np.log(1e-9), np.log(1e6), num_blocks)).astype(np.float32)
    return weight


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain-scales", "nested-scales"])
@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_the_format(
    lib: Library, shape: tuple[int, int, int], dtype: str, quant_type: str, is_nested: bool
) -> None:
    rows, cols, block_size = shape
    weight = random_weight(lib, (rows, cols), block_size, quant_type, is_nested=is_nested)
    assert_same_bits(lib.dequantize(weight, dtype), dequantize(weight, dtype), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even_at_every_exponent(lib: Library, dtype: str) -> None:
    rng = np.random.default_rng(5)
    blocks = 4096
    scale_bits = (np.arange(blocks, dtype=np.uint32) << 19) + rng.integers(0, 1 << 19, blocks, np.uint32)
    packed = rng.integers(0, 256, blocks * 16, np.uint8)
    weight = Weight((blocks, 32), 32, "nf4", packed, scale_bits.view(np.float32))
    assert_same_bits(lib.dequantize(weight, dtype), dequantize(weight, dtype), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_way_values_round_to_even(lib: Library, dtype: str) -> None:
    mantissa_bits = 10 if dtype == "float16" else 7
    half = 2.0 ** -(mantissa_bits + 1)
    absmax = np.float32([1 + half, 1 + 3 * half, 1 + half * (1 + 2.0**-8), 1 + half * (1 - 2.0**-8)])
    weight = Weight((4, 32), 32, "nf4", np.full(64, 0xFF, np.uint8), absmax)  # 15: the code of 1
    y = lib.dequantize(weight, dtype)
    assert_same_bits(y, dequantize(weight, dtype), dtype)
    assert len({*y[[0, 3], 0].view(np.uint16)}) == 1 and len({*y[[1, 2], 0].view(np.uint16)}) == 2


def test_a_non_finite_scale_shows_in_all_its_block(lib: Library) -> None:
    weight = Weight((3, 32), 32, "nf4", np.full(48, 0x9F, np.uint8), np.float32([np.nan, np.inf, 1.0]))
    y = lib.dequantize(weight)
    assert np.isnan(y[0]).all() and np.isinf(y[1]).all() and np.isfinite(y[2]).all()


def test_a_range_of_blocks_writes_nothing_else(lib: Library) -> None:
    weight = random_weight(lib, (10, 33), 32, "nf4", is_nested=True)
    whole = lib.dequantize(weight).reshape(-1)
    part = lib.dequantize(weight, blocks=(2, 5)).reshape(-1)
    np.testing.assert_array_equal(part[64:160], whole[64:160])
    assert (part[:64] == 0).all() and (part[160:] == 0).all()


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain-scales", "nested-scales"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "block_size"), [(50, 64, 64), (50, 33, 64), (9, 1001, 32), (6, 7, 4096)]
)
def test_embedding_picks_rows(
    lib: Library, rows: int, cols: int, block_size: int, dtype: str, is_nested: bool
) -> None:
    weight = random_weight(lib, (rows, cols), block_size, "nf4", is_nested=is_nested)
    indices = np.random.default_rng(6).integers(0, rows, 40)
    indices[:2] = [rows - 1, 0]
    assert_same_bits(lib.embedding(indices, weight, dtype), dequantize(weight, dtype)[indices], dtype)


def test_embedding_of_a_range_writes_nothing_else(lib: Library) -> None:
    weight = random_weight(lib, (8, 33), 64, "nf4", is_nested=False)
    indices = np.arange(8)[::-1].copy()
    y = lib.embedding(indices, weight, units=(3, 5))
    np.testing.assert_array_equal(y[3:5], dequantize(weight)[[4, 3]])
    assert (y[:3] == 0).all() and (y[5:] == 0).all()
