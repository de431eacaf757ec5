"""Quantise and dequantise one tensor to and from packed bytes and a QuantState."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..format import NESTED_BLOCK_SIZE, num_packed_bytes
from .quant_state import QuantState, code_tensor


class NonFiniteWeightError(ValueError):
    """A weight holds NaN or Inf. Such a block would dequantise to NaN and spoil every output."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"qlora: {name} holds NaN or Inf: expected finite values (a damaged or diverged checkpoint?)"
        )


def check_storage(name: str, num_values: int, quant_storage: torch.dtype) -> None:
    """Raises ValueError where the packed bytes of `num_values` do not fill whole items of `quant_storage`."""
    if num_packed_bytes(num_values) % quant_storage.itemsize:
        multiple = 2 * quant_storage.itemsize
        what = f"a multiple of {multiple} values for quant_storage {quant_storage}"
        raise ValueError(f"qlora: {name}: expected {what}, got {num_values}; use quant_storage uint8")


@torch.no_grad()
def quantize_tensor(
    weight: Tensor,
    *,
    block_size: int,
    quant_type: str,
    double_quant: bool,
    quant_storage: torch.dtype = torch.uint8,
    name: str = "the weight",
) -> tuple[Tensor, QuantState]:
    """Quantises on the weight's device, without a look at the values: `is_finite` of the state tells about NaN.

    Args:
        weight: float32, float16 or bfloat16, any shape.

    Returns:
        packed, `quant_storage` [bytes / itemsize, 1], and its QuantState.
    """
    check_storage(name, weight.numel(), quant_storage)
    if weight.dtype is torch.float64:
        weight = weight.float()
    packed, absmax = ops.quantize_4bit(weight.contiguous(), block_size, quant_type, quant_storage)
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=code_tensor(quant_type, weight.device),
        blocksize=block_size,
        quant_type=quant_type,
        dtype=weight.dtype,
    )
    if double_quant:
        codes, nested_absmax, nested_map, offset = ops.quantize_absmax(absmax)
        state.absmax, state.offset, state.nested = codes, offset, True
        state.state2 = QuantState(
            absmax=nested_absmax, code=nested_map, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
        )
    return packed, state


def is_finite(state: QuantState) -> Tensor:
    """bool [] on the state's device: whether all values that were quantised are finite.

    A NaN or Inf makes its scale, and through the mean every double-quantised scale, NaN or Inf.
    """
    scales = state.absmax if state.offset is None else state.offset
    return torch.isfinite(scales).all()


@torch.no_grad()
def dequantize_tensor(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The values, in `dtype` or the dtype they were quantised from, in the original shape."""
    if state.device != packed.device:
        state = state.copy_to(packed.device)
    if state.shape is None or state.blocksize is None or state.quant_type is None:
        raise ValueError(f"qlora: state: expected shape, blocksize and quant_type, got {state}")
    nested = state.state2
    result = ops.dequantize_4bit(
        packed,
        state.absmax,
        state.shape,
        block_size=state.blocksize,
        quant_type=state.quant_type,
        dtype=torch.float32 if dtype is torch.float64 else dtype or state.dtype or torch.float32,
        nested_absmax=None if nested is None else nested.absmax,
        nested_quant_map=None if nested is None else nested.code,
        nested_offset=state.offset,
    )
    return result.double() if dtype is torch.float64 else result
