"""The operators: checked wrappers over `torch.ops.qlora.*`, their fake kernels and their gradients.

A 4-bit weight travels as `packed, absmax, shape`, with `nested_absmax, nested_quant_map, nested_offset` where its
scales are double-quantised (absmax is then uint8):

    packed            bytes of any dtype on the device of the call, at least ceil(prod(shape) / 2) of them
    absmax            float32 [num_blocks], or uint8 [num_blocks] with the three nested tensors
    nested_absmax     float32 [ceil(num_blocks / 256)]
    nested_quant_map  float32 [256]
    nested_offset     one value, cast to float32
    shape             the weight's shape, [n, k] for a linear layer

The weight is frozen: nothing here has a gradient towards it. Each op below is wrapper, fake kernel, backward and
setup_context, in this order; those with a LoRA adapter are in `lora_ops.py`. Wrappers raise TypeError (dtype, device, not a tensor) or ValueError (anything else) with
the value that came; they trace under torch.compile(fullgraph=True). Autocast does not touch them: a linear layer
computes in the dtype of its input.
"""

# A fake kernel takes its operator's arguments, used or not.
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _library
from ._checks import FLOATS
from .format import DEFAULT_BLOCK_SIZE, nested_quant_map, num_blocks, num_nested_blocks, num_packed_bytes
from .group_ops import linear_4bit_group
from .lora_ops import lora_linear_4bit, lora_linear_4bit_backward

_library.load()

__all__ = [
    "dequantize_4bit",
    "dequantize_absmax",
    "embedding_4bit",
    "linear_4bit",
    "linear_4bit_grad_input",
    "linear_4bit_group",
    "lora_linear_4bit",
    "lora_linear_4bit_backward",
    "quantize_4bit",
    "quantize_absmax",
    "round_columns_nf4",
]

#: Columns of a call of `round_columns_nf4` at most.
MAX_ROUND_COLUMNS = 32

_STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

_quantize_4bit = torch.ops.qlora.quantize_4bit.default
_dequantize_4bit = torch.ops.qlora.dequantize_4bit.default
_quantize_absmax = torch.ops.qlora.quantize_absmax.default
_dequantize_absmax = torch.ops.qlora.dequantize_absmax.default
_round_columns_nf4 = torch.ops.qlora.round_columns_nf4.default
_linear_4bit = torch.ops.qlora.linear_4bit.default
_linear_4bit_grad_input = torch.ops.qlora.linear_4bit_grad_input.default
_embedding_4bit = torch.ops.qlora.embedding_4bit.default


# ---------------------------------------------------------------------------------------------------------------------
# Operators without a gradient mark their outputs as such: they come out with requires_grad False whatever went in.


