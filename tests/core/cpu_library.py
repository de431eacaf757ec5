"""The CPU half of libqlora.so on numpy arrays, once for each instruction set; and the format in numpy, to compare with.

bfloat16 arrays are uint16. The choice of instruction set is made once in a library's life, so each one gets a copy of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.generic]
LEVELS = ("plain", "avx2", "avx512")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
# Unit roundoff and smallest normal of each dtype.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL_STEP = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
FORMATS = {"nf4": 0, "fp4": 1}
NESTED_BLOCK_SIZE = 256
OK, INVALID_ARGUMENT = 0, 1

NF4_CODES = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
FP4_MAGNITUDES = np.float32([0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
CODES = {"nf4": NF4_CODES, "fp4": np.concatenate([FP4_MAGNITUDES, -FP4_MAGNITUDES])}
# In bits: the decimals in core/format.h lie half-way between floats, and a parser that goes through float64 misses some.
NF4_THRESHOLDS = np.uint32(
    [
        *(0xBF591CD9, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871, 0x3D22FAFF),
        *(0x3DF64863, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D03, 0x3F248DAF, 0x3F5C89D9),
    ]
).view(np.float32)
FP4_THRESHOLDS = np.float32([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
FP4_ORDER = np.uint8([0, 1, 6, 7, 4, 5, 2, 3])
THRESHOLDS = {"nf4": NF4_THRESHOLDS, "fp4": FP4_THRESHOLDS}
ZERO_CODE = {"nf4": 7, "fp4": 0}


class Weight4bit(ctypes.Structure):
    """qlora_weight_4bit."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax_codes")),
        *((name, ctypes.c_void_p) for name in ("nested_absmax", "nested_code", "nested_offset")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block_size")),
        ("format", ctypes.c_int),
    ]


@dataclass
class Weight:
    """A 4-bit weight [rows, cols]; the scales are fp32, or with `nested` 8-bit."""

    shape: tuple[int, int]
    block_size: int
    quant_type: str
    packed: Array
    absmax: Array | None = None
    absmax_codes: Array | None = None
    nested_absmax: Array | None = None
    nested_code: Array | None = None
    nested_offset: Array | None = None

    def as_c(self) -> Weight4bit:
        names = ("packed", "absmax", "absmax_codes", "nested_absmax", "nested_code", "nested_offset")
        pointers = {name: address(getattr(self, name)) for name in names}
        rows, cols = self.shape
        return Weight4bit(
            **pointers, rows=rows, cols=cols, block_size=self.block_size, format=FORMATS[self.quant_type]
        )


