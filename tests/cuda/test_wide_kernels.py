"""wide_sm90 and wide_grad_sm90, the fused kernels of up to 256 rows, on their own."""

from __future__ import annotations

from collections.abc import Callable

import c_library
import pytest
import torch
from linear_cases import quantized, randn, shifted, tolerance
from torch import Tensor

from assertions import assert_bitwise_equal, assert_within
from qlora import ops

pytestmark = pytest.mark.gpu

NAMES = ("wide_sm90", "wide_grad_sm90")
# [n, k]: less than a tile and than a step; a step and a rest of 1, 2 and 3 blocks; tiles in pairs and not; many parts,
# also of rows that no vector divides; more items than multiprocessors, of several steps and a rest each.
SHAPES = (
    (1, 64),
    (7, 192),
    (130, 320),
    (1000, 1024),
    (264, 2176),
    (333, 4096),
    (40, 18944),
    (34000, 1088),
    (1088, 34048),
)

# The dtype of x, quant_type, whether scales are double-quantised, block_size.
QUANTS = (
    (torch.bfloat16, "nf4", True, 64),
    (torch.float16, "fp4", False, 64),
    (torch.float16, "nf4", True, 4096),
    (torch.bfloat16, "fp4", False, 256),
)


@pytest.fixture(params=NAMES)
def wide(request: pytest.FixtureRequest, kernel: Callable[..., None]) -> str:
    """Leaves the kernel alone; a skip with the reason where the GPU has not what it needs."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wide kernels need compute capability 9.0")
    kernel(request.param)
    return str(request.param)


def operands(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return randn(m, k if name == "wide_sm90" else n, dtype=dtype, seed=m)


def call(name: str, x: Tensor, args: tuple, form: dict) -> Tensor:
    return (ops.linear_4bit if name == "wide_sm90" else ops.linear_4bit_grad_input)(x, *args, **form)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 17, 64, 100, 129, 256])
def test_wide_equals_float64_product_of_the_exact_weight(
    wide: str, m: int, shape: tuple[int, int], quant: tuple[torch.dtype, str, bool, int]
) -> None:
    n, k = shape
    dtype, quant_type, is_nested, block_size = quant
    args, form, weight = quantized(n, k, torch.float32, is_nested, quant_type, block_size)
    x = operands(wide, m, n, k, dtype)
    terms = weight.T if wide == "wide_sm90" else weight
    expected = x.double() @ terms.double()
    # A code value, or a weight, is rounded to dtype: a relative error of at most eps / 2.
    rounding = torch.finfo(dtype).eps / 2 * (x.double().abs() @ terms.double().abs())
    y = call(wide, x, args, form)
    assert_within(y, expected, tolerance(x, terms, expected) + 2 * rounding)
    assert_bitwise_equal(call(wide, x, args, form), y)
    assert_bitwise_equal(call(wide, x.flip(0), args, form), y.flip(0))


@pytest.mark.parametrize("m", [20, 200])
@pytest.mark.parametrize("shape", [(1000, 1024), (333, 4096), (5000, 4096), (16000, 256)])
def test_bias_is_added_before_the_result_is_rounded(kernel, m: int, shape: tuple[int, int]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wide kernels need compute capability 9.0")
    kernel("wide_sm90")
    args, form, weight = quantized(*shape, torch.float32, True)
    x, bias = (randn(*size, dtype=torch.bfloat16, seed=m) for size in ((m, shape[1]), shape[:1]))
    expected = x.double() @ weight.double().T + bias.double()
    rounding = torch.finfo(torch.bfloat16).eps / 2 * (x.double().abs() @ weight.double().abs().T)
    slack = torch.finfo(torch.float32).eps * bias.double().abs()
    limit = tolerance(x, weight.T, expected) + slack + 2 * rounding
    assert_within(ops.linear_4bit(x, *args, **form, bias=bias), expected, limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [32, 256])
def test_wide_is_no_less_accurate_than_a_product_with_rounded_weights(
    wide: str, kernel, m: int, dtype: torch.dtype
) -> None:
    n, k = 4096, 4096
    args, form, weight = quantized(n, k, torch.float32, True)
    x = operands(wide, m, n, k, dtype)
    expected = x.double() @ (weight.T if wide == "wide_sm90" else weight).double()
    errors = []
    for name in (wide, "dense"):
        kernel(name)
        errors.append((call(wide, x, args, form).double() - expected).norm())
    assert errors[0] <= errors[1] * 1.01  # of the gradient, the same but for the order of its sums


@pytest.mark.parametrize("m", [3, 40, 256])
def test_wide_takes_any_address(wide: str, m: int) -> None:
    n, k = 200, 1088
    args, form, _ = quantized(n, k, torch.bfloat16, True)
    x = operands(wide, m, n, k, torch.bfloat16)
    expected = call(wide, x, args, form)
    packed, absmax, shape = args
    assert_bitwise_equal(call(wide, shifted(x), args, form), expected)
    assert_bitwise_equal(call(wide, x, (shifted(packed), absmax, shape), form), expected)
    assert_bitwise_equal(call(wide, x, (packed, shifted(absmax), shape), form), expected)


def test_wide_reads_what_the_kernel_before_it_wrote(wide: str) -> None:
    """The kernel may be set up early, while the one before it still runs."""
    n = k = 4096
    args, form, _ = quantized(n, k, torch.bfloat16, True)
    packed, absmax, shape = args
    x = operands(wide, 64, n, k, torch.bfloat16)
    expected = call(wide, x, args, form)
    target, source = torch.zeros_like(packed), torch.zeros_like(x)
    for _ in range(20):
        target.zero_(), source.zero_()
        call(wide, source, (target, absmax, shape), form)
        target.copy_(packed), source.copy_(x)
        assert_bitwise_equal(call(wide, source, (target, absmax, shape), form), expected)


def test_rows_behind_the_last_of_the_weight_do_not_matter(wide: str) -> None:
    """Scales of NaN behind the weight's, and bytes of any value, are not read into the result."""
    n, k = 70, 320
    (packed, absmax, shape), form, _ = quantized(n, k, torch.bfloat16, False)
    x = operands(wide, 20, n, k, torch.bfloat16)
    expected = call(wide, x, (packed, absmax, shape), form)
    longer = torch.cat([packed, torch.full_like(packed, 0xFF)])
    scales = torch.cat([absmax, torch.full_like(absmax, float("nan"))])[: absmax.numel()]
    assert_bitwise_equal(call(wide, x, (longer, scales, shape), form), expected)


def test_workspace_is_what_the_parts_take(kernel) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wide kernels need compute capability 9.0")
    torch.cuda.init()
    kernel("wide_sm90")
    size = c_library.workspace_size(c_library.describe_weight(1024, 4096), 100, torch.bfloat16)
    assert size > 0
    assert size % (100 * 1024 * 4) == 0
    assert c_library.workspace_size(c_library.describe_weight(1 << 17, 4096), 100, torch.bfloat16) == 0
