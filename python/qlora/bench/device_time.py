"""Where the device time of a training step goes, by kind of kernel, and what of the step no kernel fills."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Kinds by the kernel's name; the first that matches counts.
KINDS = (
    ("triton", r"^triton_"),
    ("qlora", r"\bqlora::"),
    ("bitsandbytes", r"kDequantizeBlockwise|kQuantizeBlockwise|bitsandbytes|\bkgemm_4bit"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated"),
    ("products", r"gemm|gemv|nvjet|cutlass|xmma|wgmma|splitKreduce|cublas"),
    ("copies", r"memcpy|memset|copy_kernel|direct_copy|CatArray"),
    ("triton", r"liger|^_.*_kernel$"),
    ("optimizer", r"multi_tensor|adam"),
    ("elementwise", r"elementwise|reduce|softmax|index|gather|scatter|fill|native::"),
)


def kind_of(kernel: str) -> str:
    """The kind of KINDS that a kernel's name stands for, or "other"."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_step(step: Callable[[], Any], step_s: float, *, num_kernels: int = 30) -> dict[str, Any]:
    """Device time of one call of `step`, which takes `step_s` where nobody watches.

    Returns:
        device_ms: for each kind (milliseconds, launches), the longest first; busy_ms: time in which any kernel ran;
        idle_share: part of step_s in which none did, waiting for Python; kernels: the longest by name.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    spans = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiled.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return summarise(spans, step_s, num_kernels)


def summarise(spans: Iterable[tuple[str, float, float]], step_s: float, num_kernels: int) -> dict[str, Any]:
    """`profile_step`'s result for kernels as (name, start, end) in µs."""
    by_kind: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    busy = end_of_last = 0.0
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        for table, key in ((by_kind, kind_of(name)), (by_name, name[:100])):
            table[key][0] += (end - start) / 1e3
            table[key][1] += 1
        busy += max(0.0, end - max(start, end_of_last))
        end_of_last = max(end, end_of_last)
    return {
        "device_ms": _largest(by_kind, len(by_kind)),
        "busy_ms": round(busy / 1e3, 1),
        "idle_share": round(max(0.0, 1 - busy / 1e6 / step_s), 3),
        "kernels": _largest(by_name, num_kernels),
    }


def _largest(table: dict[str, list[float]], count: int) -> dict[str, tuple[float, int]]:
    ordered = sorted(table.items(), key=lambda item: -item[1][0])[:count]
    return {name: (round(ms, 2), int(launches)) for name, (ms, launches) in ordered}
