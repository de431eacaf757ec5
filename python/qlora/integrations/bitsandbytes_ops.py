"""Our kernels behind bitsandbytes' 4-bit operators, and its linear product as one node of the autograd graph.

Arguments carry bitsandbytes' names; `bitsandbytes.py` compares them with the schemas of the installed version before it
registers anything. Shapes, dtypes and devices are checked by `ops.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..format import CODES, NESTED_BLOCK_SIZE
from ..nn.function import linear

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Code tensor -> its version counter when it was read, and the type read from it: reading waits for the device.
_type_of_code: Any = WeakIdKeyDictionary()


@contextmanager
def _plain() -> Iterator[None]:
    """Inside an operator's kernel: no gradient is recorded, and a weight's Tensor subclass is only its bytes."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunctionSubclass():
        yield


def _write(op: str, out: Tensor, result: Tensor) -> None:
    if out.shape != result.shape or out.dtype is not result.dtype or out.device != result.device:
        raise ValueError(
            f"bitsandbytes.{op}: out: expected {result.dtype} {list(result.shape)} on {result.device}, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    out.copy_(result)


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    num_bytes = (A.numel() + 1) // 2
    if num_bytes % quant_storage.itemsize != 0:
        raise ValueError(
            f"bitsandbytes.quantize_4bit: quant_storage: expected a dtype whose items {num_bytes} bytes fill, "
            f"got {quant_storage} for A of shape {list(A.shape)}"
        )
    with _plain():
        return ops.quantize_4bit(A, blocksize, quant_type, quant_storage)


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    with _plain():
        return ops.dequantize_4bit(
            A, absmax.float(), shape, block_size=blocksize, quant_type=quant_type, dtype=dtype
        )


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    _write("dequantize_4bit", out, dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def _quant_type_of(code: Tensor) -> str:
    known = _type_of_code.get(code)
    if known is not None and known[0] == code._version:
        return str(known[1])
    values = code.detach().float().tolist()
    for name, expected in CODES.items():
        # Four decimals: one of bitsandbytes' own tables is rounded to them.
        if len(values) == len(expected) and all(
            abs(a - b) < 1e-4 for a, b in zip(values, expected, strict=True)
        ):
            _type_of_code[code] = (code._version, name)
            return name
    raise ValueError(f"bitsandbytes.gemv_4bit: code: expected the 16 values of nf4 or fp4, got {values}")


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    with _plain():
        quant_type = _quant_type_of(code)
        return ops.linear_4bit(A, B, absmax.float(), shapeB, block_size=blocksize, quant_type=quant_type)


def gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    _write("gemv_4bit", out, gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    is_nested = absmax_8bit is not None
    with _plain():
        return ops.linear_4bit(
            A,
            B,
            absmax if absmax_8bit is None else absmax_8bit,
            shapeB,
            block_size=blocksize,
            quant_type=quant_type,
            bias=bias,
            nested_absmax=absmax if is_nested else None,
            nested_quant_map=absmax_code,
            nested_offset=absmax_offset,
        )


#: bitsandbytes' operator -> our kernel. The last came with bitsandbytes 0.50.
KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "gemv_4bit": gemv_4bit,
    "gemv_4bit.out": gemv_4bit_out,
    "gemm_4bit": gemm_4bit,
}
OPTIONAL_KERNELS = ("gemm_4bit",)


def products(
    functions: ModuleType, devices: frozenset[str], weight_is_transposed: bool
) -> tuple[Callable[..., Tensor], type]:
    """Stand-ins for `matmul_4bit` and `MatMul4Bit` of bitsandbytes.autograd._functions.

    A call that is not y = x W^T + b of a 4-bit matrix on one of `devices` goes on to what `functions` has now: weights
    that were quantised as [k, n], other dtypes, weights repacked for a CPU kernel of bitsandbytes, and errors.

    Args:
        weight_is_transposed: W^T is asked for by a packed weight of shape [1, bytes], as before bitsandbytes 0.50.
    """
    original, original_node = functions.matmul_4bit, functions.MatMul4Bit

    def is_ours(A: Tensor, B: Tensor, bias: Tensor | None, state: Any) -> bool:
        if state is None or len(state.shape) != 2 or A.dim() == 0 or A.shape[-1] != state.shape[1]:
            return False
        if A.dtype not in _FLOATS or A.device.type not in devices or B.device != A.device:
            return False
        if bias is not None and (
            bias.dtype is not A.dtype or bias.dim() != 1 or bias.shape[0] != state.shape[0]
        ):
            return False
        if state.nested and state.state2.blocksize != NESTED_BLOCK_SIZE:
            return False
        if weight_is_transposed and B.shape[0] != 1:
            return False
        return not getattr(state, "packing_format_for_cpu", False)

    def product(A: Tensor, B: Tensor, out: Tensor | None, bias: Tensor | None, state: Any) -> Tensor:
        if state.offset is not None and state.offset.dtype is not torch.float32:
            state = copy.copy(state)  # Old checkpoints hold a 16-bit offset; the kernels add it in float32.
            state.offset = state.offset.float()
        result = linear(A, B, state, bias)
        return result if out is None else out.copy_(result)

    def matmul_4bit(
        A: Tensor,
        B: Tensor,
        quant_state: Any,
        out: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """y = x W^T + b, by qlora's kernels."""
        if is_ours(A, B, bias, quant_state):
            return product(A, B, out, bias, quant_state)
        return original(A, B, quant_state, out, bias)  # type: ignore[no-any-return]

    class MatMul4Bit:
        """What calls the node directly, or a `matmul_4bit` that it imported earlier, comes here."""

        @staticmethod
        def apply(
            A: Tensor,
            B: Tensor,
            out: Tensor | None = None,
            bias: Tensor | None = None,
            quant_state: Any = None,
        ) -> Tensor:
            if is_ours(A, B, bias, quant_state):
                return product(A, B, out, bias, quant_state)
            return original_node.apply(A, B, out, bias, quant_state)  # type: ignore[no-any-return]

    return matmul_4bit, MatMul4Bit
