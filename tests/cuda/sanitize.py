"""Runs every CUDA kernel on odd shapes and addresses, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/cuda/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/cuda/sanitize.py

Without torch's caching allocator each tensor is an allocation of its own, whose ends the sanitizer watches. With names
of parts (see `parts`) as arguments those run alone: several processes side by side take half the time.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qlora import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")
SHAPES = ((1, 1), (1, 7), (3, 131), (37, 77), (9, 264), (33, 512), (5, 4104))


def shifted(x: Tensor) -> Tensor:
    """x one element behind an aligned address."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    buffer[1:].copy_(x.flatten())
    return buffer[1:].view(x.shape)


def drive_format(shape: tuple[int, int], dtype: torch.dtype, quant_type: str, block_size: int) -> None:
    """quantize_4bit, scales, dequantize_4bit and embedding_4bit; plain and nested; aligned and not."""
    rows = shape[0]
    form = {"block_size": block_size, "quant_type": quant_type}
    w = torch.randn(shape, device="cuda").to(dtype)
    ops.quantize_4bit(shifted(w), **form)
    packed, absmax = ops.quantize_4bit(w, **form)
    codes, *tensors = ops.quantize_absmax(absmax)
    ops.dequantize_absmax(codes, *tensors)
    nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True))
    indices = torch.tensor([0, rows - 1, rows, -1], device="cuda")
    for scales, extra in ((absmax, {}), (codes, nested)):
        for data in (packed, shifted(packed)):
            ops.dequantize_4bit(data, scales, shape, **form, **extra, dtype=dtype)
            ops.embedding_4bit(indices, data, scales, shape, **form, **extra, dtype=dtype)


def drive_linear(shape: tuple[int, int], dtype: torch.dtype, quant_type: str, kernel: str) -> None:
    """linear_4bit with and without bias, and its gradient, in several chunks."""
    os.environ["QLORA_LINEAR_KERNEL"] = kernel
    os.environ["QLORA_DENSE_CHUNK_BYTES"] = "1"
    n, k = shape
    form = {"block_size": 64, "quant_type": quant_type}
    packed, absmax = ops.quantize_4bit(torch.randn(shape, device="cuda"), **form)
    for m in (1, 5):
        x, dy = (torch.randn(m, size, device="cuda").to(dtype) for size in (k, n))
        ops.linear_4bit(x, packed, absmax, shape, **form)
        ops.linear_4bit(x, packed, absmax, shape, **form, bias=torch.ones(n, device="cuda", dtype=dtype))
        ops.linear_4bit_grad_input(dy, packed, absmax, shape, **form)


def drive_fused(
    kernel: str, tokens: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, quant_type: str
) -> None:
    """linear_4bit or its gradient; plain and nested; aligned and not."""
    os.environ["QLORA_LINEAR_KERNEL"] = kernel
    n, k = shape
    form = {"block_size": 64, "quant_type": quant_type}
    packed, absmax = ops.quantize_4bit(torch.randn(shape, device="cuda"), **form)
    codes, *tensors = ops.quantize_absmax(absmax)
    nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True))
    bias = torch.ones(n, device="cuda", dtype=dtype)
    for m, (scales, extra) in itertools.product(tokens, ((absmax, {}), (codes, nested))):
        if kernel in ("skinny_grad_sm90", "wide_grad_sm90"):
            dy = torch.randn(m, n, device="cuda").to(dtype)
            ops.linear_4bit_grad_input(dy, packed, scales, shape, **form, **extra)
            ops.linear_4bit_grad_input(shifted(dy), shifted(packed), scales, shape, **form, **extra)
        else:
            x = torch.randn(m, k, device="cuda").to(dtype)
            ops.linear_4bit(x, packed, scales, shape, **form, **extra, bias=bias)
            ops.linear_4bit(shifted(x), shifted(packed), scales, shape, **form, **extra)


