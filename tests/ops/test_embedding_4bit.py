"""embedding_4bit is bit-equal to rows of the dequantised weight."""

from __future__ import annotations

import pytest
import torch

from assertions import assert_bitwise_equal
from op_cases import DTYPES, QUANT_TYPES, SHAPES, make_weight
from qlora import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_reference(
    shape: tuple[int, int], quant_type: str, is_nested: bool, dtype: torch.dtype, device: str
) -> None:
    weight = make_weight(*shape, device=device, quant_type=quant_type, is_nested=is_nested)
    rows = shape[0]
    indices = torch.tensor([[0, rows - 1, rows // 2], [rows // 3, 0, 0]], device=device)
    values = ops.embedding_4bit(indices, *weight.args, **weight.kwargs, dtype=dtype)
    assert_bitwise_equal(values, weight.dense[indices].to(dtype))


def test_indices_may_be_int32_and_of_any_shape(device: str) -> None:
    weight = make_weight(11, 64, device=device)
    for indices in (torch.tensor(3), torch.tensor([3]), torch.tensor([[[3, 4]]])):
        moved = indices.to(device)
        expected = weight.dense[moved]
        assert_bitwise_equal(
            ops.embedding_4bit(moved.int(), *weight.args, **weight.kwargs, dtype=torch.float32), expected
        )
        assert_bitwise_equal(
            ops.embedding_4bit(moved, *weight.args, **weight.kwargs, dtype=torch.float32), expected
        )


@pytest.mark.parametrize("index", [-1, 11, 2**40])
def test_an_index_outside_is_an_error_on_cpu(index: int) -> None:
    weight = make_weight(11, 64)
    with pytest.raises(RuntimeError, match=rf"qlora\.embedding_4bit: .*{index}"):
        ops.embedding_4bit(torch.tensor([0, index]), *weight.args, **weight.kwargs, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [-1, 11, 2**40])
def test_an_index_outside_gives_a_row_of_nan_on_cuda(index: int) -> None:
    weight = make_weight(11, 64, device="cuda")
    indices = torch.tensor([0, index], device="cuda")
    values = ops.embedding_4bit(indices, *weight.args, **weight.kwargs, dtype=torch.float32)
    assert_bitwise_equal(values[0], weight.dense[0])
    assert values[1].isnan().all()


def test_a_large_batch_is_split_over_threads(device: str) -> None:
    weight = make_weight(101, 96, device=device)
    indices = (torch.arange(5000) * 7 % 101).to(device)
    values = ops.embedding_4bit(indices, *weight.args, **weight.kwargs, dtype=torch.bfloat16)
    assert_bitwise_equal(values, weight.dense[indices].bfloat16())
