"""The 4-bit linear layer of eager mode, alone and with a LoRA update, each as one node of the autograd graph.

An operator with a Python autograd formula (`ops.py`) passes through Python layers of torch.library at every call, and
LoRA around it makes five more nodes. A training step over a few thousand tokens waits for that. Here one
torch.autograd.Function stands for all of it; it calls the operators below their autograd keys. torch.compile traces the
operators instead.

The weight is frozen, so it is held by reference and not through save_for_backward: under activation checkpointing every
saved tensor costs two calls of a Python hook.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  registers the operators
from .quant_state import QuantState, scale_operands

_linear_4bit = torch.ops.qlora.linear_4bit.default
_linear_4bit_group = torch.ops.qlora.linear_4bit_group.default
_linear_4bit_grad_input = torch.ops.qlora.linear_4bit_grad_input.default


def linear(x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias: [..., k] -> [..., n] of x's dtype, in which bias [n] is."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _forward(x, weight, state, bias)
    if needs_gradient(x) or (bias is not None and needs_gradient(bias)):
        result: Tensor = _Linear.apply(x, weight, state, bias)
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
            [state.shape[0] for _, state, _ in operands if state.shape is not None],
            first.blocksize,
            first.quant_type,
        )
    return products


def lora_linear(
    x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """y = x W^T + bias + scaling (x A^T) B^T: [..., k] -> [..., n]; a [r, k], b [n, r], all of x's dtype."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        rows = x.reshape(-1, x.shape[-1])
        with _no_autocast_from(x):
            result = add_low_rank(_forward(rows, weight, state, bias), rows @ a.t(), b, scaling)
        return result.view(*x.shape[:-1], result.shape[-1])
    fused: Tensor = _LoraLinear.apply(x, weight, state, bias, a, b, scaling)
    return fused


def add_low_rank(result: Tensor, low: Tensor, b: Tensor, scaling: float) -> Tensor:
    """result + scaling * low B^T, written into `result` [rows, n]; low [rows, r], b [n, r].

    The one place where an update is added, hence where a fused kernel goes.
    """
    return result.addmm_(low, b.t(), alpha=scaling)


def _no_autocast_from(x: Tensor) -> AbstractContextManager[Any]:
    """Operands are of x's dtype; an autocast to another, for instance around backward(), must not cast some of them."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not x.dtype:
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _forward(x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        result: Tensor = _linear_4bit(
            x, weight, *scale_operands(state), bias, state.shape, state.blocksize, state.quant_type
        )
    return result


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.state = weight, state
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(x, weight, state, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = _grad_input(grad, ctx.weight, ctx.state) if ctx.needs_input_grad[0] else None
        dbias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[3] else None
        return dx, None, None, dbias


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: QuantState,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        # The result itself is returned, not a view of it: torch refuses to write to views that a Function makes.
        with torch._C._AutoDispatchBelowAutograd(), _no_autocast_from(x):
            result = _forward(x, weight, state, bias)
            low = x.reshape(-1, x.shape[-1]).mm(a.t())
            add_low_rank(result.view(-1, result.shape[-1]), low, b, scaling)
        ctx.weight, ctx.state, ctx.scaling = weight, state, scaling
        ctx.save_for_backward(x, a, b, low)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        dx = dbias = da = db = None
        with _no_autocast_from(x):
            dy = grad.reshape(-1, grad.shape[-1])
            rows = x.reshape(-1, x.shape[-1])
            if torch.is_grad_enabled():
                # For a graph of this pass `low` has to be a function of x and a, which what was kept is not.
                low = rows.mm(a.t())
            # With beta=0 the first operand only gives the shape: a product, scaled before it is rounded.
            dlow = torch.addmm(low, dy, b, beta=0, alpha=ctx.scaling) if needs_x or needs_a else low
            if needs_x:
                dx = _grad_input(dy, ctx.weight, ctx.state).addmm_(dlow, a).view(x.shape)
            if needs_a:
                da = dlow.t().mm(rows)
            if needs_b:
                db = torch.addmm(b, dy.t(), low, beta=0, alpha=ctx.scaling)
            if needs_bias:
                dbias = dy.sum(0)
        return dx, None, None, dbias, da, db, None
