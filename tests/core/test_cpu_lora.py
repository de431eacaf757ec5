"""The CPU steps of a linear layer with an adapter, at every instruction set: values, ranges, sums, wrong arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

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
    address,
    assert_same_bits,
    dequantize,
    enum,
    from_dtype,
    library,
    to_dtype,
)

RANKS = (1, 7, 16, 100, 256)
# n, k: whole groups and rows that end within one.
SHAPES = ((64, 96), (33, 47))
ROWS = (1, 2, 3, 9, 100)


class Lora(ctypes.Structure):
    """qlora_lora."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int) for name in ("a_dtype", "b_dtype")),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


def lora_of(a: Array | None, b: Array | None, rank: int, dtype: str = "float32") -> object:
    """One whose `dtype` is that of both."""
    return ctypes.byref(Lora(address(a), address(b), DTYPES[dtype], DTYPES[dtype], rank, 0.5))


def randn(*shape: int, seed: int, dtype: str = "float32") -> Array:
    return to_dtype(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def left_columns(rank: int) -> int:
    return -(-rank // 64) * 64


def padded(left: Array) -> Array:
    return np.pad(left, ((0, 0), (0, left_columns(left.shape[1]) - left.shape[1])))


def rounded(values: Array, dtype: str, to: str) -> Array:
    """What products in dtype `to` take of an adapter."""
    return from_dtype(to_dtype(from_dtype(values, dtype), to), to)


def assert_sum(
    actual: Array, x: Array, w: Array, dtype: str, scaling: float = 1.0, base: Array | float = 0.0
) -> None:
    """scaling x w + base, the sum of all of them in float32 and one rounding to dtype; x and w are float32."""
    x, w = x.astype(np.float64) * scaling, w.astype(np.float64)
    exact = x @ w + base
    magnitude = np.abs(x) @ np.abs(w) + np.abs(base)
    bound = (x.shape[1] + 3) * 2.0**-24 * magnitude
    bound += ROUNDOFF[dtype] * (np.abs(exact) + bound) + SUBNORMAL_STEP[dtype]
    error = np.abs(from_dtype(actual, dtype) - exact)
    assert (error <= bound).all(), f"error {error.max():.3g}, bound {bound[error == error.max()][0]:.3g}"


def product(
    lib: Library,
    x: Array,
    right: Array,
    rank: int,
    *,
    dtype: str,
    right_dtype: str,
    is_transposed: bool,
    rows: tuple[int, int] | None = None,
) -> Array:
    """0.5 x R with R [depth, rank]; nothing outside `rows`."""
    m, depth = x.shape
    out = np.full((m, left_columns(rank)), 1, STORAGE[dtype])
    lib.call(
        "qlora_adapter_product_cpu",
        *(x, depth, m, depth, enum(DTYPES[dtype]), right, enum(DTYPES[right_dtype])),
        *(enum(is_transposed), ctypes.c_float(0.5), out, out.shape[1], rank, *(rows or (0, m))),
    )
    return out


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("right_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_the_scaled_sum_with_zeros_behind_it(
    lib: Library, dtype: str, right_dtype: str, is_transposed: bool
) -> None:
    for rank in RANKS:
        for depth in (1, 47, 96):
            x = randn(5, depth, seed=1, dtype=dtype)
            right = randn(*((rank, depth) if is_transposed else (depth, rank)), seed=2, dtype=right_dtype)
            options = {"dtype": dtype, "right_dtype": right_dtype, "is_transposed": is_transposed}
            out = product(lib, x, right, rank, **options)
            dense = rounded(right, right_dtype, dtype)
            assert_sum(out[:, :rank], from_dtype(x, dtype), dense.T if is_transposed else dense, dtype, 0.5)
            assert (out[:, rank:] == 0).all()
            part = product(lib, x, right, rank, **options, rows=(1, 3))
            assert_same_bits(part[1:3], out[1:3], dtype)
            assert (part[[0, 3, 4]] == 1).all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_the_sum_over_rows(
    lib: Library, dtype: str, out_dtype: str, is_transposed: bool
) -> None:
    for rank in RANKS:
        for m, cols in ((1, 5), (30, 47), (9, 96)):
            x = randn(m, cols, seed=1, dtype=dtype)
            left = randn(m, rank, seed=2, dtype=dtype)
            out = np.full((cols, rank) if is_transposed else (rank, cols), 1, STORAGE[out_dtype])
            arguments = (padded(left), rank, x, m, cols, enum(DTYPES[dtype]))
            more = (enum(DTYPES[out_dtype]), enum(is_transposed))
            lib.call("qlora_adapter_gradient_cpu", *arguments, out, *more, 0, cols)
            values = out.T if is_transposed else out
            assert_sum(values, from_dtype(left, dtype).T, from_dtype(x, dtype), out_dtype)
            part = np.full_like(out, 1)
            lib.call("qlora_adapter_gradient_cpu", *arguments, part, *more, 1, 4)
            of_part = part.T if is_transposed else part
            assert_same_bits(
                np.ascontiguousarray(of_part[:, 1:4]), np.ascontiguousarray(values[:, 1:4]), out_dtype
            )
            assert (of_part[:, 4:] == 1).all()


@pytest.mark.parametrize("right_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_is_part_of_the_sums_of_the_layer(lib: Library, dtype: str, right_dtype: str) -> None:
    """y = x W^T + bias + left B^T and dx = dy W + dleft A, each rounded once."""
    for n, k in SHAPES:
        weight = lib.weight(randn(n, k, seed=1), 32)
        dense = dequantize(weight).astype(np.float64)
        for m in ROWS:
            for rank in (7, 100):
                x, dy = randn(m, k, seed=2, dtype=dtype), randn(m, n, seed=3, dtype=dtype)
                left, bias = randn(m, rank, seed=4, dtype=dtype), randn(n, seed=5, dtype=dtype)
                b, a = randn(n, rank, seed=6, dtype=right_dtype), randn(rank, k, seed=7, dtype=right_dtype)
                y, dx = (np.zeros((m, size), STORAGE[dtype]) for size in (n, k))
                lora = lora_of(a, b, rank, right_dtype)
                kind = enum(DTYPES[dtype])
                lib.call("qlora_lora_linear_4bit_cpu", x, m, kind, weight, bias, lora, padded(left), y, 0, n)
                lib.call(
                    "qlora_lora_linear_4bit_backward_cpu", dy, m, kind, weight, lora, padded(left), dx, 0, k
                )
                low = from_dtype(left, dtype)
                both = np.concatenate([from_dtype(x, dtype), low], axis=1)
                weights = np.concatenate([dense.T, rounded(b, right_dtype, dtype).T])
                assert_sum(y, both, weights, dtype, base=from_dtype(bias, dtype))
                both = np.concatenate([from_dtype(dy, dtype), low], axis=1)
                assert_sum(dx, both, np.concatenate([dense, rounded(a, right_dtype, dtype)]), dtype)


def test_neither_ranges_nor_other_rows_change_the_update(lib: Library) -> None:
    n, k, rank, m = 100, 96, 16, 13
    weight = lib.weight(randn(n, k, seed=1), 64)
    x, left, b = randn(m, k, seed=2), padded(randn(m, rank, seed=3)), randn(n, rank, seed=4)
    whole = np.zeros((m, n), np.float32)
    lora = lora_of(None, b, rank)
    kind = enum(0)
    lib.call("qlora_lora_linear_4bit_cpu", x, m, kind, weight, None, lora, left, whole, 0, n)
    parts = np.zeros_like(whole)
    for begin, end in ((0, 1), (1, 37), (37, 100)):
        lib.call("qlora_lora_linear_4bit_cpu", x, m, kind, weight, None, lora, left, parts, begin, end)
    assert_same_bits(parts, whole)
    for row in (0, 5, 12):
        one = np.zeros((1, n), np.float32)
        arguments = (np.ascontiguousarray(x[row : row + 1]), 1, kind, weight, None, lora)
        lib.call(
            "qlora_lora_linear_4bit_cpu", *arguments, np.ascontiguousarray(left[row : row + 1]), one, 0, n
        )
        assert_same_bits(one, np.ascontiguousarray(whole[row : row + 1]))


X = np.zeros((1, 64), np.float32)


def a_weight() -> Weight:
    return Weight((2, 64), 64, "nf4", np.zeros(64, np.uint8), np.ones(2, np.float32))


def call_linear(lib: Library, lora: object, left: Array | None = X) -> None:
    y = np.zeros((1, 2), np.float32)
    lib.call("qlora_lora_linear_4bit_cpu", X, 1, enum(0), a_weight(), None, lora, left, y, 0, 2)


CASES: list[tuple[Callable[[Library], object], str]] = [
    (lambda lib: call_linear(lib, None), "lora_linear_4bit: lora: expected a pointer, got null"),
    (lambda lib: call_linear(lib, lora_of(X, X, 0)), "lora_linear_4bit: rank: expected 1 to 256, got 0"),
    (lambda lib: call_linear(lib, lora_of(X, X, 257)), "lora_linear_4bit: rank: expected 1 to 256, got 257"),
    (
        lambda lib: call_linear(lib, lora_of(X, None, 1)),
        "lora_linear_4bit: lora.b: expected a pointer, got null",
    ),
    (
        lambda lib: call_linear(lib, lora_of(X, X, 1), None),
        "lora_linear_4bit: left: expected a pointer, got null",
    ),
    (
        lambda lib: lib.call(
            "qlora_adapter_product_cpu",
            *(X, 63, 1, 64, enum(0), X, enum(0), enum(0), ctypes.c_float(1), X, 64, 1, 0, 1),
        ),
        "adapter_product: input_stride: expected at least 64, got 63",
    ),
    (
        lambda lib: lib.call(
            "qlora_adapter_gradient_cpu", X, 1, X, 1, 64, enum(0), X, enum(0), enum(0), 0, 65
        ),
        "adapter_gradient: range of columns: expected 0 <= begin <= end <= 64, got [0, 65)",
    ),
]


@pytest.mark.parametrize(("call", "text"), CASES, ids=[text for _, text in CASES])
def test_a_wrong_argument_names_itself_and_the_value(call: Callable[[Library], object], text: str) -> None:
    with pytest.raises(RuntimeError) as failure:
        call(library("plain"))
    status, message = str(failure.value).split(": ", 1)
    assert status == "1"
    assert text in message
