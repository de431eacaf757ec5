"""Quantise on CPU: the bits are those of the format, whatever the instruction set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpu_library import (
    DTYPES,
    FORMATS,
    THRESHOLDS,
    ZERO_CODE,
    Library,
    from_dtype,
    quantize,
    to_dtype,
    unpack,
)


def assert_quantizes_to_reference(lib: Library, x: np.ndarray, block_size: int, quant_type: str) -> None:
    packed, absmax = lib.quantize(x, block_size, quant_type)
    expected_packed, expected_absmax = quantize(x, block_size, quant_type)
    np.testing.assert_array_equal(absmax, expected_absmax)
    np.testing.assert_array_equal(packed, expected_packed)


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("n", [1, 2, 31, 33, 64, 100, 4097, 12345])
def test_bits_equal_the_format(lib: Library, n: int, block_size: int, dtype: str, quant_type: str) -> None:
    rng = np.random.default_rng(n + block_size)
    x = to_dtype(rng.standard_normal(n) * np.exp(rng.uniform(-3, 3, n)), dtype)
    packed, absmax = lib.quantize(x, block_size, quant_type, dtype)
    expected_packed, expected_absmax = quantize(from_dtype(x, dtype), block_size, quant_type)
    np.testing.assert_array_equal(absmax, expected_absmax)
    np.testing.assert_array_equal(packed, expected_packed)


@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_tie_goes_to_the_lower_code_and_the_next_float_to_the_higher(lib: Library, quant_type: str) -> None:
    thresholds = THRESHOLDS[quant_type]
    above = np.nextafter(thresholds, np.float32(np.inf))
    values = np.concatenate([thresholds, above, -thresholds, -above])
    x = np.zeros(64, np.float32)
    x[: values.size] = values
    x[-1] = 1.0  # absmax 1: scaling changes nothing
    packed, absmax = lib.quantize(x, 64, quant_type)
    codes = unpack(packed, 64)
    n = thresholds.size
    assert absmax[0] == 1.0
    assert (codes[:n] != codes[n : 2 * n]).all()
    np.testing.assert_array_equal(packed, quantize(x, 64, quant_type)[0])


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize(
    "magnitude", [1e-45, 1e-40, 5.9e-39, 1.1e-38, 1.3e-38, 1e-30, 1e30, 8e37, 9e37, 3.4e38]
)
def test_every_finite_magnitude_keeps_its_codes(lib: Library, magnitude: float, quant_type: str) -> None:
    x = (np.random.default_rng(0).uniform(-1, 1, 640) * magnitude).astype(np.float32)
    assert_quantizes_to_reference(lib, x, 64, quant_type)


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_blocks_use_the_whole_range_of_codes(lib: Library, dtype: str, quant_type: str) -> None:
    largest = {"float32": 2.0**-130, "float16": 2.0**-15, "bfloat16": 2.0**-130}[dtype]
    x = to_dtype(np.linspace(-largest, largest, 64), dtype)
    packed, absmax = lib.quantize(x, 64, quant_type, dtype)
    assert absmax[0] == np.float32(largest)
    plus, minus = {"nf4": (15, 0), "fp4": (3, 11)}[quant_type]
    codes = unpack(packed, 64)
    assert codes[0] == minus and codes[-1] == plus
    assert np.unique(codes).size >= 8


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_blocks_follow_the_policy(lib: Library, dtype: str, quant_type: str) -> None:
    zero_code = ZERO_CODE[quant_type]
    one, minus_one = {"nf4": (15, 0), "fp4": (3, 11)}[quant_type]
    blocks = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    blocks[0] = 0.0
    blocks[0, 3] = -0.0
    blocks[1, 40] = np.nan
    blocks[2, [5, 6]] = [np.inf, -np.inf]
    blocks[3, 7], blocks[3, 8] = -np.inf, np.nan
    packed, absmax = lib.quantize(to_dtype(blocks.reshape(-1), dtype), 64, quant_type, dtype)
    codes = unpack(packed, blocks.size).reshape(5, 64)
    assert absmax[0] == 0.0 and (codes[0] == zero_code).all()
    assert np.isnan(absmax[1]) and (codes[1] == zero_code).all()
    assert absmax[2] == np.inf and codes[2, 5] == one and codes[2, 6] == minus_one
    assert (np.delete(codes[2], [5, 6]) == zero_code).all()
    assert np.isnan(absmax[3]) and (codes[3] == zero_code).all()
    assert np.isfinite(absmax[4]) and np.unique(codes[4]).size > 8


def test_every_nan_gives_the_same_nan_scale(lib: Library) -> None:
    x = np.ones((3, 64), np.float32)
    x.view(np.uint32)[:, 9] = [0x7F800001, 0xFFC00000, 0x7FFFFFFF]
    absmax = lib.quantize(x, 64, "nf4")[1]
    np.testing.assert_array_equal(absmax.view(np.uint32), np.full(3, 0x7FC00000, np.uint32))


@pytest.mark.parametrize("quant_type", FORMATS)
def test_the_padding_nibble_is_the_code_of_zero(lib: Library, quant_type: str) -> None:
    packed, _ = lib.quantize(np.full(33, 2.0, np.float32), 32, quant_type)
    assert packed[-1] & 0xF == ZERO_CODE[quant_type]


def test_a_range_of_blocks_writes_nothing_else(lib: Library) -> None:
    x = np.random.default_rng(2).standard_normal(64 * 9 + 11).astype(np.float32)
    whole_packed, whole_absmax = lib.quantize(x, 64, "nf4")
    out = np.full(whole_packed.size, 0xA5, np.uint8), np.full(whole_absmax.size, -1.0, np.float32)
    packed, absmax = lib.quantize(x, 64, "nf4", blocks=(3, 10), out=out)
    np.testing.assert_array_equal(packed[96:], whole_packed[96:])
    np.testing.assert_array_equal(absmax[3:], whole_absmax[3:])
    assert (packed[:96] == 0xA5).all() and (absmax[:3] == -1.0).all()
    packed, absmax = lib.quantize(x, 64, "nf4", blocks=(4, 4), out=out)
    np.testing.assert_array_equal(packed[96:], whole_packed[96:])


def test_disjoint_ranges_run_in_parallel(lib: Library) -> None:
    x = np.random.default_rng(3).standard_normal(32 * 1001).astype(np.float32)
    whole = lib.quantize(x, 32, "nf4")
    out = np.zeros_like(whole[0]), np.zeros_like(whole[1])
    edges = np.linspace(0, 1001, 24).astype(int).tolist()
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: lib.quantize(x, 32, "nf4", blocks=(edges[i], edges[i + 1]), out=out), range(23)
            )
        )
    np.testing.assert_array_equal(out[0], whole[0])
    np.testing.assert_array_equal(out[1], whole[1])
