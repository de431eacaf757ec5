"""Scales chosen by the error that they cause."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora import ops, reference
from qlora.calibration.codes import Rounder
from qlora.calibration.scales import Scales, block_error, free_scales

ROUNDER = Rounder("cpu")


def make_blocks() -> tuple[Tensor, Tensor]:
    """600 blocks of normal weights of several sizes, one of zeros, and importances over four decades."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(600, 64, generator=generator) * torch.rand(600, 1, generator=generator)
    blocks[3] = 0.0
    return blocks, 10 ** (4 * torch.rand(600, 64, generator=generator) - 2)


def test_free_scales_are_never_worse_than_absmax() -> None:
    blocks, importance = make_blocks()
    before, _ = block_error(ROUNDER, blocks, importance, blocks.abs().amax(dim=1))
    after, _ = block_error(ROUNDER, blocks, importance, free_scales(ROUNDER, blocks, importance))
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_a_block_of_scaled_codes_is_found_exactly() -> None:
    """w = s c has error 0 at s: least squares gives s back within a rounding of each of its two sums of 64 terms."""
    codes = torch.arange(64).remainder(16).repeat(4, 1)
    true = torch.tensor([0.5, 1.0, 3.0, 7.0])
    blocks = ROUNDER.book[codes] * true[:, None]
    found = free_scales(ROUNDER, blocks, torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert ((found - true).abs() <= 2 * 64 * 2.0**-24 * true).all()


def test_stored_scales_are_what_readers_compute() -> None:
    blocks, importance = make_blocks()
    scales = Scales(free_scales(ROUNDER, blocks, importance), double_quant=True)
    scales.take_best(ROUNDER, blocks, importance)
    assert scales.nested_absmax is not None and scales.offset is not None and scales.nested_map is not None
    stored = (scales.codes, scales.nested_absmax, scales.nested_map, scales.offset)
    assert torch.equal(scales.values(), ops.dequantize_absmax(*stored))
    assert torch.equal(scales.values(), reference.dequantize_absmax(*stored))


def test_the_best_stored_scale_is_never_worse_than_the_nearest() -> None:
    blocks, importance = make_blocks()
    scales = Scales(free_scales(ROUNDER, blocks, importance), double_quant=True)
    before, _ = block_error(ROUNDER, blocks, importance, scales.values())
    scales.take_best(ROUNDER, blocks, importance)
    after, _ = block_error(ROUNDER, blocks, importance, scales.values())
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_the_nearest_code_of_a_stored_scale_is_its_own() -> None:
    scales = Scales(torch.rand(600, generator=torch.Generator().manual_seed(0)) + 0.5, double_quant=True)
    index = torch.arange(600)
    again = scales.values(scales.nearest(scales.values(), index), index)
    # Codes of equal scales may differ; the scales may not.
    assert torch.equal(again, scales.values())


def test_plain_scales_are_kept_as_they_are() -> None:
    blocks, importance = make_blocks()
    free = free_scales(ROUNDER, blocks, importance)
    scales = Scales(free, double_quant=False)
    scales.take_best(ROUNDER, blocks, importance)
    assert torch.equal(scales.values(), free)
    assert scales.nested_absmax is None
