"""The CPU entry points: wrong arguments, the choice of instruction set, sizes past 2^31 values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cpu_library import LEVELS, Library, Weight, dequantize, enum, library

X = np.ones(128, np.float32)
OUT = np.zeros(64, np.uint8), np.zeros(2, np.float32)
Y = np.zeros((2, 64), np.float32)


def weight(**changes: object) -> Weight:
    fields = dict(
        shape=(2, 64),
        block_size=64,
        quant_type="nf4",
        packed=np.zeros(64, np.uint8),
        absmax=np.ones(2, np.float32),
    )
    return Weight(**{**fields, **changes})  # type: ignore[arg-type]


def quantize(
    lib: Library, *, x: object = X, dtype: int = 0, n: int = 128, block_size: int = 64, end: int = 2
) -> None:
    lib.call("qlora_quantize_4bit_cpu", x, enum(dtype), n, block_size, enum(0), *OUT, 0, end)


def dequantize_with(lib: Library, of: object, *, y: object = Y, begin: int = 0, end: int = 2) -> None:
    lib.call("qlora_dequantize_4bit_cpu", of, y, enum(0), begin, end)


NESTED = dict(absmax=None, absmax_codes=np.zeros(2, np.uint8), nested_code=np.zeros(256, np.float32))
CASES: list[tuple[Callable[[Library], object], str]] = [
    (lambda lib: quantize(lib, x=None), "quantize_4bit: x: expected a pointer, got null"),
    (lambda lib: quantize(lib, dtype=3), "quantize_4bit: dtype: expected QLORA_FLOAT32 (0), "),
    (lambda lib: quantize(lib, block_size=48), "block_size: expected a power of two from 32 to 4096, got 48"),
    (lambda lib: quantize(lib, n=-1), "quantize_4bit: n: expected 0 to "),
    (lambda lib: quantize(lib, end=3), "range of blocks: expected 0 <= begin <= end <= 2, got [0, 3)"),
    (lambda lib: dequantize_with(lib, None), "dequantize_4bit: weight: expected a pointer, got null"),
    (lambda lib: dequantize_with(lib, weight(packed=None)), "weight.packed: expected a pointer, got null"),
    (
        lambda lib: dequantize_with(lib, weight(absmax=None)),
        "weight.absmax (no absmax_codes given): expected",
    ),
    (lambda lib: dequantize_with(lib, weight(shape=(-1, 64))), "rows and cols of at least 0, got -1 x 64"),
    (lambda lib: dequantize_with(lib, weight(shape=(2**40, 2**40))), "rows x cols overflows 64 bits"),
    (
        lambda lib: dequantize_with(lib, weight(**NESTED)),
        "weight.nested_absmax: expected a pointer, got null",
    ),
    (
        lambda lib: dequantize_with(lib, weight(**{**NESTED, "absmax": np.ones(2, np.float32)})),
        "weight: expected absmax or absmax_codes, got both",
    ),
    (lambda lib: dequantize_with(lib, weight(), y=None), "dequantize_4bit: y: expected a pointer, got null"),
    (lambda lib: dequantize_with(lib, weight(), begin=2, end=1), "got [2, 1)"),
    (
        lambda lib: lib.linear(np.ones((1, 64), np.float32), weight(), rows=(0, 3)),
        "linear_4bit: range of rows of the weight: expected 0 <= begin <= end <= 2, got [0, 3)",
    ),
    (
        lambda lib: lib.call("qlora_linear_4bit_cpu", None, 1, enum(0), weight(), None, Y, 0, 2),
        "linear_4bit: x: expected a pointer, got null",
    ),
    (
        lambda lib: lib.call("qlora_linear_4bit_cpu", X, -1, enum(0), weight(), None, Y, 0, 2),
        "linear_4bit: m: expected 0 to ",
    ),
    (
        lambda lib: lib.linear_grad_input(np.ones((1, 2), np.float32), weight(), cols=(-1, 3)),
        "linear_4bit_grad_input: range of columns of the weight: expected 0 <= begin <= end <= 64, got [-1, 3)",
    ),
    (
        lambda lib: lib.embedding(np.array([0, 1, 2]), weight()),
        "embedding_4bit: indices[2]: expected 0 <= index < 2, got 2",
    ),
    (lambda lib: lib.embedding(np.array([-1]), weight()), "indices[0]: expected 0 <= index < 2, got -1"),
    (
        lambda lib: lib.quantize_absmax(X, 0.0, groups=(0, 2)),
        "quantize_absmax: range of groups: expected 0 <= begin <= end <= 1, got [0, 2)",
    ),
    (
        lambda lib: lib.dequantize_absmax(np.zeros(5, np.uint8), np.ones(1, np.float32), 0.0, scales=(0, 6)),
        "dequantize_absmax: range of scales: expected 0 <= begin <= end <= 5, got [0, 6)",
    ),
]


@pytest.mark.parametrize(("call", "text"), CASES, ids=[text for _, text in CASES])
def test_a_wrong_argument_names_itself_and_the_value(call: Callable[[Library], object], text: str) -> None:
    with pytest.raises(RuntimeError) as failure:
        call(library("plain"))
    status, message = str(failure.value).split(": ", 1)
    assert status == "1"
    assert text in message


def test_embedding_writes_nothing_when_an_index_is_wrong(lib: Library) -> None:
    y = np.full((2, 64), 7.0, np.float32)
    indices = np.array([0, 9])
    with pytest.raises(RuntimeError, match=r"indices\[1\]"):
        lib.call("qlora_embedding_4bit_cpu", indices, 2, weight(), y, enum(0), 0, 2)
    assert (y == 7.0).all()


def test_the_environment_lowers_the_instruction_set_and_never_raises_it() -> None:
    assert library("plain").level == "plain"
    best = library("best of the machine").level  # an unknown name changes nothing
    assert best == library("avx512").level
    for level in LEVELS:
        expected = min(LEVELS.index(level), LEVELS.index(best))
        assert library(level).level == LEVELS[expected]


def test_blocks_past_2_to_the_31_values(lib: Library) -> None:
    """The arrays are virtual memory: only the pages of the last rows are touched."""
    rows, cols, block_size = 2**20 + 3, 2**11, 64
    n = rows * cols
    num_blocks = n // block_size
    values = np.empty(n, np.float16)
    big = Weight(
        (rows, cols), block_size, "nf4", np.empty(n // 2, np.uint8), np.empty(num_blocks, np.float32)
    )
    last = np.random.default_rng(0).standard_normal((2, cols)).astype(np.float16)
    values[-2 * cols :] = last.reshape(-1)
    blocks = (num_blocks - 2 * cols // block_size, num_blocks)
    lib.quantize(values, block_size, "nf4", "float16", blocks=blocks, out=(big.packed, big.absmax))

    small = lib.weight(last.astype(np.float32), block_size)
    np.testing.assert_array_equal(big.packed[-cols:], small.packed)
    expected = dequantize(small)
    np.testing.assert_array_equal(lib.embedding(np.array([rows - 2, rows - 1]), big), expected)
    x = np.random.default_rng(1).standard_normal((1, cols)).astype(np.float32)
    y = lib.linear(x, big, rows=(rows - 2, rows))
    np.testing.assert_array_equal(y[:, -2:], lib.linear(x, small))