def _mark_outputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradient(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


# ---------------------------------------------------------------------------------------------------------------------
def quantize_4bit(
    input: Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor]:
    """Quantises a tensor of any shape to 4 bits. Not differentiable.

    Args:
        input: float32, float16 or bfloat16; n values.
        block_size: 32, 64, ... 4096 values share one scale; blocks run over the flattened tensor.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype in which the bytes are returned: uint8, int8 or a float; zero bytes fill the last item.

    Returns:
        packed, `quant_storage` [ceil(n / (2 * itemsize)), 1], and absmax, float32 [ceil(n / block_size)].
        A NaN or Inf makes the absmax of its block NaN or Inf.

    Raises:
        TypeError: input or quant_storage is of another dtype.
        ValueError: block_size or quant_type is unknown.
    """
    _checks.check_tensor("quantize_4bit", "input", input, FLOATS)
    _checks.check_format("quantize_4bit", block_size, quant_type)
    if quant_storage not in _STORAGES:
        raise TypeError(
            f"qlora.quantize_4bit: quant_storage: {_checks.expected(f'one of {_STORAGES}', quant_storage)}"
        )
    packed, absmax = _quantize_4bit(input, block_size, quant_type)
    if quant_storage is not torch.uint8:
        flat = packed.view(-1)
        missing = -flat.numel() % quant_storage.itemsize
        packed = torch.nn.functional.pad(flat, (0, missing)).view(quant_storage).unsqueeze(1)
    return packed, absmax


def _quantize_4bit_fake(input: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    n = input.numel()
    packed = input.new_empty((num_packed_bytes(n), 1), dtype=torch.uint8)
    return packed, input.new_empty((num_blocks(n, block_size),), dtype=torch.float32)


torch.library.register_fake("qlora::quantize_4bit", _quantize_4bit_fake)
torch.library.register_autograd("qlora::quantize_4bit", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """The values of a 4-bit tensor: code * absmax in float32, rounded once to dtype. Not differentiable.

    Args:
        shape: sizes of the result, of any rank.
        dtype: float32, float16 or bfloat16.
        The rest: a 4-bit weight, as at the top of this module.

    Returns:
        `dtype` [*shape].

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said.
    """
    op = "dequantize_4bit"
    _checks.check_dtype(op, dtype)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, packed.device, weight, shape, block_size, quant_type)
    output: Tensor = _dequantize_4bit(*weight, shape, block_size, quant_type, dtype)
    return output


def _dequantize_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


torch.library.register_fake("qlora::dequantize_4bit", _dequantize_4bit_fake)
torch.library.register_autograd("qlora::dequantize_4bit", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Double quantisation: scales to 8 bits, in groups of 256, around their mean. Not differentiable.

    Args:
        absmax: float32 [n].

    Returns:
        codes uint8 [n], nested_absmax float32 [ceil(n / 256)], nested_quant_map float32 [256] (one shared tensor per
        device: clone it before writing) and nested_offset float32 [] (the mean; 0 where n is 0).

    Raises:
        TypeError: absmax is not float32.
        ValueError: absmax is not one-dimensional.
    """
    _checks.check_tensor("quantize_absmax", "absmax", absmax, (torch.float32,))
    if absmax.dim() != 1:
        raise ValueError(
            f"qlora.quantize_absmax: absmax: {_checks.expected('one dimension', _checks.kind(absmax))}"
        )
    absmax = absmax.detach()
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    quant_map = nested_quant_map(absmax.device)
    codes, nested_absmax = _quantize_absmax(absmax, offset, quant_map)
    return codes, nested_absmax, quant_map, offset


def _quantize_absmax_fake(
    absmax: Tensor, nested_offset: Tensor, nested_quant_map: Tensor
) -> tuple[Tensor, Tensor]:
    n = absmax.numel()
    return absmax.new_empty((n,), dtype=torch.uint8), absmax.new_empty((num_nested_blocks(n),))


torch.library.register_fake("qlora::quantize_absmax", _quantize_absmax_fake)
torch.library.register_autograd("qlora::quantize_absmax", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, nested_offset: Tensor
) -> Tensor:
    """The scales that `quantize_absmax` stored: map[code] * nested_absmax[b // 256] + offset. Not differentiable.

    Args:
        codes: uint8 [n]; the rest as at the top of this module.

    Returns:
        float32 [n].

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size is not as said.
    """
    op = "dequantize_absmax"
    _checks.check_tensor(op, "codes", codes, (torch.uint8,))
    offset = _checks.check_nested(op, codes.device, codes, nested_absmax, nested_quant_map, nested_offset)
    output: Tensor = _dequantize_absmax(codes, nested_absmax, nested_quant_map, offset)
    return output


def _dequantize_absmax_fake(
    absmax: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, nested_offset: Tensor
) -> Tensor:
    return absmax.new_empty((absmax.numel(),), dtype=torch.float32)


torch.library.register_fake("qlora::dequantize_absmax", _dequantize_absmax_fake)
torch.library.register_autograd("qlora::dequantize_absmax", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def round_columns_nf4(
    values: Tensor, scales: Tensor, inverse: Tensor, coupling: Tensor, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds columns of a weight to NF4 in turn, each rounding moving those still open. Not differentiable.

    With open = values, for j = 0, 1, ..., each product, difference and sum rounded to float32:

        rounded[j] = code value nearest to open[j] * inverse[j], times scales[j]
        change[j]  = previous[j] - rounded[j]                without `previous`: open[j] - rounded[j]
        open[l]   += coupling[j, l] * change[j]              for l > j

    Args:
        values: float32 [num_columns, n]: columns of a weight [n, k], num_columns at most MAX_ROUND_COLUMNS.
        scales, inverse: float32 [num_columns, n].
        coupling: float32 [num_columns, num_columns], read above the diagonal.
        previous: float32 [num_columns, n] or None.

    Returns:
        rounded and change, float32 [num_columns, n].

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size is not as said.
    """
    op = "round_columns_nf4"
    _checks.check_tensor(op, "values", values, (torch.float32,))
    if values.dim() != 2 or values.shape[0] > MAX_ROUND_COLUMNS:
        wanted = f"[num_columns, n] of at most {MAX_ROUND_COLUMNS} columns"
        raise ValueError(f"qlora.{op}: values: {_checks.expected(wanted, list(values.shape))}")
    like = (("scales", scales), ("inverse", inverse), ("previous", values if previous is None else previous))
    square = values.shape[0]
    for name, tensor, shape in (
        *((name, tensor, values.shape) for name, tensor in like),
        ("coupling", coupling, (square, square)),
    ):
        _checks.check_tensor(op, name, tensor, (torch.float32,))
        _checks.check_device(op, name, tensor, values.device)
        if tensor.shape != shape:
            raise ValueError(f"qlora.{op}: {name}: {_checks.expected(str(list(shape)), list(tensor.shape))}")
    rounded, change = _round_columns_nf4(values, scales, inverse, coupling, previous)
    return rounded, change


def _round_columns_nf4_fake(
    values: Tensor, scales: Tensor, inverse: Tensor, coupling: Tensor, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


torch.library.register_fake("qlora::round_columns_nf4", _round_columns_nf4_fake)
torch.library.register_autograd("qlora::round_columns_nf4", _no_gradient, setup_context=_mark_outputs)


# ---------------------------------------------------------------------------------------------------------------------
def linear_4bit(
    input: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    block_size: int,
    quant_type: str,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b with a frozen 4-bit weight; differentiable, also twice, towards input and bias.

    Args:
        input: float32, float16 or bfloat16 [..., k]; the product is computed in this dtype with float32 sums.
        bias: [n] of the dtype of input, or None.
        shape: [n, k].
        The rest: a 4-bit weight, as at the top of this module.

    Returns:
        [..., n] of the dtype of input.

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said.
    """
    op = "linear_4bit"
    _checks.check_matrix(op, shape)
    _checks.check_activation(op, "input", input, shape[1], shape)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, input.device, weight, shape, block_size, quant_type)
    if bias is not None:
        _checks.check_tensor(op, "bias", bias, (input.dtype,))
        _checks.check_device(op, "bias", bias, input.device)
        _checks.check_numel(op, "bias", bias, shape[0])
    output: Tensor = _linear_4bit(input, *weight, bias, shape, block_size, quant_type)
    return output


def _linear_4bit_fake(
    input: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], shape[0]))


torch.library.register_fake("qlora::linear_4bit", _linear_4bit_fake)
torch.library.register_fake("qlora::linear_4bit.raw", _linear_4bit_fake)


def _linear_4bit_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _linear_4bit_grad_input(grad_output, *ctx.saved_tensors, *ctx.format)
    if ctx.needs_input_grad[6]:
        grad_bias = grad_output.sum_to_size(grad_output.shape[-1:])
    return grad_input, None, None, None, None, None, grad_bias, None, None, None


def _linear_4bit_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_quant_map, nested_offset, _, *ctx.format = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_quant_map, nested_offset)


torch.library.register_autograd(
    "qlora::linear_4bit", _linear_4bit_backward, setup_context=_linear_4bit_setup_context
)


# ---------------------------------------------------------------------------------------------------------------------
def linear_4bit_grad_input(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    block_size: int,
    quant_type: str,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """dx = dy W, the gradient of `linear_4bit` towards its input; differentiable towards grad_output.

    Args:
        grad_output: float32, float16 or bfloat16 [..., n].
        shape: [n, k].
        The rest: a 4-bit weight, as at the top of this module.

    Returns:
        [..., k] of the dtype of grad_output.

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said.
    """
    op = "linear_4bit_grad_input"
    _checks.check_matrix(op, shape)
    _checks.check_activation(op, "grad_output", grad_output, shape[0], shape)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, grad_output.device, weight, shape, block_size, quant_type)
    output: Tensor = _linear_4bit_grad_input(grad_output, *weight, shape, block_size, quant_type)
    return output


def _linear_4bit_grad_input_fake(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], shape[1]))


torch.library.register_fake("qlora::linear_4bit_grad_input", _linear_4bit_grad_input_fake)
torch.library.register_fake("qlora::linear_4bit_grad_input.raw", _linear_4bit_grad_input_fake)


def _linear_4bit_grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0]:
        gradient = _linear_4bit(grad, *ctx.saved_tensors, None, *ctx.format)
    return gradient, None, None, None, None, None, None, None, None


def _linear_4bit_grad_input_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_quant_map, nested_offset, *ctx.format = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_quant_map, nested_offset)


torch.library.register_autograd(
    "qlora::linear_4bit_grad_input",
    _linear_4bit_grad_input_backward,
    setup_context=_linear_4bit_grad_input_setup_context,
)


# ---------------------------------------------------------------------------------------------------------------------
def embedding_4bit(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Rows `indices` of a frozen 4-bit matrix, dequantised. Not differentiable.

    Args:
        indices: int64 or int32 of any shape, each in [0, rows). One outside is a RuntimeError on CPU; on CUDA its row
            is NaN, since the check would wait for the device.
        shape: [rows, cols].
        dtype: float32, float16 or bfloat16.
        The rest: a 4-bit weight, as at the top of this module.

    Returns:
        `dtype` [*indices.shape, cols].

    Raises:
        TypeError: a dtype or device is not as said.
        ValueError: a size, block_size or quant_type is not as said.
    """
    op = "embedding_4bit"
    _checks.check_matrix(op, shape)
    _checks.check_tensor(op, "indices", indices, (torch.int64, torch.int32))
    _checks.check_dtype(op, dtype)
    weight = (packed, absmax, nested_absmax, nested_quant_map, nested_offset)
    weight = _checks.check_weight(op, indices.device, weight, shape, block_size, quant_type)
    output: Tensor = _embedding_4bit(indices.long(), *weight, shape, block_size, quant_type, dtype)
    return output


def _embedding_4bit_fake(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    return indices.new_empty((*indices.shape, shape[1]), dtype=dtype)


torch.library.register_fake("qlora::embedding_4bit", _embedding_4bit_fake)
torch.library.register_autograd("qlora::embedding_4bit", _no_gradient, setup_context=_mark_outputs)
