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
    if rule is None:
        return 0
    names = [argument.name for argument in func._schema.arguments]
    return rule(dict(zip(names, args, strict=False)))


def _product(given: dict[str, Any]) -> int:
    """Of x W^T + bias, or where there is a `grad_output`, of dy W, with W [n, k]."""
    n, k = given["shape"]
    is_grad = "grad_output" in given
    rows = given["grad_output"] if is_grad else given["input"]
    num_rows = math.prod(rows.shape[:-1])
    column = (n if is_grad else k) * rows.element_size()
    width = 2048 if num_rows >= 4096 else 16384 if num_rows >= 1024 else 4096
    chunk = min(max(width * column, _MIN_CHUNK), _MAX_CHUNK, n * k * rows.element_size())
    return _OWN_CUBLAS + chunk + (0 if given.get("bias") is None else _MAX_PRODUCT)


def _lora_backward(given: dict[str, Any]) -> int:
    rows = given["grad_output"]
    left = math.prod(rows.shape[:-1]) * left_columns(given["a"].shape[0]) * rows.element_size()
    return left + _product(given)


def _flash_backward(given: dict[str, Any]) -> int:
    """The query's gradient in float32, rounded up as the kernel's tiles are, and with grouped keys theirs of all heads."""
    query, key = given["query"], given["key"]
    batch, heads, length, width = query.shape
    sums: int = batch * heads * -(-length // 128) * 128 * -(-width // 32) * 32 * 4
    expanded: int = 2 * batch * heads * key.shape[2] * width * key.element_size()
    return sums + (expanded if key.shape[1] != heads else 0)


def _efficient_backward(given: dict[str, Any]) -> int:
    """Gradients of query, key and value in float32."""
    return sum(given[name].numel() * 4 for name in ("query", "key", "value"))


_RULES = {
    _qlora.linear_4bit.default: _product,
    _qlora.linear_4bit_grad_input.default: _product,
    _qlora.lora_linear_4bit.default: _product,
    _qlora.lora_linear_4bit_backward.default: _lora_backward,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
