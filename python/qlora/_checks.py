"""Checks of the operators' arguments: TypeError for a dtype or device, ValueError for anything else, with the value.

They run before every call, so they are cheap: messages are built on failure only. torch.compile traces through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .format import BLOCK_SIZES, QUANT_TYPES, num_blocks, num_nested_blocks, num_packed_bytes

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def expected(what: str, got: object) -> str:
    return f"expected {what}, got {got}"


def kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tensor(op: str, name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"qlora.{op}: {name}: {expected(f'a tensor of {names}', kind(value))}")


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise TypeError(f"qlora.{op}: {name}: {expected(f'a tensor on {device}', kind(value))}")


def check_numel(op: str, name: str, value: Tensor, count: int) -> None:
    if value.numel() != count:
        raise ValueError(f"qlora.{op}: {name}: {expected(f'{count} values', kind(value))}")


def check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"qlora.{op}: dtype: {expected(f'one of {FLOATS}', dtype)}")


def check_format(op: str, block_size: int, quant_type: str) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"qlora.{op}: block_size: {expected(f'one of {BLOCK_SIZES}', repr(block_size))}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"qlora.{op}: quant_type: {expected(f'one of {QUANT_TYPES}', repr(quant_type))}")


def check_matrix(op: str, shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(f"qlora.{op}: shape: {expected('[rows, cols] of the weight', list(shape))}")


def check_nested(
    op: str,
    device: torch.device,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_quant_map: Tensor,
    nested_offset: Tensor,
) -> Tensor:
    """Checks the tensors of double-quantised scales; returns the offset as float32."""
    check_tensor(op, "absmax (with nested_absmax)", absmax, (torch.uint8,))
    check_tensor(op, "nested_absmax", nested_absmax, (torch.float32,))
    check_tensor(op, "nested_quant_map", nested_quant_map, (torch.float32,))
    check_tensor(op, "nested_offset", nested_offset, (*FLOATS, torch.float64))
    check_device(op, "nested_absmax", nested_absmax, device)
    check_device(op, "nested_quant_map", nested_quant_map, device)
    check_device(op, "nested_offset", nested_offset, device)
    check_numel(op, "nested_absmax", nested_absmax, num_nested_blocks(absmax.numel()))
    check_numel(op, "nested_quant_map", nested_quant_map, 256)
    check_numel(op, "nested_offset", nested_offset, 1)
    return nested_offset if nested_offset.dtype is torch.float32 else nested_offset.to(torch.float32)


Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def check_weight(
    op: str, device: torch.device, weight: Weight, shape: Sequence[int], block_size: int, quant_type: str
) -> Weight:
    """Checks (packed, absmax, nested_absmax, nested_quant_map, nested_offset); returns it with a float32 offset."""
    packed, absmax, nested_absmax, nested_quant_map, nested_offset = weight
    check_format(op, block_size, quant_type)
    num_values = math.prod(shape)
    if num_values < 0 or (num_values == 0 and any(size < 0 for size in shape)):
        raise ValueError(f"qlora.{op}: shape: {expected('sizes of at least 0', list(shape))}")
    if not isinstance(packed, Tensor):
        raise TypeError(f"qlora.{op}: packed: {expected('a tensor', kind(packed))}")
    check_device(op, "packed", packed, device)
    if packed.numel() * packed.itemsize < num_packed_bytes(num_values):
        what = f"at least {num_packed_bytes(num_values)} bytes for a weight of shape {list(shape)}"
        raise ValueError(f"qlora.{op}: packed: {expected(what, kind(packed))}")
    if nested_absmax is None:
        if nested_quant_map is not None or nested_offset is not None:
            given = "nested_offset" if nested_quant_map is None else "nested_quant_map"
            raise ValueError(f"qlora.{op}: nested_absmax: {expected(f'a tensor beside {given}', None)}")
        check_tensor(op, "absmax", absmax, (torch.float32,))
    else:
        if nested_quant_map is None or nested_offset is None:
            missing = "nested_quant_map" if nested_quant_map is None else "nested_offset"
            raise ValueError(f"qlora.{op}: {missing}: {expected('a tensor beside nested_absmax', None)}")
        nested_offset = check_nested(op, device, absmax, nested_absmax, nested_quant_map, nested_offset)
    check_device(op, "absmax", absmax, device)
    check_numel(op, "absmax", absmax, num_blocks(num_values, block_size))
    return packed, absmax, nested_absmax, nested_quant_map, nested_offset


def check_activation(op: str, name: str, value: Tensor, width: int, shape: Sequence[int]) -> None:
    check_tensor(op, name, value, FLOATS)
    if value.dim() == 0 or value.shape[-1] != width:
        what = f"a last dimension of {width} for a weight of shape {list(shape)}"
        raise ValueError(f"qlora.{op}: {name}: {expected(what, kind(value))}")
