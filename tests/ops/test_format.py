"""The format's constants: package, reference and C++ header agree; the 8-bit map is its formula."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from assertions import assert_bitwise_equal
from op_cases import QUANT_TYPES, randn
from qlora import format, ops, reference

HEADER = Path(__file__).parents[2] / "cpp" / "core" / "format.h"


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_code_values_of_package_and_kernels_equal_the_reference(quant_type: str, device: str) -> None:
    values = reference.code_values(quant_type)
    assert_bitwise_equal(torch.tensor(format.CODES[quant_type]), values)
    packed = torch.tensor([16 * (2 * i) + 2 * i + 1 for i in range(8)], dtype=torch.uint8, device=device)
    decoded = ops.dequantize_4bit(
        packed, torch.ones(1, device=device), (16,), block_size=64, quant_type=quant_type, dtype=torch.float32
    )
    assert_bitwise_equal(decoded, values)


def test_block_sizes_are_those_of_the_header() -> None:
    text = HEADER.read_text()
    limits = [int(re.search(rf"k{name}BlockSize = (\d+)", text)[1]) for name in ("Min", "Max", "Nested")]  # type: ignore[index]
    assert limits == [format.BLOCK_SIZES[0], format.BLOCK_SIZES[-1], format.NESTED_BLOCK_SIZE]
    assert all(
        2 * small == large for small, large in zip(format.BLOCK_SIZES, format.BLOCK_SIZES[1:], strict=False)
    )


def test_thresholds_lie_midway_between_codes_to_six_digits() -> None:
    for quant_type in QUANT_TYPES:
        values = reference.code_values(quant_type).double().sort().values
        middles = (values[1:] + values[:-1]) / 2
        assert (reference.decision_thresholds(quant_type).double() - middles).abs().max() < 1e-6


def test_the_8_bit_map_is_ascending_and_symmetric_but_for_1() -> None:
    values = torch.tensor(format.NESTED_QUANT_MAP)
    assert values.numel() == 256
    assert (values.diff() > 0).all()
    assert values[127] == 0.0
    assert values[255] == 1.0
    assert torch.equal(values[:127], -values[128:255].flip(0))


def test_the_8_bit_map_equals_the_reference_and_bitsandbytes(device: str) -> None:
    assert_bitwise_equal(format.nested_quant_map(device), reference.nested_quant_map())
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert_bitwise_equal(format.nested_quant_map(device), functional.create_dynamic_map())


def test_the_8_bit_map_is_one_tensor_per_device_and_no_inference_tensor(device: str) -> None:
    format._map_of_device.clear()
    with torch.inference_mode():
        first = format.nested_quant_map(device)
    assert not first.is_inference()
    assert format.nested_quant_map(torch.device(device)) is first


def test_sizes_round_up() -> None:
    for n in (0, 1, 2, 63, 64, 65, 4097):
        x = randn(n, seed=1)
        packed, absmax = reference.quantize_4bit(x)
        assert packed.numel() == format.num_packed_bytes(n)
        assert absmax.numel() == format.num_blocks(n, 64)
        assert reference.quantize_absmax(absmax)[1].numel() == format.num_nested_blocks(absmax.numel())
