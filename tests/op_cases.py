"""Weights and calls that the operator tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# [n, k]: rows that end within a block, odd counts, one row, one column, and one that fills blocks exactly.
SHAPES = ((48, 128), (5, 48), (7, 33), (1, 64), (65, 1), (3, 131))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@dataclass
class Weight:
    """A 4-bit weight as ops.py takes it, with its exact float32 values."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    format: dict[str, Any]
    dense: Tensor
    nested: dict[str, Tensor] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        return self.packed, self.absmax, self.shape

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.format, **self.nested}

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the schemas."""
        return (
            *(self.packed, self.absmax, self.nested.get("nested_absmax")),
            *(self.nested.get("nested_quant_map"), self.nested.get("nested_offset")),
        )


def make_weight(
    *shape: int,
    device: str = "cpu",
    block_size: int = 64,
    quant_type: str = "nf4",
    is_nested: bool = False,
    seed: int = 0,
) -> Weight:
    """A random weight, quantised by the reference, with scales that differ between blocks."""
    values = randn(*shape, seed=seed) * torch.exp(randn(*shape[:-1], 1, seed=seed + 1))
    packed, absmax = reference.quantize_4bit(values, block_size, quant_type)
    nested = {}
    scales = absmax
    if is_nested:
        absmax, *rest = reference.quantize_absmax(absmax)
        nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), rest, strict=True))
        scales = reference.dequantize_absmax(absmax, *rest)
    dense = reference.dequantize_4bit(packed, scales, shape, block_size=block_size, quant_type=quant_type)
    return Weight(
        packed.to(device),
        absmax.to(device),
        shape,
        {"block_size": block_size, "quant_type": quant_type},
        dense.to(device),
        {name: value.to(device) for name, value in nested.items()},
    )


def linear_tolerance(x: Tensor, weight: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of sum_k x w in `dtype` with float32 sums, for float64 x [m, k], weight [n, k], expected [m, n].

    k float32 roundings (products and sums), and where the weight is rounded to a 16-bit dtype half a step of it, all
    relative to sum |x w|; then one rounding of the result, to a subnormal at worst.
    """
    info = torch.finfo(dtype)
    half_step = info.eps / 2 if dtype is not torch.float32 else 0.0
    magnitude = x.double().abs() @ weight.double().abs().T
    relative = x.shape[-1] * torch.finfo(torch.float32).eps + half_step
    return (
        relative * magnitude
        + info.eps / 2 * (expected.abs() + relative * magnitude)
        + info.smallest_normal * info.eps
    )


@dataclass
class Call:
    """One operator: through its wrapper, as a function of tensors alone, and raw."""

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    raw: Any
    raw_args: tuple[Any, ...]


def _with_weight(
    op: Any, weight: Weight, lead: Tensor, raw: Any, raw_args: tuple[Any, ...], **more: Any
) -> Call:
    names = list(weight.nested)

    def function(lead: Tensor, packed: Tensor, absmax: Tensor, *nested: Tensor) -> Any:
        tensors = dict(zip(names, nested, strict=True))
        return op(lead, packed, absmax, weight.shape, **weight.format, **tensors, **more)

    tensors = (lead, weight.packed, weight.absmax, *weight.nested.values())
    return Call(function, tensors, raw, raw_args)


