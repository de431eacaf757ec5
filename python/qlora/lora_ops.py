"""The operators of a 4-bit linear layer with a LoRA adapter, beside `ops.py`, whose conventions hold here.

    left = scaling x' A^T          [m, rank], in the dtype of x
    y    = x W^T + bias + left B^T

x' is what the adapter reads: x itself, or a dropout of it (`adapter_input`). A and B may be of any float dtype: they
are read as they are, and rounded to the dtype of x within a product; their gradients come in their own dtype. What is
kept for the backward pass is x', left, A and B.

An update of several adapters of the same input is one call: their A stacked, their B, each times its own scaling, side
by side, with a scaling of 1.
"""

# A fake kernel takes its operator's arguments, used or not.
# ruff: noqa: ARG001

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _library
from ._checks import FLOATS, expected, kind

_library.load()

__all__ = ["MAX_RANK", "lora_linear_4bit", "lora_linear_4bit_backward"]

MAX_RANK = 256
"""Of the operators; a sum of ranks where several adapters are stacked."""
_LEFT_MULTIPLE = 64  # as in cpp/core/low_rank.h

_linear_4bit_grad_input = torch.ops.qlora.linear_4bit_grad_input.default
_lora_linear_4bit = torch.ops.qlora.lora_linear_4bit.default
_lora_linear_4bit_backward = torch.ops.qlora.lora_linear_4bit_backward.default

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Towards input, adapter_input, a and b: None where not asked for."""


class LoraLayer(NamedTuple):
    """A 4-bit weight and its adapter, as `lora_linear_4bit` is given them; form: shape, block_size, quant_type."""

    weight: _checks.Weight
    form: tuple[Sequence[int], int, str]
    a: Tensor
    b: Tensor
    scaling: float


def left_columns(rank: int) -> int:
    """Row length of `left`: rank rounded up; the columns behind rank are zeros."""
    return -(-rank // _LEFT_MULTIPLE) * _LEFT_MULTIPLE


def _check_lora(op: str, a: Tensor, b: Tensor, device: torch.device, shape: Sequence[int]) -> None:
    for name, value in (("a", a), ("b", b)):
        _checks.check_tensor(op, name, value, FLOATS)
        _checks.check_device(op, name, value, device)
    if a.dim() != 2 or a.shape[1] != shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
        what = f"[rank, {shape[1]}] with a rank of 1 to {MAX_RANK}"
        raise ValueError(f"qlora.{op}: a: {expected(what, kind(a))}")
    if b.dim() != 2 or b.shape[0] != shape[0] or b.shape[1] != a.shape[0]:
        raise ValueError(f"qlora.{op}: b: {expected(f'[{shape[0]}, {a.shape[0]}]', kind(b))}")


def _check_like(op: str, name: str, value: Tensor, other: Tensor, count: int) -> None:
    _checks.check_tensor(op, name, value, (other.dtype,))
    _checks.check_device(op, name, value, other.device)
    _checks.check_numel(op, name, value, count)


# ---------------------------------------------------------------------------------------------------------------------
def lora_linear_4bit(
    input: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    block_size: int,
    quant_type: str,
    bias: Tensor | None = None,
    adapter_input: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + scaling (x' A^T) B^T; differentiable, also twice, but towards the weight.

    Args:
        input: x, float32, float16 or bfloat16 [..., k]; products are computed in this dtype with float32 sums.
        shape: [n, k].
        a: A, float32, float16 or bfloat16 [rank, k]; a rank of 1 to MAX_RANK.
        b: B, likewise [n, rank].
        scaling: lora_alpha / rank, or any other number.
        bias: [n] of the dtype of input, or None.
        adapter_input: x', of the shape and dtype of input; None: input.
        The rest: a 4-bit weight, as at the top of `ops.py`.

    Returns:
        y, [..., n] of the dtype of input, and left, [m, left_columns(rank)] of the same dtype, not differentiable, for
        `lora_linear_4bit_backward`.

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said.
    """
    op = "lora_linear_4bit"
    _checks.check_matrix(op, shape)
    _checks.check_activation(op, "input", input, shape[1], shape)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, input.device, weight, shape, block_size, quant_type)
    _check_lora(op, a, b, input.device, shape)
    if bias is not None:
        _check_like(op, "bias", bias, input, shape[0])
    if adapter_input is not None:
        _check_like(op, "adapter_input", adapter_input, input, input.numel())
    output, left = _lora_linear_4bit(
        input, *weight, bias, a, b, scaling, adapter_input, shape, block_size, quant_type
    )
    return output, left


