"""The 4-bit linear layer of eager mode, alone and with a LoRA update, each as one node of the autograd graph.

An operator with a Python autograd formula (`ops.py`, `lora_ops.py`) passes through Python layers of torch.library at
every call. A training step over a few thousand tokens waits for that. Here one torch.autograd.Function stands for it; it
calls the operators below their autograd keys. torch.compile traces the operators instead.

The weight is frozen, so it is held by reference and not through save_for_backward: under activation checkpointing every
saved tensor costs two calls of a Python hook.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import lora_ops
from .._checks import FLOATS
from .quant_state import QuantState, matrix_shape, scale_operands

_linear_4bit = torch.ops.qlora.linear_4bit.default
_linear_4bit_group = torch.ops.qlora.linear_4bit_group.default
_linear_4bit_grad_input = torch.ops.qlora.linear_4bit_grad_input.default
_lora_linear_4bit = torch.ops.qlora.lora_linear_4bit.default


def linear(
    x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None, *, has_result: bool = True
) -> Tensor:
    """y = x W^T + bias: [..., k] -> [..., n] of x's dtype, in which bias [n] is; arbitrary without has_result."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _forward(x, weight, state, bias)
    if needs_gradient(x) or (bias is not None and needs_gradient(bias)):
        result: Tensor = _Linear.apply(x, weight, state, bias, has_result)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(x, weight, state, bias)


def needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def group_linear(x: Tensor, operands: list[tuple[Tensor, QuantState, Tensor | None]]) -> list[Tensor]:
    """`linear` of x [..., k] with each (weight, state, bias), without a gradient. All states are of one format."""
    first = operands[0][1]
    scales = [scale_operands(state) for _, state, _ in operands]
    absmax, *nested = zip(*scales, strict=True)
    if not first.nested:
        nested = [(), (), ()]
    compiling = torch.compiler.is_compiling()
    with (
        torch._C.DisableTorchFunctionSubclass(),
        nullcontext() if compiling else torch._C._AutoDispatchBelowAutograd(),
    ):
        products: list[Tensor] = _linear_4bit_group(
            x,
            [weight for weight, _, _ in operands],
            absmax,
            *nested,
            [bias for _, _, bias in operands if bias is not None],
            [i for i, operand in enumerate(operands) if operand[2] is not None],
            [matrix_shape(state)[0] for _, state, _ in operands],
            first.blocksize,
            first.quant_type,
        )
    return products


def lora_linear(
    x: Tensor,
    weight: Tensor,
    state: QuantState,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    adapter_input: Tensor | None = None,
    *,
    has_result: bool = True,
) -> Tensor:
    """y = x W^T + bias + scaling (x' A^T) B^T: [..., k] -> [..., n] of x's dtype, in which bias [n] is.

    a [r, k] and b [n, r] may be of another float dtype; x' is adapter_input, of x's shape and dtype, or else x. Without
    has_result, which is for eager mode, y is arbitrary and only its backward pass is right.
    """
    is_transformed = torch._C._are_functorch_transforms_active()
    if is_transformed or not _is_served(a, b):
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows if adapter_input is None else adapter_input.reshape(rows.shape)
        with _no_autocast_from(x):
            low = narrow @ a.to(x.dtype).t()
            result = linear(rows, weight, state, bias)
            b = b.to(x.dtype)
            if is_transformed:  # Under vmap over adapters the result may have fewer dimensions than the sum.
                result = torch.addmm(result, low, b.t(), alpha=scaling)
            else:
                add_low_rank(result, low, b, scaling)
        return result.view(*x.shape[:-1], result.shape[-1])
    if x.dtype is torch.float16 and abs(scaling) > 1:
        # scaling x' A^T is kept in x's dtype, and might be too large for it.
        b, scaling = b * scaling, 1.0
    if torch.compiler.is_compiling():
        return _lora_forward(x, weight, state, bias, a, b, scaling, adapter_input)[0]
    fused: Tensor = _LoraLinear.apply(x, weight, state, bias, a, b, scaling, adapter_input, has_result)
    return fused


