"""Rounding at a given scale."""

from __future__ import annotations

import pytest
import torch

from qlora import ops, reference
from qlora.calibration.codes import Rounder, pack
from qlora.format import NF4_THRESHOLDS


def test_thresholds_are_those_of_the_format() -> None:
    assert torch.equal(torch.tensor(NF4_THRESHOLDS), reference.decision_thresholds("nf4"))


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_codes_at_absmax_are_those_of_quantize_4bit(spread: float) -> None:
    blocks = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * spread
    blocks[7] = 0.0
    packed, absmax = ops.quantize_4bit(blocks, 64, "nf4")
    codes = Rounder("cpu").codes(blocks, absmax.reciprocal()[:, None])
    assert torch.equal(pack(codes), packed)


def test_values_on_a_threshold_take_the_lower_code() -> None:
    thresholds = torch.tensor(NF4_THRESHOLDS)
    assert Rounder("cpu").codes(thresholds, torch.ones(())).tolist() == list(range(15))


def test_codes_are_those_of_a_search_over_the_thresholds() -> None:
    """Also right beside every threshold and every border of the table, and where nothing sensible can be said."""
    inf = float("inf")
    near = torch.cat([torch.tensor(NF4_THRESHOLDS), torch.linspace(-1, 1, 65)])
    up, down = torch.nextafter(near, torch.tensor(inf)), torch.nextafter(near, torch.tensor(-inf))
    random = 3 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 1.5
    values = torch.cat([near, up, down, random, torch.tensor([inf, -inf, 1e30, -1e30])])
    expected = torch.bucketize(values, torch.tensor(NF4_THRESHOLDS))
    assert torch.equal(Rounder("cpu").codes(values, torch.ones(())).long(), expected)
    assert Rounder("cpu").codes(torch.zeros(1), torch.tensor([inf])).tolist() == [7]


def test_an_odd_count_ends_in_the_code_of_zero() -> None:
    assert pack(torch.tensor([[15, 0, 3]])).tolist() == [[0xF0], [0x37]]