def drive_lora(m: int, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """lora_linear_4bit and its backward; adapters of another dtype; plain and separate; aligned and not."""
    n, k = shape
    form = {"block_size": 64, "quant_type": "nf4"}
    packed, absmax = ops.quantize_4bit(torch.randn(shape, device="cuda"), **form)
    x, dy = (torch.randn(m, size, device="cuda").to(dtype) for size in (k, n))
    a, b = torch.randn(rank, k, device="cuda"), torch.randn(n, rank, device="cuda").to(dtype)
    for change, separate in ((lambda value: value, False), (shifted, True)):
        weight = (packed, absmax, shape, change(a), change(b), 0.5)
        other = change(x) if separate else None
        _, left = ops.lora_linear_4bit(change(x), *weight, **form, adapter_input=other)
        for needed in (
            (True, separate, True, True),
            (False, False, True, False),
            (False, False, False, True),
        ):
            ops.lora_linear_4bit_backward(
                change(dy), change(x), left, *weight, **form, is_separate=separate, needed=needed
            )


def drive_wide_loras() -> None:
    """The update as more depth of the wide kernels: in one of several parts, in clusters, of several blocks."""
    n, k, form = 264, 1088, {"block_size": 64, "quant_type": "nf4"}
    packed, absmax = ops.quantize_4bit(torch.randn(n, k, device="cuda"), **form)
    for m, rank in ((30, 200), (100, 16), (300, 100)):
        x, dy = (torch.randn(m, size, device="cuda", dtype=torch.bfloat16) for size in (k, n))
        a, b = torch.randn(rank, k, device="cuda"), torch.randn(n, rank, device="cuda")
        for change in (lambda value: value, shifted):
            weight = (packed, absmax, (n, k), change(a), change(b), 0.5)
            os.environ["QLORA_LINEAR_KERNEL"] = "wide_sm90"
            _, left = ops.lora_linear_4bit(change(x), *weight, **form)
            os.environ["QLORA_LINEAR_KERNEL"] = "wide_grad_sm90"
            ops.lora_linear_4bit_backward(
                change(dy), x, left, *weight, **form, is_separate=False, needed=(True, False, False, False)
            )
    torch.cuda.synchronize()


def drive_loras() -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        drive_wide_loras()
    os.environ["QLORA_LINEAR_KERNEL"] = "naive"
    cases = (
        (130, (264, 520), 16),
        (70, (40, 300), 33),
        (20, (133, 71), 7),
        (65, (300, 264), 256),
        (1, (1, 1), 1),
    )
    for dtype, (m, shape, rank) in itertools.product((torch.bfloat16, torch.float32), cases):
        drive_lora(m, shape, rank, dtype)
        torch.cuda.synchronize()


def drive_group(rows: tuple[int, ...], k: int, m: int, dtype: torch.dtype) -> None:
    """linear_4bit_group in one launch; plain and nested; aligned and not."""
    os.environ["QLORA_LINEAR_KERNEL"] = "skinny_sm90"
    form = {"block_size": 64, "quant_type": "nf4"}
    pairs = [ops.quantize_4bit(torch.randn(n, k, device="cuda"), **form) for n in rows]
    packed, absmax = ([pair[i] for pair in pairs] for i in (0, 1))
    codes, *tensors = (list(column) for column in zip(*map(ops.quantize_absmax, absmax), strict=True))
    nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True))
    bias = [None, *(torch.ones(n, device="cuda", dtype=dtype) for n in rows[1:])]
    x = torch.randn(m, k, device="cuda").to(dtype)
    for scales, extra in ((absmax, {}), (codes, nested)):
        ops.linear_4bit_group(x, packed, scales, rows, **form, **extra, bias=bias)
        ops.linear_4bit_group(
            shifted(x), [packed[0], *map(shifted, packed[1:])], scales, rows, **form, **extra
        )