def add_low_rank(result: Tensor, low: Tensor, b: Tensor, scaling: float) -> Tensor:
    """result + scaling * low B^T, written into `result` [rows, n]; low [rows, r], b [n, r]. For what no operator serves."""
    return result.addmm_(low, b.t(), alpha=scaling)


def _is_served(a: Tensor, b: Tensor) -> bool:
    """Whether the operator takes an adapter of these matrices."""
    return a.shape[0] <= lora_ops.MAX_RANK and a.dtype in FLOATS and b.dtype in FLOATS


def _no_autocast_from(x: Tensor) -> AbstractContextManager[Any]:
    """Operands are of x's dtype; an autocast to another, for instance around backward(), must not cast some of them."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not x.dtype:
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _forward(x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        result: Tensor = _linear_4bit(
            x, weight, *scale_operands(state), bias, matrix_shape(state), state.blocksize, state.quant_type
        )
    return result


def _lora_forward(
    x: Tensor,
    weight: Tensor,
    state: QuantState,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    adapter_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result and `left`."""
    form = (matrix_shape(state), state.blocksize, state.quant_type)
    with torch._C.DisableTorchFunctionSubclass():
        result, left = _lora_linear_4bit(
            x, weight, *scale_operands(state), bias, a, b, scaling, adapter_input, *form
        )
    return result, left


def _grad_input(grad: Tensor, weight: Tensor, state: QuantState) -> Tensor:
    """dx = dy W; with a graph of its own where one is recorded (create_graph)."""
    arguments = (
        grad,
        weight,
        *scale_operands(state),
        state.shape,
        state.blocksize,
        state.quant_type,
    )
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_grad_enabled():
            return _linear_4bit_grad_input(*arguments)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return _linear_4bit_grad_input(*arguments)  # type: ignore[no-any-return]


def _arbitrary(x: Tensor, state: QuantState) -> Tensor:
    assert state.shape is not None
    return x.new_empty((*x.shape[:-1], state.shape[0]))


def _left(x: Tensor, a: Tensor, scaling: float) -> Tensor:
    """scaling x A^T as `lora_linear_4bit` returns it."""
    rows, rank = x.reshape(-1, x.shape[-1]), a.shape[0]
    left = rows.new_zeros((len(rows), lora_ops.left_columns(rank)))
    left[:, :rank] = torch.addmm(left[:, :rank], rows, a.to(x.dtype).t(), beta=0, alpha=scaling)
    return left


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None, has_result: bool
    ) -> Tensor:
        ctx.weight, ctx.state = weight, state
        if not has_result:
            return _arbitrary(x, state)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(x, weight, state, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = _grad_input(grad, ctx.weight, ctx.state) if ctx.needs_input_grad[0] else None
        dbias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[3] else None
        return dx, None, None, dbias, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Of the operands of `_lora_forward`, and whether to compute the result."""
        *operands, has_result = arguments
        x, ctx.weight, ctx.state, _, a, b, ctx.scaling, adapter_input = operands
        with torch._C._AutoDispatchBelowAutograd():
            if has_result:
                result, left = _lora_forward(*operands)
            else:
                result = _arbitrary(x, ctx.state)
                left = _left(x if adapter_input is None else adapter_input, a, ctx.scaling)
        ctx.is_separate = adapter_input is not None
        ctx.save_for_backward(x if adapter_input is None else adapter_input, left, a, b)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, a, b = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_a, needs_b, _, needs_adapter_input, _ = ctx.needs_input_grad
        state = ctx.state
        form = (state.shape, state.blocksize, state.quant_type)
        below = nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        with torch._C.DisableTorchFunctionSubclass(), _no_autocast_from(x), below:
            layer = lora_ops.LoraLayer((ctx.weight, *scale_operands(state)), form, a, b, ctx.scaling)
            needed = (needs_x, needs_adapter_input, needs_a, needs_b)
            gradients = lora_ops.gradients_of(layer, grad, x, left, ctx.is_separate, needed)
            dbias = grad.sum_to_size(grad.shape[-1:]) if needs_bias else None
        dx, dadapter_input, da, db = gradients
        return dx, None, None, dbias, da, db, None, dadapter_input, None
