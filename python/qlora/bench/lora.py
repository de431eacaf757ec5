"""`qlora bench lora`: a linear layer with a LoRA adapter, forward and backward, beside its base layer and the peers.

bf16 over double-quantised NF4 with block 64, float32 adapters of rank 16, without a bias. A call is a forward pass and
a backward pass with the gradients of input, A and B; times in µs, in CUDA graphs over weights that rotate past the L2
cache:

    qlora              the operators lora_linear_4bit and lora_linear_4bit_backward
    qlora_base         linear_4bit and linear_4bit_grad_input: no adapter
    cublas_base        the bf16 linear layer and its input gradient
    qlora_composed     the same as qlora by the base operators, with casts and products of torch for the adapter
    sequence           dequantise the weight, products of torch, likewise in the backward pass, as Unsloth does; with
                       our dequantise
    bnb_sequence       the same with bitsandbytes' dequantise
    peft_bitsandbytes  PEFT's LoRA layer over bitsandbytes' Linear4bit, with autograd

`over_base` is qlora over qlora_base, `x_<peer>` a peer's time over ours; memory is what an eager call takes of the
device at its peak beyond its operands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora import ops
from qlora.bench.kernels import BITS_PER_WEIGHT, SHAPES, Limits, Weight, bitsandbytes, bitsandbytes_state
from qlora.bench.timing import num_rotations, time_graph

ROWS = (512, 1024, 2048, 4096, 8192)
RANK = 16
SCALING = 2.0

Call = Callable[[Tensor, Tensor], Any]
"""Of x and dy: a forward and a backward pass."""


def bench_lora(limits: Limits, num_rows: Sequence[int] = ROWS) -> list[dict[str, Any]]:
    """A row of times and one of memory for each of the three large shapes and each number of rows.

    Limit: the larger of bytes over bandwidth (the weight twice; x, y, dy, dx and x again once each) and 4 m n k over
    the FLOP rate.
    """
    figures = []
    for shape in SHAPES[:3]:
        n, k = shape
        weights = [
            Weight.random(shape) for _ in range(num_rotations(n * k * BITS_PER_WEIGHT / 8, largest=16))
        ]
        adapter = Adapter.random(shape)
        dense = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_rotations(2 * n * k))
        ]
        stacks: dict[str, list[Call]] = {
            "qlora": [partial(_operators, weight, adapter) for weight in weights],
            "qlora_base": [partial(_base, weight) for weight in weights],
            "cublas_base": [partial(_dense_base, weight) for weight in dense],
            "qlora_composed": [partial(_composed, weight, adapter) for weight in weights],
            "sequence": [partial(_sequence, partial(_dequantize, weight), adapter) for weight in weights],
            **_bitsandbytes_sequences(weights, adapter),
            **_peft_calls(shape, len(weights)),
        }
        for m in num_rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            num_bytes = 2 * n * k * BITS_PER_WEIGHT / 8 + 2 * m * (2 * n + 3 * k)
            limit = max(num_bytes / limits.bandwidth, 4 * m * n * k / limits.flops) * 1e6
            case = {"shape": shape, "m": m}
            row: dict[str, Any] = {"kind": "time", **case, "limit_us": limit}
            for name, calls in stacks.items():
                row[f"{name}_us"] = time_graph([partial(call, x, dy) for call in calls])
            row["over_base"] = row["qlora_us"] / row["qlora_base_us"]
            for name in stacks:
                if not name.startswith("qlora"):
                    row[f"x_{name}"] = row[f"{name}_us"] / row["qlora_us"]
            memory = {name: _peak_mebibytes(partial(calls[0], x, dy)) for name, calls in stacks.items()}
            figures += [row, {"kind": "memory in MiB", **case, **memory}]
    return figures


class Adapter:
    """Float32 A [rank, k] and B [n, rank]."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    @classmethod
    def random(cls, shape: tuple[int, int]) -> Adapter:
        n, k = shape
        return cls(torch.randn(RANK, k, device="cuda") / k**0.5, torch.randn(n, RANK, device="cuda"))


