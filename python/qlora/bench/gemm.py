"""`qlora bench gemm`: the linear layer and its input gradient beside the limit, cuBLAS and whatever peers are installed.

Four kinds of figures, all in bf16 over double-quantised NF4 with block 64, times in µs:

    forward   y = x W^T in CUDA graphs over weights that rotate past the L2 cache
    gradient  dx = dy W, likewise
    group     several weights that share x in one call, beside single calls one after the other (`singly`) and cuBLAS on
              the weights stacked into one; in CUDA graphs as above
    eager     one synchronised call of the module from Python, without a gradient
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
from qlora.bench.timing import num_rotations, time_eager, time_graph

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
EAGER_ROWS = (1, 16)
GROUPS = {"q+k+v": ((4096, 1024, 1024), 4096), "gate+up": ((14336, 14336), 4096)}
"""Rows of the weights and k of the layers of Llama-3-8B that share their input."""
GROUP_ROWS = 16
"""Up to this many rows modules call groups."""
PEER_ROWS = 1024
"""Up to this many rows torch's int4 is measured: above, a call takes milliseconds."""

Calls = dict[str, list[Callable[[Tensor], Any]]]
"""For each stack one call a weight."""


def bench_gemm(limits: Limits, num_rows: Sequence[int] = ROWS) -> list[dict[str, Any]]:
    """A row of figures for each shape, number of rows and kind.

    Limit: the larger of bytes over bandwidth and 2 m n k over the FLOP rate. `x_cublas`, `x_bitsandbytes` and `x_singly`
    are their times over ours.
    """
    with torch.no_grad():
        figures = _bench_shapes(limits, num_rows)
        few_rows = [m for m in num_rows if m <= GROUP_ROWS]
        for name, (rows, k) in GROUPS.items() if few_rows else ():
            figures += _bench_group(limits, few_rows, name, rows, k)
    return figures


def _bench_shapes(limits: Limits, num_rows: Sequence[int]) -> list[dict[str, Any]]:
    figures = []
    for shape in SHAPES:
        n, k = shape
        count = num_rotations(n * k * BITS_PER_WEIGHT / 8, largest=64)
        weights = [Weight.random(shape) for _ in range(count)]
        dense = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_rotations(2 * n * k))
        ]
        forward: Calls = {
            "qlora": [partial(_linear, weight) for weight in weights],
            "cublas": [partial(_dense_linear, weight) for weight in dense],
            **_bitsandbytes_calls(weights),
            **_humming_calls(shape, count),
            **_torch_int4_calls(shape, count),
        }
        gradient: Calls = {
            "qlora": [partial(_grad_input, weight) for weight in weights],
            "cublas": [partial(_dense_grad_input, weight) for weight in dense],
            **_bitsandbytes_grad_calls(weights),
        }
        eager = _modules(shape)
        for m in num_rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            num_bytes = n * k * BITS_PER_WEIGHT / 8 + 2 * m * (n + k)
            limit = max(num_bytes / limits.bandwidth, 2 * m * n * k / limits.flops) * 1e6
            for kind, stacks, operand in (("forward", forward, x), ("gradient", gradient, dy)):
                row: dict[str, Any] = {"kind": kind, "shape": shape, "m": m, "limit_us": limit}
                for name, calls in stacks.items():
                    if name != "torch_int4" or m <= PEER_ROWS:
                        row[f"{name}_us"] = time_graph([partial(call, operand) for call in calls])
                figures.append(_with_ratios(row))
            if m in EAGER_ROWS:
                row = {"kind": "eager", "shape": shape, "m": m}
                for name, module in eager.items():
                    row[f"{name}_us"] = time_eager(partial(module, x))
                figures.append(_with_ratios(row))
    return figures


def _bench_group(
    limits: Limits, num_rows: Sequence[int], name: str, rows: tuple[int, ...], k: int
) -> list[dict[str, Any]]:
    n = sum(rows)
    num_bytes = n * k * BITS_PER_WEIGHT / 8
    groups = [[Weight.random((r, k)) for r in rows] for _ in range(num_rotations(num_bytes, largest=64))]
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(num_rotations(2 * n * k))]
    stacks: Calls = {
        "qlora": [partial(_linear_group, weights) for weights in groups],
        "singly": [partial(_linear_singly, weights) for weights in groups],
        "cublas": [partial(_dense_linear, weight) for weight in dense],
    }
    figures = []
    for m in num_rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        limit = max((num_bytes + 2 * m * (n + k)) / limits.bandwidth, 2 * m * n * k / limits.flops) * 1e6
        row: dict[str, Any] = {"kind": "group", "group": name, "m": m, "limit_us": limit}
        for stack, calls in stacks.items():
            row[f"{stack}_us"] = time_graph([partial(call, x) for call in calls])
        figures.append(_with_ratios(row))
    return figures


