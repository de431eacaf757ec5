"""Double quantisation of the scales on CPU, and its code book."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cpu_library import NESTED_BLOCK_SIZE, Library, scale_to_unit

# SHA-256 of bitsandbytes 0.50.2's functional.create_dynamic_map(signed=True) as little-endian fp32, torch 2.14.1.
CODE_DIGEST = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
ZERO_CODE = 127


def nearest(code: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Index of the nearest entry; half-way, the even one."""
    midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    index = np.searchsorted(midpoints, scaled, side="left")
    is_half_way = midpoints[np.minimum(index, 254)] == scaled
    return (index + (is_half_way & (index % 2 == 1))).astype(np.uint8)


def scales(n: int) -> np.ndarray:
    return np.abs(np.random.default_rng(n).standard_normal(n) * 0.1 + 2).astype(np.float32)


def test_code_book_is_bitsandbytes_own(lib: Library) -> None:
    code = lib.nested_code()
    assert (np.diff(code) > 0).all() and code[ZERO_CODE] == 0.0 and code[-1] == 1.0
    assert hashlib.sha256(code.astype("<f4").tobytes()).hexdigest() == CODE_DIGEST


def test_code_book_equals_the_installed_bitsandbytes(lib: Library) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without avx2 torch.linspace rounds differently, and bitsandbytes' map with it")
    np.testing.assert_array_equal(lib.nested_code(), functional.create_dynamic_map(signed=True).numpy())


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_codes_are_nearest_and_decode_in_two_roundings(lib: Library, n: int) -> None:
    absmax = scales(n)
    offset = np.float32(absmax.mean())
    codes, nested_absmax = lib.quantize_absmax(absmax, float(offset))

    blocks = np.pad(absmax - offset, (0, -n % NESTED_BLOCK_SIZE)).reshape(-1, NESTED_BLOCK_SIZE)
    expected_absmax = np.abs(blocks).max(axis=1)
    expected = nearest(lib.nested_code(), np.nan_to_num(scale_to_unit(blocks, expected_absmax))).reshape(-1)[
        :n
    ]
    np.testing.assert_array_equal(nested_absmax, expected_absmax)
    np.testing.assert_array_equal(codes, expected)

    decoded = lib.dequantize_absmax(codes, nested_absmax, float(offset))
    product = lib.nested_code()[codes] * np.repeat(nested_absmax, NESTED_BLOCK_SIZE)[:n]
    np.testing.assert_array_equal(decoded, product + offset)


def test_a_value_half_way_takes_the_even_code(lib: Library) -> None:
    code = lib.nested_code()
    midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    for values in (
        midpoints,
        np.nextafter(midpoints, np.float32(-2)),
        np.nextafter(midpoints, np.float32(2)),
    ):
        absmax = np.append(values, np.float32(1.0))  # scaled by 1
        codes, nested_absmax = lib.quantize_absmax(absmax, 0.0)
        assert nested_absmax[0] == 1.0
        np.testing.assert_array_equal(codes, nearest(code, absmax))
    ties = lib.quantize_absmax(np.append(midpoints, np.float32(1.0)), 0.0)[0][:-1]
    assert (ties % 2 == 0).all()


@pytest.mark.parametrize("value", [2.5, np.nan, np.inf])
def test_a_group_without_spread_or_finite_scales_takes_the_code_of_zero(lib: Library, value: float) -> None:
    absmax = np.full(300, 2.5, np.float32)
    absmax[7] = value
    codes, nested_absmax = lib.quantize_absmax(absmax, 2.5)
    assert (codes == ZERO_CODE).all()
    np.testing.assert_array_equal(nested_absmax, np.float32([abs(value - 2.5), 0.0]))
    decoded = lib.dequantize_absmax(codes, nested_absmax, 2.5)
    assert (decoded[256:] == 2.5).all()
    assert (decoded[:256] == 2.5).all() if value == 2.5 else np.isnan(decoded[:256]).all()


def test_subnormal_spread_keeps_its_codes(lib: Library) -> None:
    absmax = (np.random.default_rng(0).uniform(-1, 1, 256) * 2.0**-130).astype(np.float32)
    absmax[0] = 2.0**-130
    codes, nested_absmax = lib.quantize_absmax(absmax, 0.0)
    assert nested_absmax[0] == np.float32(2.0**-130)
    expected = nearest(lib.nested_code(), (absmax.astype(np.float64) * 2.0**130).astype(np.float32))
    np.testing.assert_array_equal(codes, expected)


def test_a_range_writes_nothing_else(lib: Library) -> None:
    absmax = scales(256 * 4 + 10)
    whole_codes, whole_absmax = lib.quantize_absmax(absmax, 2.0)
    codes, nested_absmax = lib.quantize_absmax(absmax, 2.0, groups=(1, 3))
    np.testing.assert_array_equal(codes[256:768], whole_codes[256:768])
    np.testing.assert_array_equal(nested_absmax[1:3], whole_absmax[1:3])
    assert (codes[:256] == 0).all() and (codes[768:] == 0).all()
    assert (nested_absmax[[0, 3, 4]] == 0).all()
    decoded = lib.dequantize_absmax(whole_codes, whole_absmax, 2.0, scales=(5, 300))
    np.testing.assert_array_equal(
        decoded[5:300], lib.dequantize_absmax(whole_codes, whole_absmax, 2.0)[5:300]
    )
    assert (decoded[:5] == 0).all() and (decoded[300:] == 0).all()
