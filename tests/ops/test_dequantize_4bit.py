"""dequantize_4bit is bit-equal to the reference on every device."""

from __future__ import annotations

import pytest
import torch

from assertions import assert_bitwise_equal
from op_cases import BLOCK_SIZES, DTYPES, QUANT_TYPES, SHAPES, make_weight
from qlora import ops, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_equal_the_reference(
    quant_type: str, block_size: int, is_nested: bool, dtype: torch.dtype, device: str
) -> None:
    weight = make_weight(
        13, 1027, device=device, block_size=block_size, quant_type=quant_type, is_nested=is_nested
    )
    values = ops.dequantize_4bit(*weight.args, **weight.kwargs, dtype=dtype)
    assert_bitwise_equal(values, weight.dense.to(dtype))


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (7,), (2, 3, 5), (2, 1, 1, 9)])
def test_every_shape_equals_the_reference(shape: tuple[int, ...], device: str) -> None:
    for dtype in DTYPES:
        for is_nested in (False, True):
            weight = make_weight(*shape, device=device, is_nested=is_nested)
            values = ops.dequantize_4bit(*weight.args, **weight.kwargs, dtype=dtype)
            assert_bitwise_equal(values, weight.dense.to(dtype))


def test_more_than_one_group_of_double_quantised_scales(device: str) -> None:
    weight = make_weight(70, 300, device=device, block_size=32, is_nested=True)
    assert weight.nested["nested_absmax"].numel() == 3
    values = ops.dequantize_4bit(*weight.args, **weight.kwargs, dtype=torch.bfloat16)
    assert_bitwise_equal(values, weight.dense.bfloat16())


def test_bytes_beyond_the_weight_are_not_read(device: str) -> None:
    weight = make_weight(5, 13, device=device)
    longer = torch.cat([weight.packed, torch.full((9, 1), 0xFF, dtype=torch.uint8, device=device)])
    values = ops.dequantize_4bit(longer, weight.absmax, weight.shape, **weight.kwargs, dtype=torch.float32)
    assert_bitwise_equal(values, weight.dense)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 1e30, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales_round_as_the_reference(scale: float, dtype: torch.dtype, device: str) -> None:
    weight = make_weight(4, 64, device=device)
    absmax = torch.full_like(weight.absmax, scale)
    values = ops.dequantize_4bit(weight.packed, absmax, weight.shape, **weight.kwargs, dtype=dtype)
    expected = reference.dequantize_4bit(
        weight.packed.cpu(), absmax.cpu(), weight.shape, **weight.format, dtype=dtype
    )
    assert_bitwise_equal(values, expected)