def _with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    for peer in ("singly", "cublas", "bitsandbytes"):
        if f"{peer}_us" in row:
            row[f"x_{peer}"] = row[f"{peer}_us"] / row["qlora_us"]
    return row


def _linear(weight: Weight, x: Tensor) -> Tensor:
    return ops.linear_4bit(x, weight.packed, weight.absmax, weight.shape, **weight.options)


def _linear_group(weights: list[Weight], x: Tensor) -> list[Tensor]:
    nested: dict[str, Any] = {
        name: [weight.options[name] for weight in weights]
        for name in ("nested_absmax", "nested_quant_map", "nested_offset")
    }
    return ops.linear_4bit_group(
        *(x, [weight.packed for weight in weights], [weight.absmax for weight in weights]),
        [weight.shape[0] for weight in weights],
        block_size=weights[0].options["block_size"],
        quant_type=weights[0].options["quant_type"],
        **nested,
    )


def _linear_singly(weights: list[Weight], x: Tensor) -> list[Tensor]:
    return [_linear(weight, x) for weight in weights]


def _grad_input(weight: Weight, dy: Tensor) -> Tensor:
    return ops.linear_4bit_grad_input(dy, weight.packed, weight.absmax, weight.shape, **weight.options)


def _dense_linear(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _dense_grad_input(weight: Tensor, dy: Tensor) -> Tensor:
    return dy @ weight


def _bitsandbytes_calls(weights: list[Weight]) -> Calls:
    """What bitsandbytes chooses, and its path of two kernels, which it takes from some rows on."""
    bnb = bitsandbytes()
    if bnb is None:
        return {}
    states = [bitsandbytes_state(bnb, weight) for weight in weights]

    def chosen(weight: Weight, state: Any, x: Tensor) -> Any:
        return bnb.matmul_4bit(x, weight.packed.t(), quant_state=state)

    def fallback(weight: Weight, state: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, bnb.functional.dequantize_4bit(weight.packed, state))

    pairs = list(zip(weights, states, strict=True))
    return {
        "bitsandbytes": [partial(chosen, *pair) for pair in pairs],
        "bnb_fallback": [partial(fallback, *pair) for pair in pairs],
    }


def _bitsandbytes_grad_calls(weights: list[Weight]) -> Calls:
    bnb = bitsandbytes()
    if bnb is None:
        return {}

    def call(weight: Weight, state: Any, dy: Tensor) -> Any:
        return dy @ bnb.functional.dequantize_4bit(weight.packed, state)

    return {"bitsandbytes": [partial(call, weight, bitsandbytes_state(bnb, weight)) for weight in weights]}


def _humming_calls(shape: tuple[int, int], count: int) -> Calls:
    """int4 in groups of 64 with bf16 scales. Compiles at the first call of each number of rows."""
    try:
        from humming.layer import HummingLayer  # type: ignore[import-not-found]

        layers = []
        for _ in range(count):
            layer = HummingLayer(
                shape_n=shape[0],
                shape_k=shape[1],
                weight_config={"dtype": "int4", "group_size": 64},
                torch_dtype=torch.bfloat16,
            ).cuda()
            layer.load_from_unquantized(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            layer.transform()
            layers.append(layer)
    except Exception as error:  # noqa: BLE001  a peer: whatever it raises, the others are measured
        if not isinstance(error, ImportError):
            print(f"qlora bench gemm: humming left out: {error!r}", file=sys.stderr)
        return {}
    return {"humming": layers}


def _torch_int4_calls(shape: tuple[int, int], count: int) -> Calls:
    """torch's int4 in groups of 64 with bf16 scales and zeros."""
    n, k = shape
    scales = torch.ones(k // 64, n, 2, device="cuda", dtype=torch.bfloat16)
    calls: list[Callable[[Tensor], Any]] = []
    try:
        for _ in range(count):
            values = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(values, 8)
            calls.append(partial(_torch_int4, packed, scales))
    except (RuntimeError, AttributeError) as error:
        print(f"qlora bench gemm: torch's int4 left out: {error!r}", file=sys.stderr)
        return {}
    return {"torch_int4": calls}


def _torch_int4(packed: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales)
    return result


def _modules(shape: tuple[int, int]) -> dict[str, torch.nn.Module]:
    """The linear layer of each stack, without a bias."""
    from qlora.nn import Linear4bit

    n, k = shape
    options: dict[str, Any] = {"bias": False, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
    modules: dict[str, torch.nn.Module] = {
        "qlora": Linear4bit(k, n, dtype=torch.bfloat16, **options).cuda(),
        "cublas": torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16),
    }
    bnb = bitsandbytes()
    if bnb is not None:
        modules["bitsandbytes"] = bnb.nn.Linear4bit(k, n, **options).to(torch.bfloat16).cuda()
    return modules