def _operators(weight: Weight, adapter: Adapter, x: Tensor, dy: Tensor) -> Any:
    arguments = (weight.packed, weight.absmax, weight.shape, adapter.a, adapter.b, SCALING)
    y, left = ops.lora_linear_4bit(x, *arguments, **weight.options)
    return y, ops.lora_linear_4bit_backward(dy, x, left, *arguments, **weight.options)


def _base(weight: Weight, x: Tensor, dy: Tensor) -> Any:
    arguments = (weight.packed, weight.absmax, weight.shape)
    y = ops.linear_4bit(x, *arguments, **weight.options)
    return y, ops.linear_4bit_grad_input(dy, *arguments, **weight.options)


def _dense_base(weight: Tensor, x: Tensor, dy: Tensor) -> Any:
    return torch.nn.functional.linear(x, weight), dy @ weight


def _composed(weight: Weight, adapter: Adapter, x: Tensor, dy: Tensor) -> Any:
    arguments = (weight.packed, weight.absmax, weight.shape)
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
    low = x @ a.t()
    y = ops.linear_4bit(x, *arguments, **weight.options).addmm_(low, b.t(), alpha=SCALING)
    dlow = torch.addmm(low, dy, b, beta=0, alpha=SCALING)
    dx = ops.linear_4bit_grad_input(dy, *arguments, **weight.options).addmm_(dlow, a)
    da = dlow.t() @ x
    db = torch.addmm(b, dy.t(), low, beta=0, alpha=SCALING)
    return y, dx, da.float(), db.float()


def _sequence(dequantize: Callable[[], Tensor], adapter: Adapter, x: Tensor, dy: Tensor) -> Any:
    """As `_composed`, with a dense copy of the weight in each pass; x A^T is computed again for dB."""
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
    y = torch.nn.functional.linear(x, dequantize()).addmm_(x @ a.t(), b.t(), alpha=SCALING)
    da = torch.addmm(a, (dy @ b).t(), x, beta=0, alpha=SCALING)
    db = torch.addmm(b, dy.t(), x @ a.t(), beta=0, alpha=SCALING)
    dx = (dy @ dequantize()).addmm_(dy @ b, a, alpha=SCALING)
    return y, dx, da.float(), db.float()


def _dequantize(weight: Weight) -> Tensor:
    return ops.dequantize_4bit(
        weight.packed, weight.absmax, weight.shape, dtype=torch.bfloat16, **weight.options
    )


def _bitsandbytes_sequences(weights: list[Weight], adapter: Adapter) -> dict[str, list[Call]]:
    bnb = bitsandbytes()
    if bnb is None:
        return {}
    dequantizes = [
        partial(bnb.functional.dequantize_4bit, weight.packed, bitsandbytes_state(bnb, weight))
        for weight in weights
    ]
    return {"bnb_sequence": [partial(_sequence, dequantize, adapter) for dequantize in dequantizes]}


def _peft_calls(shape: tuple[int, int], count: int) -> dict[str, list[Call]]:
    bnb = bitsandbytes()
    if bnb is None:
        return {}
    n, k = shape
    layers: list[Any] = []
    try:
        from peft import LoraConfig, get_peft_model

        for _ in range(count):
            base = bnb.nn.Linear4bit(
                k, n, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.bfloat16
            )
            model = torch.nn.Sequential(base.to(torch.bfloat16)).cuda()
            config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"])
            wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
            layers.append(wrapped.base_model.model[0])
    except ImportError:
        return {}
    except Exception as error:  # noqa: BLE001  a peer: whatever it raises, the others are measured
        print(f"qlora bench lora: PEFT over bitsandbytes left out: {error!r}", file=sys.stderr)
        return {}
    return {"peft_bitsandbytes": [partial(_train, layer) for layer in layers]}


def _train(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> Any:
    """A forward and a backward pass with autograd."""
    x = x.detach().requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return torch.autograd.grad(layer(x), [x, *parameters], dy)


def _peak_mebibytes(call: Callable[[], Any]) -> float:
    """Device memory at the peak of a call, its results among it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
