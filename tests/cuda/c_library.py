"""libqlora.so through ctypes: what torch.ops.qlora does not show."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from qlora import _library

OK, INVALID_ARGUMENT = 0, 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"nf4": 0, "fp4": 1}


class Weight4bit(ctypes.Structure):
    """qlora_weight_4bit."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax_codes")),
        *((name, ctypes.c_void_p) for name in ("nested_absmax", "nested_code", "nested_offset")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block_size")),
        ("format", ctypes.c_int),
    ]


class Lora(ctypes.Structure):
    """qlora_lora."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int) for name in ("a_dtype", "b_dtype")),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(_library.library_path().with_name("libqlora.so")))
    lib.qlora_last_error.restype = ctypes.c_char_p
    return lib


def last_error() -> str:
    return library().qlora_last_error().decode()


def describe_weight(rows: int, cols: int, *, block_size: int = 64, quant_type: str = "nf4") -> Weight4bit:
    """A shape without data."""
    return Weight4bit(rows=rows, cols=cols, block_size=block_size, format=FORMATS[quant_type])


def explain(
    weight: Weight4bit, m: int, dtype: torch.dtype, *, is_grad: bool = False, size: int = 4096
) -> str:
    text = ctypes.create_string_buffer(size)
    status = library().qlora_explain_linear_4bit(
        ctypes.byref(weight), ctypes.c_int64(m), DTYPES[dtype], int(is_grad), 0, text, ctypes.c_int64(size)
    )
    assert status == OK, last_error()
    return text.value.decode()


def workspace_size(
    weight: Weight4bit, m: int, dtype: torch.dtype, *, is_grad: bool = False, has_bias: bool = False
) -> int:
    size = ctypes.c_int64(-1)
    status = library().qlora_linear_4bit_workspace_size(
        ctypes.byref(weight),
        ctypes.c_int64(m),
        DTYPES[dtype],
        int(is_grad),
        int(has_bias),
        0,
        ctypes.byref(size),
    )
    assert status == OK, last_error()
    return size.value


def lora_workspace_size(
    weight: Weight4bit, m: int, dtype: torch.dtype, rank: int, *, is_backward: bool = False
) -> int:
    size = ctypes.c_int64(-1)
    status = library().qlora_lora_linear_4bit_workspace_size(
        *(ctypes.byref(weight), ctypes.c_int64(m), DTYPES[dtype], ctypes.byref(Lora(rank=rank))),
        *(int(is_backward), 0, 0, ctypes.byref(size)),
    )
    assert status == OK, last_error()
    return size.value


def explain_group(weights: list[Weight4bit], m: int, dtype: torch.dtype, *, size: int = 4096) -> str:
    text = ctypes.create_string_buffer(size)
    status = library().qlora_explain_linear_4bit_group(
        (Weight4bit * len(weights))(*weights),
        ctypes.c_int64(len(weights)),
        ctypes.c_int64(m),
        DTYPES[dtype],
        0,
        text,
        ctypes.c_int64(size),
    )
    assert status == OK, last_error()
    return text.value.decode()


def group_workspace_size(
    weights: list[Weight4bit], m: int, dtype: torch.dtype, has_bias: list[bool] | None = None
) -> int:
    """Raises AssertionError with the library's text where it refuses."""
    size = ctypes.c_int64(-1)
    biases = None
    if has_bias is not None:
        biases = (ctypes.c_void_p * len(weights))(*(1 if has else None for has in has_bias))
    status = library().qlora_linear_4bit_group_workspace_size(
        (Weight4bit * len(weights))(*weights),
        ctypes.c_int64(len(weights)),
        ctypes.c_int64(m),
        DTYPES[dtype],
        biases,
        0,
        ctypes.byref(size),
    )
    assert status == OK, last_error()
    return size.value