def _lora_linear_4bit_fake(
    input: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    adapter_input: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> tuple[Tensor, Tensor]:
    num_rows = math.prod(input.shape[:-1])
    output = input.new_empty((*input.shape[:-1], shape[0]))
    return output, input.new_empty((num_rows, left_columns(a.shape[0])))


torch.library.register_fake("qlora::lora_linear_4bit", _lora_linear_4bit_fake)
torch.library.register_fake("qlora::lora_linear_4bit.raw", _lora_linear_4bit_fake)


def _autograd_backward(
    ctx: Any, grad_output: Tensor | None, grad_left: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    adapter_input, left, a, b, packed, absmax, nested_absmax, nested_quant_map, nested_offset = (
        ctx.saved_tensors
    )
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    layer = LoraLayer(weight, ctx.form, a, b, ctx.scaling)
    needs = ctx.needs_input_grad
    needed = (needs[0], needs[10], needs[7], needs[8])
    gradients = gradients_of(layer, grad_output, adapter_input, left, ctx.is_separate, needed)
    grad_input, grad_adapter_input, grad_a, grad_b = gradients
    grad_bias = grad_output.sum_to_size(grad_output.shape[-1:]) if needs[6] else None
    return (
        *(grad_input, None, None, None, None, None, grad_bias),
        *(grad_a, grad_b, None, grad_adapter_input, None, None, None),
    )


def _autograd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, _, a, b, ctx.scaling, adapter_input, shape, block_size, quant_type = inputs
    ctx.form = (shape, block_size, quant_type)
    ctx.is_separate = adapter_input is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for left
    ctx.save_for_backward(adapter_input if ctx.is_separate else x, output[1], a, b, *weight)


torch.library.register_autograd(
    "qlora::lora_linear_4bit", _autograd_backward, setup_context=_autograd_setup_context
)


# ---------------------------------------------------------------------------------------------------------------------
def lora_linear_4bit_backward(
    grad_output: Tensor,
    adapter_input: Tensor,
    left: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    block_size: int,
    quant_type: str,
    is_separate: bool = False,
    needed: tuple[bool, bool, bool, bool] = (True, False, True, True),
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Gradients:
    """The gradients of `lora_linear_4bit`. Not differentiable: autograd composes other operators for a second order.

    Args:
        grad_output: dy, [..., n], of the dtype of the input.
        adapter_input: x', [..., k] of the same dtype: the input where is_separate is False.
        left: as `lora_linear_4bit` returned it.
        is_separate: whether x' is another tensor than the input.
        needed: which gradients, of (input, adapter_input, a, b), are computed. That of adapter_input is to be asked
            for only where is_separate; where not, all of it is in the gradient of input.
        The rest: as for `lora_linear_4bit`.

    Returns:
        The gradients of (input, adapter_input, a, b), the last two in the dtype of a and b; None where not needed.

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said, or needed asks for what is in another gradient.
    """
    op = "lora_linear_4bit_backward"
    _checks.check_matrix(op, shape)
    _checks.check_activation(op, "grad_output", grad_output, shape[0], shape)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, grad_output.device, weight, shape, block_size, quant_type)
    _check_lora(op, a, b, grad_output.device, shape)
    num_rows = math.prod(grad_output.shape[:-1])
    _check_like(op, "adapter_input", adapter_input, grad_output, num_rows * shape[1])
    _check_like(op, "left", left, grad_output, num_rows * left_columns(a.shape[0]))
    if needed[1] and not is_separate:
        what = "no gradient of adapter_input where is_separate is False"
        raise ValueError(f"qlora.{op}: needed: {expected(what, needed)}")
    layer = LoraLayer(weight, (shape, block_size, quant_type), a, b, scaling)
    return _raw_gradients(layer, grad_output, adapter_input, left, is_separate, needed)


def _lora_linear_4bit_backward_fake(
    grad_output: Tensor,
    adapter_input: Tensor,
    left: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    is_separate: bool,
    needs_input: bool,
    needs_adapter_input: bool,
    needs_a: bool,
    needs_b: bool,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_input = (*grad_output.shape[:-1], shape[1])
    return (
        grad_output.new_empty(like_input if needs_input else (0,)),
        grad_output.new_empty(like_input if needs_adapter_input else (0,)),
        a.new_empty(a.shape) if needs_a else grad_output.new_empty((0,)),
        b.new_empty(b.shape) if needs_b else grad_output.new_empty((0,)),
    )


def _mark_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


torch.library.register_fake("qlora::lora_linear_4bit_backward", _lora_linear_4bit_backward_fake)
torch.library.register_fake("qlora::lora_linear_4bit_backward.raw", _lora_linear_4bit_backward_fake)
torch.library.register_autograd("qlora::lora_linear_4bit_backward", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def gradients_of(
    layer: LoraLayer,
    grad_output: Tensor,
    adapter_input: Tensor,
    left: Tensor,
    is_separate: bool,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    """`lora_linear_4bit_backward`, without its checks; differentiable where a graph of this pass is recorded."""
    if not (needed[0] or needed[1] or needed[2] or needed[3]):
        return None, None, None, None
    if torch.is_grad_enabled():
        return _composed_gradients(layer, grad_output, adapter_input, is_separate, needed)
    return _raw_gradients(layer, grad_output, adapter_input, left, is_separate, needed)


def _raw_gradients(
    layer: LoraLayer,
    grad_output: Tensor,
    adapter_input: Tensor,
    left: Tensor,
    is_separate: bool,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    weight, form, *adapter = layer
    values = _lora_linear_4bit_backward(
        grad_output, adapter_input, left, *weight, *adapter, is_separate, *needed, *form
    )
    grad_input, grad_adapter_input, grad_a, grad_b = (
        value if is_needed else None for value, is_needed in zip(values, needed, strict=True)
    )
    return grad_input, grad_adapter_input, grad_a, grad_b


def _composed_gradients(
    layer: LoraLayer,
    grad_output: Tensor,
    adapter_input: Tensor,
    is_separate: bool,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    """By differentiable operations; left, which was computed without a graph, is computed again from x' and A."""
    weight, form, a, b, scaling = layer
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    x = adapter_input.reshape(-1, adapter_input.shape[-1])
    narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
    grad_left = (dy @ narrow_b) * scaling
    grad_input = grad_adapter_input = grad_a = grad_b = None
    if needed[0]:
        grad_input = _linear_4bit_grad_input(dy, *weight, *form)
        if not is_separate:
            grad_input = grad_input + grad_left @ narrow_a
        grad_input = grad_input.view(*grad_output.shape[:-1], -1)
    if needed[1]:
        grad_adapter_input = (grad_left @ narrow_a).view_as(adapter_input)
    if needed[2]:
        grad_a = (grad_left.t() @ x).to(a.dtype)
    if needed[3]:
        grad_b = (dy.t() @ ((x @ narrow_a.t()) * scaling)).to(b.dtype)
    return grad_input, grad_adapter_input, grad_a, grad_b
