"""Operands of the linear kernels' tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assertions import assert_within
from qlora import ops


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def quantized(
    n: int, k: int, dtype: torch.dtype, is_nested: bool, quant_type: str = "nf4", block_size: int = 64
):
    """Arguments of the operators, and the weight rounded to dtype."""
    packed, absmax = ops.quantize_4bit(randn(n, k, dtype=torch.float32, seed=n + k), block_size, quant_type)
    form = {"block_size": block_size, "quant_type": quant_type}
    if is_nested:
        absmax, *tensors = ops.quantize_absmax(absmax)
        form |= zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True)
    return (packed, absmax, (n, k)), form, ops.dequantize_4bit(packed, absmax, (n, k), **form, dtype=dtype)


def tolerance(x: Tensor, weight: Tensor, expected: Tensor) -> Tensor:
    """Float32 sums of num_terms products in any order, then one rounding to the dtype of x; weight [terms, outputs]."""
    magnitude = x.double().abs() @ weight.double().abs()
    sums = x.shape[-1] * torch.finfo(torch.float32).eps * magnitude
    info = torch.finfo(x.dtype)
    return sums + info.eps / 2 * (expected.abs() + sums) + info.smallest_normal * info.eps


def shifted(value: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    buffer = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
    buffer[1:].copy_(value.flatten())
    return buffer[1:].view(value.shape)


def check_products(args: Any, form: Any, weight: Tensor, x: Tensor, dy: Tensor, bias: Tensor) -> None:
    """The linear layer, without and with a bias, and the input gradient against float64, of the weight as rounded."""
    expected = x.double() @ weight.double().T
    assert_within(ops.linear_4bit(x, *args, **form), expected, tolerance(x, weight.T, expected))
    with_bias = expected + bias.double()
    # The bias is one more float32 term, and the result is rounded once.
    slack = torch.finfo(torch.float32).eps * bias.double().abs()
    limit = tolerance(x, weight.T, with_bias) + slack
    assert_within(ops.linear_4bit(x, *args, **form, bias=bias), with_bias, limit)
    expected = dy.double() @ weight.double()
    assert_within(ops.linear_4bit_grad_input(dy, *args, **form), expected, tolerance(dy, weight, expected))
