"""Each CUDA kernel has a vector form and a plain form, chosen by address and size: both give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assertions import assert_bitwise_equal, assert_codes_agree
from qlora import ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def randn(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shifted(x: Tensor, shift: int) -> Tensor:
    """x on the GPU, `shift` elements behind an aligned address."""
    buffer = torch.empty(x.numel() + shift, dtype=x.dtype, device="cuda")
    buffer[shift:].copy_(x.flatten())
    return buffer[shift:].view(x.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_unaligned_input_quantises_to_the_same_bits(
    block_size: int, dtype: torch.dtype, quant_type: str
) -> None:
    for n in (3 * 4096, 8 * 4096 + 17, 4096 + 2 * block_size + 1):  # whole tiles; tiles and a rest
        x = randn(n, dtype)
        packed, absmax = ops.quantize_4bit(shifted(x, 0), block_size, quant_type)
        for shift in (1, 3):
            packed_shifted, absmax_shifted = ops.quantize_4bit(shifted(x, shift), block_size, quant_type)
            assert_bitwise_equal(packed_shifted, packed)
            assert_bitwise_equal(absmax_shifted, absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_and_cpu_agree_on_a_tensor_of_many_tiles(dtype: torch.dtype, quant_type: str) -> None:
    x = randn(1_000_003, dtype)
    x[64 * 7 : 64 * 8] = 0.0
    x[64 * 9 + 5] = torch.nan
    x[64 * 11 + 6] = torch.inf
    x[64 * 13 + 7] = -torch.inf
    packed, absmax = ops.quantize_4bit(x, 64, quant_type)
    packed_cuda, absmax_cuda = ops.quantize_4bit(x.cuda(), 64, quant_type)
    assert_bitwise_equal(absmax_cuda, absmax)
    is_special = torch.zeros(x.numel() + 1, dtype=torch.bool)
    is_special[: 64 * 16] = True
    assert_bitwise_equal(packed_cuda.cpu()[is_special[0::2]], packed[is_special[0::2]])
    rest = slice(64 * 16, None)
    assert_codes_agree(
        *(packed_cuda[64 * 8 :], packed[64 * 8 :], x[rest], absmax[16:]), block_size=64, quant_type=quant_type
    )


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_and_address_dequantises_to_the_bits_of_the_cpu(
    dtype: torch.dtype, is_nested: bool
) -> None:
    for n in (1, 7, 8, 9, 255, 4096, 8 * 4096, 8 * 4096 + 13):
        packed, absmax = ops.quantize_4bit(randn(n, torch.float32), 64, "nf4")
        nested = {}
        if is_nested:
            absmax, *tensors = ops.quantize_absmax(absmax)
            nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True))
        form = {"block_size": 64, "quant_type": "nf4", "dtype": dtype}
        expected = ops.dequantize_4bit(packed, absmax, (n,), **form, **nested)
        on_gpu = {name: tensor.cuda() for name, tensor in nested.items()}
        for shift in (0, 1):
            y = ops.dequantize_4bit(shifted(packed, shift), absmax.cuda(), (n,), **form, **on_gpu)
            assert_bitwise_equal(y, expected)


@pytest.mark.parametrize("cols", [8, 264, 4096, 77])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_are_rows_of_the_dequantised_weight_and_bad_indices_are_nan(
    dtype: torch.dtype, cols: int
) -> None:
    packed, absmax = ops.quantize_4bit(randn(50 * cols, torch.float32).view(50, cols).cuda(), 32, "nf4")
    form = {"block_size": 32, "quant_type": "nf4", "dtype": dtype}
    weight = ops.dequantize_4bit(packed, absmax, (50, cols), **form)
    indices = torch.tensor([0, 49, 7, -1, 50, 7, 2**40], device="cuda")
    rows = ops.embedding_4bit(indices, packed, absmax, (50, cols), **form)
    is_bad = (indices < 0) | (indices >= 50)
    assert_bitwise_equal(rows[~is_bad], weight[indices[~is_bad]])
    assert rows[is_bad].isnan().all()
