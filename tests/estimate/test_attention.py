"""The attention of a CUDA device stands in for that of fake tensors: which kernel, and what shape and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qlora
from qlora.estimate import fake
from qlora.estimate.attention import cuda_attention_kernels
from qlora.estimate.workspace import MIB, workspace_bytes

BATCH, HEADS, LENGTH, WIDTH = 2, 8, 96, 32


class Called(TorchDispatchMode):
    """Operators by name, with what `workspace_bytes` says of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().removeprefix("aten::")] = workspace_bytes(func, args)
        return func(*args, **(kwargs or {}))


def operators(
    dtype: torch.dtype, key_heads: int, *, is_masked: bool, width: int = WIDTH
) -> tuple[dict[str, int], list[list[int]]]:
    """Operators of attention forward and backward, and the shapes of the result and the key's gradient."""
    called = Called()
    with FakeTensorMode(), cuda_attention_kernels():
        query, key, value = (
            torch.empty(BATCH, heads, LENGTH, width, dtype=dtype, requires_grad=True)
            for heads in (HEADS, key_heads, key_heads)
        )
        mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool) if is_masked else None
        with called:
            result = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=not is_masked, enable_gqa=key_heads != HEADS
            )
            result.sum().backward()
    assert key.grad is not None
    return called.names, [list(result.shape), list(key.grad.shape)]


@pytest.mark.parametrize(
    ("dtype", "key_heads", "is_masked", "kernel"),
    [
        (torch.bfloat16, HEADS, False, "_scaled_dot_product_flash_attention"),
        (torch.float16, 2, False, "_scaled_dot_product_flash_attention"),
        (torch.bfloat16, HEADS, True, "_scaled_dot_product_efficient_attention"),
        (torch.float32, HEADS, False, "_scaled_dot_product_efficient_attention"),
        (torch.float32, 2, False, "bmm"),  # torch has no kernel for it but plain products
    ],
)
def test_the_kernel_is_that_of_a_gpu(
    dtype: torch.dtype, key_heads: int, is_masked: bool, kernel: str
) -> None:
    names, shapes = operators(dtype, key_heads, is_masked=is_masked)
    assert kernel in names
    assert shapes == [[BATCH, HEADS, LENGTH, WIDTH], [BATCH, key_heads, LENGTH, WIDTH]]
    kernels = {name for name in names if name.startswith("_scaled_dot_product")}
    assert kernels == ({kernel, f"{kernel}_backward"} if kernel != "bmm" else set())


def test_flash_attention_pads_narrow_heads() -> None:
    names, shapes = operators(torch.bfloat16, HEADS, is_masked=False, width=28)
    assert "_scaled_dot_product_flash_attention" in names
    assert shapes == [[BATCH, HEADS, LENGTH, 28]] * 2


def test_the_backward_kernel_sums_the_gradient_of_the_query_in_float32() -> None:
    backward = "_scaled_dot_product_flash_attention_backward"
    equal, _ = operators(torch.bfloat16, HEADS, is_masked=False)
    grouped, _ = operators(torch.bfloat16, 2, is_masked=False)
    assert equal[backward] == BATCH * HEADS * 128 * WIDTH * 4  # the length in tiles of 128
    assert grouped[backward] - equal[backward] == 2 * BATCH * HEADS * LENGTH * WIDTH * 2


@pytest.mark.parametrize(
    ("rows", "shape", "chunk"),
    [
        (2048, (4096, 4096), 32 * MIB),  # the whole weight
        (2048, (14336, 4096), 112 * MIB),
        (8192, (14336, 4096), 16 * MIB),  # 2048 columns of the output
        (8192, (4096, 28672), 112 * MIB),
        (300, (128, 64), 128 * 64 * 2),
    ],
)
def test_the_product_needs_a_chunk_of_the_weight_beside_32_mib(
    rows: int, shape: tuple[int, int], chunk: int
) -> None:
    called = Called()
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    layer = qlora.quantize_(layer)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake.materialise(layer, mode)
    with mode:
        x = torch.empty(rows, shape[1], dtype=torch.bfloat16)
        with called:
            layer(x)
    assert called.names["qlora::linear_4bit"] == 32 * MIB + chunk


def test_a_layer_with_an_adapter_has_the_workspace_of_its_product_and_backward_of_one_matrix_more() -> None:
    n, k, rows, rank = 512, 1024, 2048, 8
    layer = qlora.quantize_(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake.materialise(layer, mode)
    called = Called()
    with mode:
        x = torch.empty(rows, k, dtype=torch.bfloat16, requires_grad=True)
        a, b = (torch.empty(shape, requires_grad=True) for shape in ((rank, k), (n, rank)))
        with called:
            layer.forward_with_lora(x, a, b, 1.0).sum().backward()
    product = 32 * MIB + n * k * 2
    assert called.names["qlora::lora_linear_4bit"] == product
    assert called.names["qlora::lora_linear_4bit_backward"] == product + rows * 64 * 2
