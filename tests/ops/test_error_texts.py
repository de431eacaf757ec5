"""A wrong argument gives one clear error: operator, argument, what was expected, the value that came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from op_cases import make_weight, randn
from qlora import ops

WEIGHT = make_weight(16, 64)
NESTED = make_weight(16, 64, is_nested=True)
X = randn(3, 64, seed=1)
INDICES = torch.tensor([0, 1])


def linear(
    x: Any = X, packed: Any = WEIGHT.packed, absmax: Any = WEIGHT.absmax, shape: Any = (16, 64), **more: Any
) -> Any:
    return ops.linear_4bit(x, packed, absmax, shape, **{**WEIGHT.format, **more})


def nested(absmax: Any = NESTED.absmax, **more: Any) -> Any:
    return ops.linear_4bit(X, NESTED.packed, absmax, (16, 64), **{**NESTED.kwargs, **more})


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: ops.quantize_4bit(X, 48),
        ValueError,
        "qlora.quantize_4bit: block_size: expected one of (32, 64,",
    ),
    (lambda: ops.quantize_4bit(X, 48), ValueError, ", got 48"),
    (
        lambda: ops.quantize_4bit(X, 64, "int4"),
        ValueError,
        "quant_type: expected one of ('nf4', 'fp4'), got 'int4'",
    ),
    (lambda: ops.quantize_4bit(X.double()), TypeError, "input: expected a tensor of torch.float32 or"),
    (lambda: ops.quantize_4bit(X.double()), TypeError, "got torch.float64 [3, 64] on cpu"),
    (lambda: ops.quantize_4bit([1.0]), TypeError, "got [1.0] (list)"),  # type: ignore[arg-type]
    (lambda: ops.quantize_4bit(X, quant_storage=torch.int64), TypeError, "quant_storage: expected one of"),
    (
        lambda: ops.quantize_absmax(X.half()),
        TypeError,
        "qlora.quantize_absmax: absmax: expected a tensor of torch.float32",
    ),
    (lambda: ops.quantize_absmax(X), ValueError, "absmax: expected one dimension, got torch.float32 [3, 64]"),
    (
        lambda: linear(X[:, :63]),
        ValueError,
        "input: expected a last dimension of 64 for a weight of shape [16, 64]",
    ),
    (lambda: linear(torch.tensor(1.0)), ValueError, "got torch.float32 [] on cpu"),
    (lambda: linear(X.double()), TypeError, "qlora.linear_4bit: input: expected a tensor of"),
    (
        lambda: linear(X.to("meta")),
        TypeError,
        "packed: expected a tensor on meta, got torch.uint8 [512, 1] on cpu",
    ),
    (lambda: linear(shape=(1024,)), ValueError, "shape: expected [rows, cols] of the weight, got [1024]"),
    (lambda: linear(shape=(-16, 64)), ValueError, "shape: expected sizes of at least 0, got [-16, 64]"),
    (
        lambda: linear(packed=WEIGHT.packed[:100]),
        ValueError,
        "packed: expected at least 512 bytes for a weight of shape",
    ),
    (lambda: linear(packed=None), TypeError, "packed: expected a tensor, got None (NoneType)"),
    (
        lambda: linear(absmax=WEIGHT.absmax[:3]),
        ValueError,
        "absmax: expected 16 values, got torch.float32 [3] on cpu",
    ),
    (
        lambda: linear(absmax=WEIGHT.absmax.half()),
        TypeError,
        "absmax: expected a tensor of torch.float32, got torch.float16",
    ),
    (lambda: linear(absmax=None), TypeError, "absmax: expected a tensor of torch.float32, got None"),
    (lambda: linear(block_size=32), ValueError, "absmax: expected 32 values"),
    (lambda: linear(bias=torch.zeros(15)), ValueError, "bias: expected 16 values, got torch.float32 [15]"),
    (
        lambda: linear(bias=torch.zeros(16).half()),
        TypeError,
        "bias: expected a tensor of torch.float32, got torch.float16",
    ),
    (
        lambda: nested(NESTED.absmax.float()),
        TypeError,
        "absmax (with nested_absmax): expected a tensor of torch.uint8",
    ),
    (
        lambda: nested(nested_offset=None),
        ValueError,
        "nested_offset: expected a tensor beside nested_absmax, got None",
    ),
    (
        lambda: nested(nested_quant_map=None),
        ValueError,
        "nested_quant_map: expected a tensor beside nested_absmax",
    ),
    (
        lambda: nested(nested_absmax=None),
        ValueError,
        "nested_absmax: expected a tensor beside nested_quant_map, got None",
    ),
    (lambda: nested(nested_quant_map=torch.zeros(255)), ValueError, "nested_quant_map: expected 256 values"),
    (lambda: nested(nested_absmax=torch.zeros(2)), ValueError, "nested_absmax: expected 1 values"),
    (lambda: nested(nested_offset=torch.zeros(2)), ValueError, "nested_offset: expected 1 values"),
    (
        lambda: nested(nested_offset=torch.zeros(1).int()),
        TypeError,
        "nested_offset: expected a tensor of torch.float32",
    ),
    (
        lambda: ops.linear_4bit_grad_input(X, *WEIGHT.args, **WEIGHT.kwargs),
        ValueError,
        "qlora.linear_4bit_grad_input: grad_output: expected a last dimension of 16",
    ),
    (
        lambda: ops.dequantize_4bit(*WEIGHT.args, **WEIGHT.kwargs, dtype=torch.float64),
        TypeError,
        "qlora.dequantize_4bit: dtype: expected one of",
    ),
    (
        lambda: ops.embedding_4bit(INDICES.float(), *WEIGHT.args, **WEIGHT.kwargs, dtype=torch.float32),
        TypeError,
        "qlora.embedding_4bit: indices: expected a tensor of torch.int64 or torch.int32, got torch.float32 [2]",
    ),
    (
        lambda: ops.dequantize_absmax(NESTED.absmax.float(), *NESTED.nested.values()),
        TypeError,
        "qlora.dequantize_absmax: codes: expected a tensor of torch.uint8",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=[text for _, _, text in CASES])
def test_error_names_argument_and_value(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert str(caught.value).startswith("qlora.")
