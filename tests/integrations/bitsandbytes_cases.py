"""What the tests of accelerator mode share: layers of bitsandbytes, inputs, a tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_values(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def make_layer(
    dtype: torch.dtype,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    bias: bool = True,
    device: str = "cpu",
    quant_storage: torch.dtype = torch.uint8,
    n: int = 96,
    k: int = 128,
) -> nn.Module:
    """An unchanged bitsandbytes layer [n, k] in training mode, the same on every call."""
    torch.manual_seed(1)
    layer = bitsandbytes.nn.Linear4bit(
        k,
        n,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )
    return layer.to(dtype).to(device)


def sum_tolerance(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a product a @ b may be from another of the same operands, in float64.

    Each of the two adds k terms in float32, in its own order, and rounds once to dtype; so does the bias.
    """
    a, b = a.detach().cpu().double().abs(), b.detach().cpu().double().abs()
    terms = a.shape[-1] + 1
    magnitude = a @ b
    rounding = torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    return 2 * (terms * torch.finfo(torch.float32).eps + rounding) * magnitude + torch.finfo(dtype).tiny
