"""y = x W^T + b and dx = dy W on CPU: against float64, and independent of ranges and of the other rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cpu_library import (
    DTYPES,
    ROUNDOFF,
    STORAGE,
    SUBNORMAL_STEP,
    Array,
    Library,
    Weight,
    dequantize,
    from_dtype,
    to_dtype,
)

CHUNK = 256  # Sums run over chunks of this depth, then over the chunks.
# n, k, block size: whole groups, blocks straddling rows, odd rows, partial last block and tile, several chunks.
SHAPES = [
    (64, 64, 64),
    (100, 96, 128),
    (33, 47, 32),
    (7, 1000, 4096),
    (1, 1, 32),
    (300, 320, 256),
    (257, 576, 64),
    (40, 1568, 64),
]
# One row; each instruction set's few rows; tiles less, equal and more than full; more than one strip of rows.
ROWS = [1, 2, 3, 4, 5, 8, 9, 12, 13, 100, 241]


def randn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def make_weight(
    lib: Library, n: int, k: int, block_size: int, quant_type: str = "nf4", *, is_nested: bool = True
) -> Weight:
    return lib.weight(randn(n, k, seed=1), block_size, quant_type, is_nested=is_nested)


def assert_close(actual: Array, x: Array, w: Array, bias: Array | None, dtype: str) -> None:
    """|error| <= the bound of a chunked fp32 sum of x w, the sum with the bias, and one rounding to dtype.

    A sum of t terms, in any order, errs by at most t u sum |x w| (u = 2^-24, higher orders inside one extra term).
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    exact, magnitude = x @ w, np.abs(x) @ np.abs(w)
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + np.abs(bias)
    depth = w.shape[0]
    terms = min(depth, CHUNK) + -(-depth // CHUNK) + 3
    bound = terms * 2.0**-24 * magnitude
    bound += ROUNDOFF[dtype] * (np.abs(exact) + bound) + SUBNORMAL_STEP[dtype]
    error = np.abs(from_dtype(actual, dtype) - exact)
    worst = np.unravel_index(np.argmax(error / bound), error.shape) if error.size else None
    assert (error <= bound).all(), f"at {worst}: {error[worst]} over the bound {bound[worst]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_linear_equals_float64_within_fp32_sums(
    lib: Library, n: int, k: int, block_size: int, m: int, dtype: str
) -> None:
    weight = make_weight(lib, n, k, block_size)
    x, bias = to_dtype(randn(m, k), dtype), to_dtype(randn(n, seed=2), dtype)
    w = dequantize(weight).T
    values = from_dtype(x, dtype)
    assert_close(lib.linear(x, weight, dtype, bias), values, w, from_dtype(bias, dtype), dtype)
    assert_close(lib.linear(x, weight, dtype), values, w, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_grad_input_equals_float64_within_fp32_sums(
    lib: Library, n: int, k: int, block_size: int, m: int, dtype: str
) -> None:
    weight = make_weight(lib, n, k, block_size)
    dy = to_dtype(randn(m, n), dtype)
    dx = lib.linear_grad_input(dy, weight, dtype)
    assert_close(dx, from_dtype(dy, dtype), dequantize(weight), None, dtype)


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain-scales", "nested-scales"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize(("n", "k", "block_size"), [(70, 192, 32), (70, 192, 4096), (70, 75, 64)])
def test_every_kind_of_weight(
    lib: Library, n: int, k: int, block_size: int, m: int, quant_type: str, is_nested: bool
) -> None:
    weight = make_weight(lib, n, k, block_size, quant_type, is_nested=is_nested)
    w = dequantize(weight)
    x, dy = randn(m, k), randn(m, n)
    assert_close(lib.linear(x, weight), x, w.T, None, "float32")
    assert_close(lib.linear_grad_input(dy, weight), dy, w, None, "float32")


@pytest.mark.parametrize(("n", "k", "block_size"), [(70, 576, 64), (70, 75, 64), (50, 544, 256)])
def test_a_row_does_not_depend_on_the_others(lib: Library, n: int, k: int, block_size: int) -> None:
    weight = make_weight(lib, n, k, block_size)
    x, dy, bias = randn(245, k), randn(245, n), randn(n, seed=2)
    y, dx = lib.linear(x, weight, bias=bias), lib.linear_grad_input(dy, weight)
    for m in ROWS:
        for first in (0, 245 - m):
            rows = slice(first, first + m)
            np.testing.assert_array_equal(lib.linear(x[rows].copy(), weight, bias=bias), y[rows])
            np.testing.assert_array_equal(lib.linear_grad_input(dy[rows].copy(), weight), dx[rows])


@pytest.mark.parametrize("m", [1, 3, 30])
@pytest.mark.parametrize(("n", "k", "block_size"), [(70, 96, 64), (70, 75, 64), (67, 64, 32)])
def test_a_range_writes_its_columns_and_nothing_else(
    lib: Library, n: int, k: int, block_size: int, m: int
) -> None:
    weight = make_weight(lib, n, k, block_size)
    x, dy, bias = randn(m, k), randn(m, n), randn(n, seed=2)
    y, dx = lib.linear(x, weight, bias=bias), lib.linear_grad_input(dy, weight)
    for begin, end in [(0, 1), (1, 2), (5, 38), (16, 32), (31, 64), (n - 1, n), (9, 9)]:
        part = lib.linear(x, weight, bias=bias, rows=(begin, end), out=np.full((m, n), 7.0, np.float32))
        expected = np.full((m, n), 7.0, np.float32)
        expected[:, begin:end] = y[:, begin:end]
        np.testing.assert_array_equal(part, expected)
        cols = min(begin, k), min(end, k)
        part = lib.linear_grad_input(dy, weight, cols=cols, out=np.full((m, k), 7.0, np.float32))
        expected = np.full((m, k), 7.0, np.float32)
        expected[:, slice(*cols)] = dx[:, slice(*cols)]
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("m", [2, 40])
def test_disjoint_ranges_run_in_parallel(lib: Library, m: int) -> None:
    n, k = 203, 320
    weight = make_weight(lib, n, k, 64)
    x, dy = randn(m, k), randn(m, n)
    y, dx = np.zeros((m, n), np.float32), np.zeros((m, k), np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: lib.linear(x, weight, rows=(i * n // 9, (i + 1) * n // 9), out=y), range(9)))
        list(
            pool.map(
                lambda i: lib.linear_grad_input(dy, weight, cols=(i * k // 9, (i + 1) * k // 9), out=dx),
                range(9),
            )
        )
    np.testing.assert_array_equal(y, lib.linear(x, weight))
    np.testing.assert_array_equal(dx, lib.linear_grad_input(dy, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_sums_give_the_bias_or_zero(lib: Library, dtype: str) -> None:
    bias = to_dtype(randn(40), dtype)
    no_cols = Weight((40, 0), 64, "nf4", np.zeros(0, np.uint8), np.zeros(0, np.float32))
    empty = np.zeros((20, 0), STORAGE[dtype])
    dirty = np.full((20, 40), 1, STORAGE[dtype])
    np.testing.assert_array_equal(lib.linear(empty, no_cols, dtype, bias, out=dirty), np.tile(bias, (20, 1)))
    no_rows = Weight((0, 40), 64, "nf4", np.zeros(0, np.uint8), np.zeros(0, np.float32))
    dirty = np.full((20, 40), 1, STORAGE[dtype])
    assert (lib.linear_grad_input(empty, no_rows, dtype, out=dirty) == 0).all()


def test_no_rows_is_a_no_op(lib: Library) -> None:
    weight = make_weight(lib, 40, 64, 64)
    assert lib.linear(np.zeros((0, 64), np.float32), weight).shape == (0, 40)
    assert lib.linear_grad_input(np.zeros((0, 40), np.float32), weight).shape == (0, 64)


@pytest.mark.parametrize("m", [1, 20])
def test_nan_stays_in_its_row_and_a_damaged_scale_in_its_column(lib: Library, m: int) -> None:
    weight = make_weight(lib, 64, 128, 64, is_nested=False)
    x = randn(m, 128)
    x[0, 5] = np.nan
    y = lib.linear(x, weight)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()
    weight.absmax[2 * 9] = np.nan  # row 9
    y = lib.linear(randn(m, 128), weight)
    assert np.isnan(y[:, 9]).all() and np.isfinite(np.delete(y, 9, axis=1)).all()
