"""Bytes, scales and values equal those that bitsandbytes made of the same inputs (tests/data/make_golden.py)."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from assertions import assert_bitwise_equal, assert_codes_agree, assert_scale_codes_agree
from qlora import ops, reference

DATA = Path(__file__).parents[1] / "data"
# A CUDA kernel's approximate reciprocal is within 1 ulp and its product rounds once: 2 ulp. FP4's thresholds in
# bitsandbytes' CPU backend are midpoints instead of the format's decimals, up to 3.4e-7 or 6 ulp away.
ULPS = {"cuda": {"nf4": 2.0, "fp4": 2.0}, "cpu": {"nf4": 2.0, "fp4": 8.0}}
# bitsandbytes' CPU backend finds the 8-bit code of a scale in a table over [-1, 1] of 65536 entries.
LOOKUP_STEP = 2.0 / 65536
GOLDENS = [source for source in ULPS if (DATA / f"bitsandbytes_golden_{source}.npz").is_file()]


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load_script()
CASES = list(itertools.product(script.QUANT_TYPES, script.BLOCK_SIZES, script.DTYPES))


@functools.cache
def golden(source: str) -> dict[str, np.ndarray]:
    with np.load(script.path_of(source)) as file:
        return dict(file)


def tensor(source: str, key: str) -> torch.Tensor:
    return torch.from_numpy(golden(source)[key])


def test_there_is_a_golden_of_the_cpu_backend() -> None:
    assert "cpu" in GOLDENS


@pytest.mark.parametrize("source", GOLDENS)
@pytest.mark.parametrize(("quant_type", "block_size", "dtype"), CASES)
def test_codes_scales_and_values_equal_the_golden(
    quant_type: str, block_size: int, dtype: str, source: str, device: str
) -> None:
    case = f"{quant_type}-{block_size}-{dtype}"
    x = script.input_of(tensor(source, "x"), script.DTYPES[dtype]).to(device)
    packed, absmax = ops.quantize_4bit(x, block_size, quant_type)
    expected = tensor(source, f"{case}-packed")
    assert_bitwise_equal(absmax, tensor(source, f"{case}-absmax"))
    differing = assert_codes_agree(
        *(packed, expected, x, absmax),
        block_size=block_size,
        quant_type=quant_type,
        ulps=ULPS[source][quant_type],
    )
    assert differing <= 2e-3 * x.numel()
    if source == "cuda":  # which writes code 8 of FP4, as we do
        assert int((packed.cpu().flatten() != expected).sum()) <= differing
    values = ops.dequantize_4bit(
        expected.to(device),
        absmax,
        x.shape,
        block_size=block_size,
        quant_type=quant_type,
        dtype=script.DTYPES[dtype],
    )
    assert script.digest_of(values) == str(golden(source)[f"{case}-digest"])


@pytest.mark.parametrize("source", GOLDENS)
def test_double_quantised_scales_equal_the_golden(source: str, device: str) -> None:
    absmax, offset = tensor(source, "absmax"), tensor(source, "nested-offset")
    quant_map = reference.nested_quant_map()
    assert_bitwise_equal(quant_map, tensor(source, "nested-map"))
    codes, nested_absmax = torch.ops.qlora.quantize_absmax(
        absmax.to(device), offset.to(device), quant_map.to(device)
    )
    expected = tensor(source, "nested-codes")
    assert_bitwise_equal(nested_absmax, tensor(source, "nested-absmax"))
    nested = (nested_absmax, quant_map, offset)
    assert_scale_codes_agree(codes, expected, absmax, nested, slack=LOOKUP_STEP if source == "cpu" else None)
    decoded = ops.dequantize_absmax(
        expected.to(device), nested_absmax, quant_map.to(device), offset.to(device)
    )
    assert_bitwise_equal(decoded, tensor(source, "nested-decoded"))