def make_call(name: str, device: str, *, is_nested: bool = True, dtype: torch.dtype = torch.float32) -> Call:
    """A call of operator `name` on small, odd, straddling sizes."""
    weight = make_weight(37, 70, device=device, block_size=32, is_nested=is_nested)
    form = (weight.format["block_size"], weight.format["quant_type"])
    queue = torch.ops.qlora
    if name == "quantize_4bit":
        x = randn(5, 77, seed=3, dtype=dtype, device=device)
        return Call(ops.quantize_4bit, (x,), queue.quantize_4bit.default, (x, 64, "nf4"))
    if name == "quantize_absmax":
        absmax = randn(300, seed=4, device=device).abs()
        _, _, quant_map, offset = reference.quantize_absmax(absmax)
        raw_args = (absmax, offset, quant_map)
        return Call(ops.quantize_absmax, (absmax,), queue.quantize_absmax.default, raw_args)
    if name == "dequantize_absmax":
        tensors = reference.quantize_absmax(randn(300, seed=4, device=device).abs())
        return Call(ops.dequantize_absmax, tensors, queue.dequantize_absmax.default, tensors)
    if name == "dequantize_4bit":
        names = list(weight.nested)

        def dequantize(packed: Tensor, absmax: Tensor, *nested: Tensor) -> Tensor:
            tensors = dict(zip(names, nested, strict=True))
            return ops.dequantize_4bit(packed, absmax, weight.shape, **weight.format, **tensors, dtype=dtype)

        raw_args = (*weight.tensors, weight.shape, *form, dtype)
        tensors = (weight.packed, weight.absmax, *weight.nested.values())
        return Call(dequantize, tensors, queue.dequantize_4bit.default, raw_args)
    if name == "linear_4bit":
        x = randn(3, 4, 70, seed=5, dtype=dtype, device=device)
        bias = randn(37, seed=6, dtype=dtype, device=device)
        raw_args = (x, *weight.tensors, bias, weight.shape, *form)
        return _with_weight(ops.linear_4bit, weight, x, queue.linear_4bit.default, raw_args, bias=bias)
    if name == "linear_4bit_grad_input":
        dy = randn(3, 4, 37, seed=5, dtype=dtype, device=device)
        raw_args = (dy, *weight.tensors, weight.shape, *form)
        return _with_weight(
            ops.linear_4bit_grad_input, weight, dy, queue.linear_4bit_grad_input.default, raw_args
        )
    if name == "lora_linear_4bit":
        x, dropped = (randn(3, 4, 70, seed=seed, dtype=dtype, device=device) for seed in (5, 9))
        bias = randn(37, seed=6, dtype=dtype, device=device)
        a, b = lora(37, 70, 5, device=device)
        raw_args = (x, *weight.tensors, bias, a, b, 0.5, dropped, weight.shape, *form)
        more = {"a": a, "b": b, "scaling": 0.5, "bias": bias, "adapter_input": dropped}
        return _with_weight(ops.lora_linear_4bit, weight, x, queue.lora_linear_4bit.default, raw_args, **more)
    if name == "lora_linear_4bit_backward":
        dy = randn(3, 4, 37, seed=5, dtype=dtype, device=device)
        x = randn(3, 4, 70, seed=6, dtype=dtype, device=device)
        a, b = lora(37, 70, 5, device=device)
        left = torch.nn.functional.pad(randn(12, 5, seed=7, dtype=dtype, device=device), (0, 59))
        needed = (True, True, True, True)
        raw_args = (dy, x, left, *weight.tensors, a, b, 0.5, True, *needed, weight.shape, *form)
        more = {"a": a, "b": b, "scaling": 0.5, "is_separate": True, "needed": needed}
        raw = queue.lora_linear_4bit_backward.default
        return _with_weight(partial(_lora_backward, x, left), weight, dy, raw, raw_args, **more)
    if name == "round_columns_nf4":
        columns = round_columns_case(7, 37, device=device)
        return Call(ops.round_columns_nf4, columns, queue.round_columns_nf4.default, columns)
    if name == "linear_4bit_group":
        return _make_group_call(weight, device, is_nested, dtype)
    if name == "embedding_4bit":
        indices = torch.tensor([[0, 36, 5], [5, 1, 2]], device=device)
        raw_args = (indices, *weight.tensors, weight.shape, *form, dtype)
        return _with_weight(
            ops.embedding_4bit, weight, indices, queue.embedding_4bit.default, raw_args, dtype=dtype
        )
    raise ValueError(name)


def round_columns_case(
    num_columns: int, n: int, *, device: str = "cpu", seed: int = 10
) -> tuple[Tensor, ...]:
    """values, scales, inverse, coupling and previous of round_columns_nf4; some values lie beyond the code book."""
    values, previous = (randn(num_columns, n, seed=seed + i, device=device) for i in range(2))
    scales = randn(num_columns, n, seed=seed + 2, device=device).abs() + 0.5
    coupling = randn(num_columns, num_columns, seed=seed + 3, device=device) / 4
    return values, scales, scales.reciprocal(), coupling, previous


def lora(n: int, k: int, rank: int, *, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """a [rank, k] and b [n, rank] of an adapter, of dtype."""
    a = randn(rank, k, seed=7, dtype=dtype, device=device)
    return [a, randn(n, rank, seed=8, dtype=dtype, device=device)]


def _lora_backward(x: Tensor, left: Tensor, dy: Tensor, *args: Any, **kwargs: Any) -> Any:
    return ops.lora_linear_4bit_backward(dy, x, left, *args, **kwargs)


def group_lists(weights: Sequence[Weight]) -> tuple[list[Tensor], ...]:
    """packed, absmax, nested_absmax, nested_quant_map, nested_offset of each, as linear_4bit_group takes them."""
    columns = zip(*(weight.tensors for weight in weights), strict=True)
    return tuple([tensor for tensor in column if tensor is not None] for column in columns)


def _make_group_call(first: Weight, device: str, is_nested: bool, dtype: torch.dtype) -> Call:
    """Three weights of odd sizes, of which the last two have a bias."""
    rows = [37, 12, 1]
    weights = [first] + [
        make_weight(n, 70, device=device, block_size=32, is_nested=is_nested, seed=n) for n in rows[1:]
    ]
    x = randn(3, 4, 70, seed=5, dtype=dtype, device=device)
    biases = [randn(n, seed=n, dtype=dtype, device=device) for n in rows[1:]]
    lists = group_lists(weights)
    form = (first.format["block_size"], first.format["quant_type"])

    def function(x: Tensor, *tensors: Tensor) -> Any:
        packed, absmax, *nested = (list(tensors[i : i + 3]) for i in range(0, len(tensors), 3))
        names = ("nested_absmax", "nested_quant_map", "nested_offset")
        return ops.linear_4bit_group(
            x,
            packed,
            absmax,
            rows,
            **first.format,
            bias=[None, *biases],
            **dict(zip(names, nested, strict=False)),
        )

    tensors = (x, *(tensor for tensors in lists for tensor in tensors))
    return Call(
        function,
        tensors,
        torch.ops.qlora.linear_4bit_group.default,
        (x, *lists, biases, [1, 2], rows, *form),
    )


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)