def drive_groups() -> None:
    for rows, k in (((7, 16, 33), 256), ((264, 17), 5120), ((40, 5, 24), 16384)):
        for m in (1, 13):
            drive_group(rows, k, m, torch.bfloat16)
    torch.cuda.synchronize()


def drive_columns() -> None:
    """round_columns_nf4 of a part of a group and a whole one, with and without previous values; a partial block."""
    for num_columns, rows in itertools.product((1, 5, 32), (1, 33, 128, 300)):
        values, scales, inverse, previous = torch.randn(4, num_columns, rows, device="cuda").unbind()
        coupling = torch.randn(num_columns, num_columns, device="cuda")
        for before in (None, previous):
            ops.round_columns_nf4(values, scales, inverse, coupling, before)
    torch.cuda.synchronize()


def drive_formats() -> None:
    for shape, dtype, quant_type in itertools.product(SHAPES, DTYPES, QUANT_TYPES):
        for block_size in (32, 64, 256, 512, 4096):
            drive_format(shape, dtype, quant_type, block_size)
        torch.cuda.synchronize()


def drive_linears() -> None:
    for dtype, quant_type in itertools.product(DTYPES, QUANT_TYPES):
        for shape, kernel in itertools.product(((37, 77), (300, 264), (520, 512)), ("naive", "dense")):
            drive_linear(shape, dtype, quant_type, kernel)
        torch.cuda.synchronize()


def drive_fused_kernel(kernel: str) -> None:
    """With the shapes and numbers of tokens that FUSED names for it."""
    for (tokens, shapes), form in itertools.product(FUSED[kernel], zip(DTYPES[1:], QUANT_TYPES, strict=True)):
        if kernel == "skinny_grad_sm90" and form[0] != torch.bfloat16:
            continue
        for shape in shapes:
            drive_fused(kernel, tokens, shape, *form)
        torch.cuda.synchronize()


# The last of a wgmma kernel's: slightly more work items than the 132 multiprocessors of an H100.
FUSED: dict[str, tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...]] = {
    "skinny_sm80": (((3, 12, 30), ((1, 64), (264, 1088), (333, 4096), (5000, 320))),),
    "skinny_sm90": (((1, 8, 13), ((1, 256), (264, 4096), (40, 5120), (17, 16384))),),
    "narrow_sm90": (((3, 20, 50), ((1, 64), (264, 1088), (333, 1024))), ((20, 50), ((17100, 320),))),
    "wide_sm90": (((3, 100, 300), ((1, 64), (264, 1088), (333, 1024))), ((100, 200), ((17100, 320),))),
    "skinny_grad_sm90": (
        ((3, 12), ((1, 64), (264, 1088), (512, 640), (333, 1024))),
        # The last: parts of several segments, which fill the ring more than once.
        ((3, 12), ((320, 17152), (34900, 192))),
    ),
    "wide_grad_sm90": (
        ((3, 20, 50, 100, 200, 300), ((1, 64), (264, 1088), (512, 640), (333, 1024))),
        ((20, 100, 300), ((320, 17152),)),
    ),
}


def parts() -> dict[str, Callable[[], None]]:
    """What this GPU can run, by name."""
    capability = torch.cuda.get_device_capability()
    kernels = ["skinny_sm80"]
    kernels += ["skinny_sm90"] if capability >= (9, 0) else []
    kernels += (
        ["narrow_sm90", "wide_sm90", "skinny_grad_sm90", "wide_grad_sm90"] if capability == (9, 0) else []
    )
    groups = {"groups": drive_groups} if capability >= (9, 0) else {}
    return {
        "formats": drive_formats,
        "columns": drive_columns,
        "linears": drive_linears,
        "lora": drive_loras,
        **groups,
        **{kernel: partial(drive_fused_kernel, kernel) for kernel in kernels},
    }


def main() -> None:
    torch.manual_seed(0)
    known = parts()
    for name in sys.argv[1:] or known:
        known[name]()
        print(f"{name} ran")


if __name__ == "__main__":
    main()
