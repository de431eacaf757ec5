"""`qlora bench quantize|dequantize`: our operators beside the hardware's limit and bitsandbytes; what gemm.py shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qlora import ops
from qlora.bench.timing import num_rotations, time_events, time_graph

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
"""[out_features, in_features] of the linear layers of Llama-3-8B."""
BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Limits:
    """Rates that the limits are computed from: bytes/s of a copy, bf16 FLOP/s of a large matrix product."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Weight:
    """A double-quantised NF4 weight with block 64, as keyword arguments of the operators."""

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    options: dict[str, Any]

    @classmethod
    def random(cls, shape: tuple[int, int]) -> Weight:
        packed, absmax = ops.quantize_4bit(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
        codes, nested_absmax, nested_quant_map, nested_offset = ops.quantize_absmax(absmax)
        options = {
            "block_size": 64,
            "quant_type": "nf4",
            "nested_absmax": nested_absmax,
            "nested_quant_map": nested_quant_map,
            "nested_offset": nested_offset,
        }
        return cls(packed, codes, shape, options)


def bitsandbytes() -> Any | None:
    """The installed bitsandbytes, or None."""
    try:
        import bitsandbytes as module
    except ImportError:
        return None
    return module


def bench_quantize(limits: Limits) -> list[dict[str, Any]]:
    """bf16 -> NF4 codes and fp32 scales. Limit: 2 bytes read, 0.5 + 4/64 bytes written a value."""
    rows = []
    bnb = bitsandbytes()
    for shape in SHAPES:
        n = shape[0] * shape[1]
        num_bytes = n * (2 + 0.5 + 4 / 64)
        inputs = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_rotations(num_bytes))
        ]
        row = {"shape": shape, "limit_us": num_bytes / limits.bandwidth * 1e6}
        row["qlora_us"] = time_graph([partial(ops.quantize_4bit, x) for x in inputs])
        if bnb is not None:  # launches on the legacy default stream: not capturable
            quantize = partial(bnb.functional.quantize_4bit, quant_type="nf4")
            row["bitsandbytes_us"] = time_events([partial(quantize, x) for x in inputs])
        rows.append(row)
    return rows


def bench_dequantize(limits: Limits) -> list[dict[str, Any]]:
    """Double-quantised NF4 -> bf16. Limit: 4.127 bits read, 2 bytes written a value."""
    rows = []
    bnb = bitsandbytes()
    for shape in SHAPES:
        n = shape[0] * shape[1]
        num_bytes = n * (2 + BITS_PER_WEIGHT / 8)
        weights = [Weight.random(shape) for _ in range(num_rotations(num_bytes))]
        row = {"shape": shape, "limit_us": num_bytes / limits.bandwidth * 1e6}
        row["qlora_us"] = time_graph([_dequantize(weight) for weight in weights])
        if bnb is not None:
            states = [bitsandbytes_state(bnb, weight) for weight in weights]
            dequantize = bnb.functional.dequantize_4bit
            pairs = zip(weights, states, strict=True)
            row["bitsandbytes_us"] = time_graph(
                [partial(dequantize, weight.packed, state) for weight, state in pairs]
            )
        rows.append(row)
    return rows


def bitsandbytes_state(bnb: Any, weight: Weight) -> Any:
    """The same weight as bitsandbytes' QuantState; the tensors are shared."""
    quant_map = bnb.functional.get_4bit_type("nf4", device="cuda")
    nested = bnb.functional.QuantState(
        absmax=weight.options["nested_absmax"],
        blocksize=256,
        code=weight.options["nested_quant_map"],
        dtype=torch.float32,
    )
    return bnb.functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=quant_map,
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=weight.options["nested_offset"],
        state2=nested,
    )


def _dequantize(weight: Weight) -> Callable[[], torch.Tensor]:
    return lambda: ops.dequantize_4bit(
        weight.packed, weight.absmax, weight.shape, dtype=torch.bfloat16, **weight.options
    )
