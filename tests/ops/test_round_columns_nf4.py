"""Columns of a weight rounded in turn: round_columns_nf4."""

from __future__ import annotations

import pytest
import torch

from assertions import assert_bitwise_equal
from op_cases import round_columns_case
from qlora import ops, reference


# Rows that end within a vector of the CPU and within a block of threads; one column, a part of a group and a whole one.
@pytest.mark.parametrize("rows", [1, 15, 16, 33, 128, 300])
@pytest.mark.parametrize("num_columns", [1, 5, 31, 32])
@pytest.mark.parametrize("has_previous", [True, False])
def test_bits_equal_the_reference(num_columns: int, rows: int, has_previous: bool, device: str) -> None:
    *tensors, previous = round_columns_case(num_columns, rows, seed=rows)
    arguments = (*tensors, previous if has_previous else None)
    on_device = (tensor if tensor is None else tensor.to(device) for tensor in arguments)
    for found, expected in zip(
        ops.round_columns_nf4(*on_device), reference.round_columns_nf4(*arguments), strict=True
    ):
        assert_bitwise_equal(found, expected)


def test_only_what_lies_above_the_diagonal_couples(device: str) -> None:
    values, scales, inverse, coupling, _ = round_columns_case(32, 40, device=device)
    upper = coupling.triu(1)
    other = torch.where(upper != 0, upper, torch.nan)
    for found, expected in zip(
        ops.round_columns_nf4(values, scales, inverse, other),
        ops.round_columns_nf4(values, scales, inverse, upper),
        strict=True,
    ):
        assert_bitwise_equal(found, expected)


def test_without_coupling_it_is_rounding_to_the_nearest_code(device: str) -> None:
    values, scales, inverse, _, _ = round_columns_case(8, 70, device=device)
    rounded, change = ops.round_columns_nf4(values, scales, inverse, torch.zeros(8, 8, device=device))
    book = reference.code_values("nf4", device)
    nearest = (values[..., None] / scales[..., None] - book).abs().amin(dim=-1)
    # The product with the rounded inverse and the thresholds of the format err by a few units in the last place.
    assert (
        (rounded / scales - values / scales).abs() <= nearest + 4e-7 * (1 + (values / scales).abs())
    ).all()
    assert_bitwise_equal(change, values - rounded)


def test_a_scale_of_0_with_an_inverse_of_0_gives_0(device: str) -> None:
    values, scales, inverse, coupling, _ = round_columns_case(4, 20, device=device)
    scales[:, 3], inverse[:, 3] = 0.0, 0.0
    rounded, _ = ops.round_columns_nf4(values, scales, inverse, coupling)
    assert not rounded[:, 3].any() and rounded[:, 2].all()


def test_thresholds_belong_to_the_code_below(device: str) -> None:
    thresholds = reference.decision_thresholds("nf4", device)
    infinity = torch.tensor(torch.inf, device=device)
    values = torch.stack(
        [thresholds, torch.nextafter(thresholds, infinity), torch.nextafter(thresholds, -infinity)]
    )
    ones = torch.ones_like(values)
    rounded, _ = ops.round_columns_nf4(values, ones, ones, torch.zeros(3, 3, device=device))
    book = reference.code_values("nf4", device)
    assert_bitwise_equal(rounded, torch.stack([book[:-1], book[1:], book[:-1]]))


def test_empty_inputs_give_empty_outputs(device: str) -> None:
    for shape in ((0, 5), (3, 0)):
        empty = torch.empty(shape, device=device)
        square = torch.zeros(shape[0], shape[0], device=device)
        assert [tensor.shape for tensor in ops.round_columns_nf4(empty, empty, empty, square)] == [
            shape,
            shape,
        ]


@pytest.mark.parametrize(
    ("position", "tensor", "error", "message"),
    [
        (
            0,
            torch.zeros(4, 3, dtype=torch.float16),
            TypeError,
            "values: expected a tensor of torch.float32, got",
        ),
        (
            0,
            torch.zeros(33, 3),
            ValueError,
            r"values: expected \[num_columns, n\] of at most 32 columns, got \[33, 3\]",
        ),
        (
            0,
            torch.zeros(4),
            ValueError,
            r"values: expected \[num_columns, n\] of at most 32 columns, got \[4\]",
        ),
        (1, torch.zeros(4, 2), ValueError, r"scales: expected \[4, 3\], got \[4, 2\]"),
        (2, torch.zeros(3, 4), ValueError, r"inverse: expected \[4, 3\], got \[3, 4\]"),
        (3, torch.zeros(4, 3), ValueError, r"coupling: expected \[4, 4\], got \[4, 3\]"),
        (4, torch.zeros(1, 3), ValueError, r"previous: expected \[4, 3\], got \[1, 3\]"),
        (4, torch.zeros(4, 3, device="meta"), TypeError, "previous: expected a tensor on cpu, got"),
    ],
)
def test_wrong_arguments_are_named(
    position: int, tensor: torch.Tensor, error: type[Exception], message: str
) -> None:
    arguments = list(round_columns_case(4, 3))
    arguments[position] = tensor
    with pytest.raises(error, match=rf"qlora\.round_columns_nf4: {message}"):
        ops.round_columns_nf4(*arguments)


def test_a_direct_call_does_not_read_out_of_bounds() -> None:
    values, *rest = round_columns_case(4, 3)
    with pytest.raises(RuntimeError, match=r"qlora\.round_columns_nf4: scales: expected 12 values, got 9"):
        torch.ops.qlora.round_columns_nf4(values, rest[0][:3], *rest[1:])
    with pytest.raises(
        RuntimeError, match=r"qlora\.round_columns_nf4: values: .* at most 32 columns, got 2 dim"
    ):
        torch.ops.qlora.round_columns_nf4(torch.zeros(40, 3), *rest)