def address(array: Array | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def library_path() -> Path:
    spec = importlib.util.find_spec("qlora")
    assert spec is not None, "qlora is not on the path"
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib/libqlora.so"


class Library:
    """Calls that raise RuntimeError with qlora_last_error() on a failure."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.qlora_last_error.restype = ctypes.c_char_p
        self.c.qlora_cpu_kernels.restype = ctypes.c_char_p
        self.c.qlora_nested_code.restype = ctypes.POINTER(ctypes.c_float)
        self.level = self.c.qlora_cpu_kernels().decode()

    def call(self, name: str, *arguments: object) -> None:
        """Arrays become addresses, int becomes int64, Enum stays an enum."""
        converted: list[object] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                converted.append(ctypes.c_void_p(address(argument)))
            elif isinstance(argument, Weight):
                converted.append(ctypes.byref(argument.as_c()))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            else:
                converted.append(argument)
        status = getattr(self.c, name)(*converted)
        if status != OK:
            raise RuntimeError(f"{status}: {self.c.qlora_last_error().decode()}")

    def nested_code(self) -> Array:
        return np.ctypeslib.as_array(self.c.qlora_nested_code(), (256,)).copy()

    def quantize(
        self,
        x: Array,
        block_size: int,
        quant_type: str,
        dtype: str = "float32",
        blocks: tuple[int, int] | None = None,
        out: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """packed [ceil(n / 2)], absmax [num_blocks]; outside `blocks` they keep what `out` held."""
        n = x.size
        num_blocks = -(-n // block_size)
        packed, absmax = out or (np.zeros((n + 1) // 2, np.uint8), np.zeros(num_blocks, np.float32))
        begin, end = blocks or (0, num_blocks)
        self.call(
            "qlora_quantize_4bit_cpu",
            *(x, enum(DTYPES[dtype]), n, block_size, enum(FORMATS[quant_type]), packed, absmax, begin, end),
        )
        return packed, absmax

    def dequantize(
        self, weight: Weight, dtype: str = "float32", blocks: tuple[int, int] | None = None
    ) -> Array:
        """[rows, cols]; zeros outside `blocks`."""
        y = np.zeros(weight.shape, STORAGE[dtype])
        begin, end = blocks or (0, -(-y.size // weight.block_size))
        self.call("qlora_dequantize_4bit_cpu", weight, y, enum(DTYPES[dtype]), begin, end)
        return y

    def quantize_absmax(
        self, absmax: Array, offset: float, groups: tuple[int, int] | None = None, code: Array | None = None
    ) -> tuple[Array, Array]:
        """codes [n], nested_absmax [ceil(n / 256)]; zeros outside `groups`."""
        codes = np.zeros(absmax.size, np.uint8)
        nested_absmax = np.zeros(-(-absmax.size // NESTED_BLOCK_SIZE), np.float32)
        begin, end = groups or (0, nested_absmax.size)
        code = self.nested_code() if code is None else code
        offsets = np.float32([offset])
        self.call(
            "qlora_quantize_absmax_cpu",
            *(absmax, absmax.size, offsets, code, codes, nested_absmax, begin, end),
        )
        return codes, nested_absmax

    def dequantize_absmax(
        self, codes: Array, nested_absmax: Array, offset: float, scales: tuple[int, int] | None = None
    ) -> Array:
        absmax = np.zeros(codes.size, np.float32)
        begin, end = scales or (0, codes.size)
        self.call(
            "qlora_dequantize_absmax_cpu",
            *(codes, codes.size, nested_absmax, self.nested_code(), np.float32([offset]), absmax, begin, end),
        )
        return absmax

    def linear(
        self,
        x: Array,
        weight: Weight,
        dtype: str = "float32",
        bias: Array | None = None,
        rows: tuple[int, int] | None = None,
        out: Array | None = None,
    ) -> Array:
        """[m, n]; outside `rows` (columns of the result) it keeps what `out` held."""
        n = weight.shape[0]
        y = np.zeros((x.shape[0], n), STORAGE[dtype]) if out is None else out
        begin, end = rows or (0, n)
        self.call("qlora_linear_4bit_cpu", x, x.shape[0], enum(DTYPES[dtype]), weight, bias, y, begin, end)
        return y

    def linear_grad_input(
        self,
        dy: Array,
        weight: Weight,
        dtype: str = "float32",
        cols: tuple[int, int] | None = None,
        out: Array | None = None,
    ) -> Array:
        """[m, k]; outside `cols` it keeps what `out` held."""
        k = weight.shape[1]
        dx = np.zeros((dy.shape[0], k), STORAGE[dtype]) if out is None else out
        begin, end = cols or (0, k)
        self.call(
            "qlora_linear_4bit_grad_input_cpu",
            *(dy, dy.shape[0], enum(DTYPES[dtype]), weight, dx, begin, end),
        )
        return dx

    def embedding(
        self, indices: Array, weight: Weight, dtype: str = "float32", units: tuple[int, int] | None = None
    ) -> Array:
        """[num_indices, cols]; zeros outside `units`."""
        y = np.zeros((indices.size, weight.shape[1]), STORAGE[dtype])
        begin, end = units or (0, indices.size)
        self.call(
            "qlora_embedding_4bit_cpu", indices, indices.size, weight, y, enum(DTYPES[dtype]), begin, end
        )
        return y

    def weight(
        self, values: Array, block_size: int, quant_type: str = "nf4", *, is_nested: bool = False
    ) -> Weight:
        """Quantised fp32 values [rows, cols]."""
        packed, absmax = self.quantize(values, block_size, quant_type)
        if not is_nested:
            return Weight(values.shape, block_size, quant_type, packed, absmax)
        offset = float(absmax.mean())
        codes, nested_absmax = self.quantize_absmax(absmax, offset)
        return Weight(
            *(values.shape, block_size, quant_type, packed, None, codes, nested_absmax),
            *(self.nested_code(), np.float32([offset])),
        )


def enum(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)


@lru_cache(maxsize=len(LEVELS))
def library(level: str) -> Library:
    """Skips the test where the machine lacks the instructions."""
    folder = Path(tempfile.mkdtemp(prefix="qlora-test-"))
    before = os.environ.get("QLORA_CPU_KERNELS")
    try:
        copy = shutil.copy(library_path(), folder / f"libqlora_{level}.so")
        os.environ["QLORA_CPU_KERNELS"] = level
        loaded = Library(copy)
    finally:
        shutil.rmtree(folder)
        if before is None:
            os.environ.pop("QLORA_CPU_KERNELS", None)
        else:
            os.environ["QLORA_CPU_KERNELS"] = before
    return loaded


def library_or_skip(level: str) -> Library:
    found = library(level)
    if found.level != level:
        pytest.skip(f"this machine has no {level}")
    return found


# ---- Values ----


def to_dtype(x: Array, dtype: str) -> Array:
    """fp32 rounded to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(STORAGE[dtype])
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_dtype(x: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def assert_same_bits(actual: Array, expected: Array, dtype: str = "float32") -> None:
    """Every NaN equals every NaN."""
    bits = np.uint32 if dtype == "float32" else np.uint16
    is_nan = np.isnan(from_dtype(actual, dtype)) & np.isnan(from_dtype(expected, dtype))
    is_wrong = (actual.view(bits) != expected.view(bits)) & ~is_nan
    assert not is_wrong.any(), (
        f"{is_wrong.sum()} of {is_wrong.size} differ; the first at {np.argwhere(is_wrong)[0]}: expected "
        f"{from_dtype(expected, dtype)[is_wrong][0]!r}, got {from_dtype(actual, dtype)[is_wrong][0]!r}"
    )


# ---- The format ----


def scale_to_unit(blocks: Array, absmax: Array) -> Array:
    """(x * power) * (1 / (absmax * power)), in fp32; the power of two is for absmax far from 1."""
    power = np.where(absmax < 2.0**-126, 2.0**64, np.where(absmax > 2.0**126, 2.0**-64, 1.0)).astype(
        np.float32
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        return (blocks * power[:, None]) * (np.float32(1.0) / (absmax * power))[:, None]


def nearest_code(scaled: Array, quant_type: str) -> Array:
    if quant_type == "nf4":
        return np.searchsorted(NF4_THRESHOLDS, scaled, side="left").astype(np.uint8)
    place = np.searchsorted(FP4_THRESHOLDS, np.abs(scaled), side="left")
    return FP4_ORDER[place] | np.where(scaled < 0, 8, 0).astype(np.uint8)


def quantize(x: Array, block_size: int, quant_type: str) -> tuple[Array, Array]:
    """fp32 [n] -> packed, absmax, with the policy on zero, NaN and Inf of qlora.h."""
    blocks = np.pad(x.reshape(-1), (0, -x.size % block_size)).reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1)  # NaN wins
    scaled = scale_to_unit(blocks, absmax)
    scaled = np.where(np.isfinite(absmax)[:, None] & (absmax > 0)[:, None], scaled, np.float32(0))
    scaled = np.where(np.isinf(blocks) & ~np.isnan(absmax)[:, None], np.sign(blocks), scaled)
    codes = nearest_code(scaled, quant_type)
    is_special = ~np.isfinite(absmax) | (absmax == 0)
    codes = np.where(is_special[:, None] & (scaled == 0), ZERO_CODE[quant_type], codes).reshape(-1)[: x.size]
    codes = np.append(codes, np.full(x.size % 2, ZERO_CODE[quant_type])).astype(np.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def unpack(packed: Array, n: int) -> Array:
    return np.stack([packed >> 4, packed & 0xF], axis=1).reshape(-1)[:n]


def scales_of(weight: Weight) -> Array:
    if weight.absmax is not None:
        return weight.absmax
    groups = np.arange(weight.absmax_codes.size) // NESTED_BLOCK_SIZE
    return weight.nested_code[weight.absmax_codes] * weight.nested_absmax[groups] + weight.nested_offset[0]


def dequantize(weight: Weight, dtype: str = "float32") -> Array:
    n = weight.shape[0] * weight.shape[1]
    scales = np.repeat(scales_of(weight), weight.block_size)[:n]
    with np.errstate(invalid="ignore"):
        values = CODES[weight.quant_type][unpack(weight.packed, n)] * scales
    return to_dtype(values, dtype).reshape(weight.shape)
