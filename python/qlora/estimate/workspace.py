"""What CUDA kernels allocate beside their outputs, which no fake kernel shows: bounds, by operator.

The 4-bit product's is that of its dense path (cuda/gemm/dense.cu), the largest of any kernel; smaller kernels that a GPU
may choose need less. torch's attention backward sums the gradient of the query in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..lora_ops import left_columns

MIB = 1 << 20
#: What torch gives cuBLAS for each thread that multiplies, forward's and backward's: on Hopper and newer (8.1 MiB before).
CUBLAS = 2 * 32 * MIB

# As in dense.cu.
_OWN_CUBLAS = 32 * MIB
_MIN_CHUNK, _MAX_CHUNK = 16 * MIB, 128 * MIB
_MAX_PRODUCT = 64 * MIB

_aten, _qlora = torch.ops.aten, torch.ops.qlora


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator allocates for the length of its call, at most."""
    rule = _RULES.get(func)
    return 0 if rule is None else int(rule(args))


def _product(rows: Any, shape: Any, *, is_grad: bool, has_bias: bool) -> int:
    """Of x W^T + bias or dy W; `rows` is x or dy, W [n, k]."""
    n, k = shape
    num_rows = math.prod(rows.shape[:-1])
    column = (n if is_grad else k) * rows.element_size()
    width = 2048 if num_rows >= 4096 else 16384 if num_rows >= 1024 else 4096
    chunk = min(max(width * column, _MIN_CHUNK), _MAX_CHUNK, n * k * rows.element_size())
    return _OWN_CUBLAS + chunk + (_MAX_PRODUCT if has_bias else 0)


def _linear(args: tuple[Any, ...]) -> int:
    return _product(args[0], args[7], is_grad=False, has_bias=args[6] is not None)


def _linear_grad_input(args: tuple[Any, ...]) -> int:
    return _product(args[0], args[6], is_grad=True, has_bias=False)


def _lora_linear(args: tuple[Any, ...]) -> int:
    return _product(args[0], args[11], is_grad=False, has_bias=args[6] is not None)


def _lora_linear_backward(args: tuple[Any, ...]) -> int:
    grad, a = args[0], args[8]
    left = math.prod(grad.shape[:-1]) * left_columns(a.shape[0]) * grad.element_size()
    return left + _product(grad, args[16], is_grad=True, has_bias=False)


def _flash_backward(args: tuple[Any, ...]) -> int:
    """The query's gradient in float32, rounded up as the kernel's tiles are, and with grouped keys theirs of all heads."""
    query, key = args[1], args[2]
    batch, heads, length, width = query.shape
    sums = batch * heads * -(-length // 128) * 128 * -(-width // 32) * 32 * 4
    expanded = 2 * batch * heads * key.shape[2] * width * key.element_size()
    return sums + (expanded if key.shape[1] != heads else 0)


def _efficient_backward(args: tuple[Any, ...]) -> int:
    """Gradients of query, key and value in float32."""
    return sum(x.numel() * 4 for x in args[1:4])


_RULES = {
    _qlora.linear_4bit.default: _linear,
    _qlora.linear_4bit_grad_input.default: _linear_grad_input,
    _qlora.lora_linear_4bit.default: _lora_linear,
    _qlora.lora_linear_4bit_backward.default: _lora_linear_backward,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
