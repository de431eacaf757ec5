"""Double quantisation of the scales: quantize_absmax and dequantize_absmax."""

from __future__ import annotations

import pytest
import torch

from assertions import assert_bitwise_equal, assert_scale_codes_agree, assert_within
from op_cases import randn
from qlora import ops, reference

SIZES = (1, 2, 255, 256, 257, 700, 4096)


@pytest.mark.parametrize("n", SIZES)
def test_codes_and_scales_equal_the_reference(n: int, device: str) -> None:
    absmax = randn(n, seed=n).abs() + 0.5
    codes, nested_absmax, quant_map, offset = ops.quantize_absmax(absmax.to(device))
    assert offset.dim() == 0
    assert_within(offset, absmax.double().mean(), absmax.mean() * 2.0**-22)
    expected = reference.quantize_absmax(absmax, offset.cpu())
    assert_bitwise_equal(nested_absmax, expected[1])
    assert_bitwise_equal(quant_map, expected[2])
    if device == "cpu":
        assert_bitwise_equal(codes, expected[0])
    assert_scale_codes_agree(codes, expected[0], absmax, (nested_absmax, quant_map, offset))


@pytest.mark.parametrize("n", SIZES)
def test_decoded_scales_equal_the_reference(n: int, device: str) -> None:
    stored = reference.quantize_absmax(randn(n, seed=n).abs() + 0.5)
    decoded = ops.dequantize_absmax(*(tensor.to(device) for tensor in stored))
    assert_bitwise_equal(decoded, reference.dequantize_absmax(*stored))


def test_every_code_decodes_to_its_entry_of_the_map(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    quant_map = reference.nested_quant_map()
    nested = (torch.tensor([0.37]), quant_map, torch.tensor(1.7))
    decoded = ops.dequantize_absmax(codes.to(device), *(tensor.to(device) for tensor in nested))
    assert_bitwise_equal(decoded, quant_map * 0.37 + 1.7)


def test_values_on_and_beside_each_midpoint_take_the_right_code(device: str) -> None:
    quant_map = reference.nested_quant_map()
    middles = (quant_map[:-1] + quant_map[1:]) / 2
    infinity = torch.tensor(torch.inf)
    for values in (middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)):
        absmax = torch.cat(
            [values, torch.ones(1)]
        )  # the group's scale is 1: scaling is exact on every device
        zero = torch.zeros(())
        codes, _ = torch.ops.qlora.quantize_absmax(absmax.to(device), zero.to(device), quant_map.to(device))
        assert_bitwise_equal(codes, reference.quantize_absmax(absmax, zero)[0])


def test_scales_survive_within_half_a_step_of_the_map(device: str) -> None:
    absmax = randn(1000, seed=1, device=device).abs() + 0.5
    stored = ops.quantize_absmax(absmax)
    half_step = stored[2].cpu().diff().max().item() / 2
    # -1 is no entry of the map: a group's lowest value may be off by the gap to -0.993.
    limit = max(half_step, 1.0 + stored[2][0].item()) + 4 * torch.finfo(torch.float32).eps
    scales = stored[1].repeat_interleave(256)[:1000]
    rounding = torch.finfo(torch.float32).eps * absmax
    assert_within(ops.dequantize_absmax(*stored), absmax, limit * scales + rounding)


@pytest.mark.parametrize("value", [0.0, 1.25])
def test_equal_scales_are_stored_exactly(value: float, device: str) -> None:
    absmax = torch.full((300,), value, device=device)
    codes, nested_absmax, quant_map, offset = ops.quantize_absmax(absmax)
    assert codes.eq(127).all()
    assert nested_absmax.eq(0).all()
    assert_bitwise_equal(ops.dequantize_absmax(codes, nested_absmax, quant_map, offset), absmax)


def test_a_non_finite_scale_spoils_every_scale(device: str) -> None:
    absmax = torch.ones(300, device=device)
    absmax[7] = torch.nan
    assert ops.dequantize_absmax(*ops.quantize_absmax(absmax)).isnan().all()
    absmax[7] = torch.inf
    assert not ops.dequantize_absmax(*ops.quantize_absmax(absmax)).isfinite().any()
