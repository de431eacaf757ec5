"""The operator for several 4-bit weights that share their input: wrapper, fake kernel, backward. Part of ops.py."""

# A fake kernel takes its operator's arguments, used or not.
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _library

_library.load()

_linear_4bit_group = torch.ops.qlora.linear_4bit_group.default
_linear_4bit_grad_input = torch.ops.qlora.linear_4bit_grad_input.default


def linear_4bit_group(
    input: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    rows: Sequence[int],
    *,
    block_size: int,
    quant_type: str,
    bias: Sequence[Tensor | None] | None = None,
    nested_absmax: Sequence[Tensor] = (),
    nested_quant_map: Sequence[Tensor] = (),
    nested_offset: Sequence[Tensor] = (),
) -> list[Tensor]:
    """[x W^T + b for W, b in weights]: `linear_4bit` for weights that share their input, on CUDA in one launch if it can.

    Differentiable, also twice, towards input and biases. On CPU the results are `linear_4bit`'s to the bit; on CUDA
    they may differ from its in rounding, since a launch for all may add up k in other parts.

    Args:
        input: float32, float16 or bfloat16 [..., k].
        packed, absmax: of each weight, as at the top of qlora.ops.
        rows: n of each weight, whose shape is [n, k].
        bias: for each weight [n] of the dtype of input, or None; None: no biases.
        nested_absmax, nested_quant_map, nested_offset: of each weight; empty where the scales are plain float32, which
            they are for all or for none.

    Returns:
        For each weight [..., n] of the dtype of input.

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, the length of a list, block_size or quant_type is not as said.
    """
    op = "linear_4bit_group"
    _checks.check_tensor(op, "input", input, _checks.FLOATS)
    if input.dim() == 0:
        raise ValueError(f"qlora.{op}: input: {_checks.expected('[..., k]', _checks.kind(input))}")
    biases: list[Tensor | None] = [None] * len(rows) if bias is None else list(bias)
    lists = {"packed": packed, "absmax": absmax, "bias": biases}
    is_nested = len(nested_absmax) > 0
    nested = {
        "nested_absmax": nested_absmax,
        "nested_quant_map": nested_quant_map,
        "nested_offset": nested_offset,
    }
    for name, values in (*lists.items(), *nested.items()):
        count = 0 if name in nested and not is_nested else len(rows)
        if len(values) != count:
            raise ValueError(f"qlora.{op}: {name}: {_checks.expected(f'{count} items', len(values))}")
    offsets = []
    for i, n in enumerate(rows):
        member = f"{op}[{i}]"
        scales = (
            (nested_absmax[i], nested_quant_map[i], nested_offset[i]) if is_nested else (None, None, None)
        )
        weight: _checks.Weight = (packed[i], absmax[i], *scales)
        shape = (n, input.shape[-1])
        offset = _checks.check_weight(member, input.device, weight, shape, block_size, quant_type)[4]
        if offset is not None:
            offsets.append(offset)
        value = biases[i]
        if value is not None:
            _checks.check_tensor(member, "bias", value, (input.dtype,))
            _checks.check_device(member, "bias", value, input.device)
            _checks.check_numel(member, "bias", value, n)
    outputs: list[Tensor] = _linear_4bit_group(
        input,
        list(packed),
        list(absmax),
        list(nested_absmax),
        list(nested_quant_map),
        offsets,
        [value for value in biases if value is not None],
        [i for i, value in enumerate(biases) if value is not None],
        list(rows),
        block_size,
        quant_type,
    )
    return outputs


def _linear_4bit_group_fake(
    input: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_quant_map: list[Tensor],
    nested_offset: list[Tensor],
    bias: list[Tensor],
    biased: list[int],
    rows: list[int],
    block_size: int,
    quant_type: str,
) -> list[Tensor]:
    return [input.new_empty((*input.shape[:-1], n)) for n in rows]


torch.library.register_fake("qlora::linear_4bit_group", _linear_4bit_group_fake)


def _linear_4bit_group_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    count = len(ctx.rows)
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    lists: list[Sequence[Tensor | None]] = [
        saved[i * count : (i + 1) * count] for i in range(len(saved) // count)
    ]
    lists += [[None] * count] * (5 - len(lists))
    grad_input = None
    if ctx.needs_input_grad[0]:
        for grad, n, *weight in zip(grads, ctx.rows, *lists, strict=True):
            part = _linear_4bit_grad_input(grad, *weight, (n, ctx.cols), *ctx.format)
            grad_input = part if grad_input is None else grad_input + part
    grad_biases = [
        grads[i].sum_to_size(grads[i].shape[-1:]) if needed else None
        for i, needed in zip(ctx.biased, ctx.needs_input_grad[6], strict=True)
    ]
    no_weights = [[None] * len(needed) for needed in ctx.needs_input_grad[1:6]]
    no_biased: list[None] | None = None if ctx.biased else []  # torch takes an empty list for one of tensors
    return grad_input, *no_weights, grad_biases, no_biased, None, None, None


def _linear_4bit_group_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    (
        x,
        packed,
        absmax,
        nested_absmax,
        nested_quant_map,
        nested_offset,
        _,
        ctx.biased,
        ctx.rows,
        *ctx.format,
    ) = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(*packed, *absmax, *nested_absmax, *nested_quant_map, *nested_offset)


torch.library.register_autograd(
    "qlora::linear_4bit_group",
    _linear_4bit_group_backward,
    setup_context=_linear_4bit_group_setup_context,
)
