"""The fused kernels that deal work items to blocks, on their own: all but skinny_sm90."""

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

# The most rows of each.
MAX_ROWS = {
    "narrow_sm90": 64,
    "wide_sm90": 700,
    "skinny_grad_sm90": 16,
    "wide_grad_sm90": 700,
    "skinny_sm80": 32,
}
GRADIENTS = ("skinny_grad_sm90", "wide_grad_sm90")
# [n, k]: less than a tile and than a step; a step and a rest of 1, 2 and 3 blocks; tiles in pairs and not, of whole blocks
# too; many parts, also of rows that no vector divides; more items than multiprocessors, of several steps and a rest
# each.
SHAPES = (
    (1, 64),
    (7, 192),
    (130, 320),
    (1000, 1024),
    (264, 2176),
    (333, 4096),
    (520, 640),
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


def require(name: str) -> None:
    """A skip with the reason where the GPU has not what the kernel needs."""
    if name != "skinny_sm80" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wgmma kernels need compute capability 9.0")


@pytest.fixture(params=MAX_ROWS)
def fused(request: pytest.FixtureRequest, kernel: Callable[..., None]) -> str:
    """Leaves the kernel alone."""
    require(request.param)
    kernel(request.param)
    return str(request.param)


def require_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "skinny_grad_sm90" and dtype != torch.bfloat16:
        pytest.skip("skinny_grad_sm90 serves bfloat16")


def operands(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of x, or of dy; of `m` as many as the kernel takes."""
    return randn(min(m, MAX_ROWS[name]), n if name in GRADIENTS else k, dtype=dtype, seed=m)


def call(name: str, x: Tensor, args: tuple, form: dict) -> Tensor:
    return (ops.linear_4bit_grad_input if name in GRADIENTS else ops.linear_4bit)(x, *args, **form)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("fused", "m"),
    [
        (name, m)
        for name, most in MAX_ROWS.items()
        for m in sorted({1, 12, 17, 32, 64, 100, 129, 256, 257, 700, most})
        if m <= most
    ],
    indirect=["fused"],
)
def test_fused_equals_float64_product_of_the_exact_weight(
    fused: str, m: int, shape: tuple[int, int], quant: tuple[torch.dtype, str, bool, int]
) -> None:
    n, k = shape
    dtype, quant_type, is_nested, block_size = quant
    require_dtype(fused, dtype)
    args, form, weight = quantized(n, k, torch.float32, is_nested, quant_type, block_size)
    x = operands(fused, m, n, k, dtype)
    terms = weight if fused in GRADIENTS else weight.T
    expected = x.double() @ terms.double()
    # A code value, or a weight, is rounded to dtype: a relative error of at most eps / 2.
    rounding = torch.finfo(dtype).eps / 2 * (x.double().abs() @ terms.double().abs())
    y = call(fused, x, args, form)
    assert_within(y, expected, tolerance(x, terms, expected) + 2 * rounding)
    assert_bitwise_equal(call(fused, x, args, form), y)
    assert_bitwise_equal(call(fused, x.flip(0), args, form), y.flip(0))


@pytest.mark.parametrize(
    ("name", "m"),
    [
        ("narrow_sm90", 7),
        ("narrow_sm90", 40),
        ("wide_sm90", 20),
        ("wide_sm90", 200),
        ("wide_sm90", 300),
        ("skinny_sm80", 3),
        ("skinny_sm80", 20),
    ],
)
@pytest.mark.parametrize("shape", [(1000, 1024), (333, 4096), (5000, 4096), (16000, 256)])
def test_bias_is_added_before_the_result_is_rounded(
    kernel: Callable[..., None], name: str, m: int, shape: tuple[int, int]
) -> None:
    require(name)
    kernel(name)
    args, form, weight = quantized(*shape, torch.float32, True)
    x, bias = (randn(*size, dtype=torch.bfloat16, seed=m) for size in ((m, shape[1]), shape[:1]))
    expected = x.double() @ weight.double().T + bias.double()
    rounding = torch.finfo(torch.bfloat16).eps / 2 * (x.double().abs() @ weight.double().abs().T)
    slack = torch.finfo(torch.float32).eps * bias.double().abs()
    limit = tolerance(x, weight.T, expected) + slack + 2 * rounding
    assert_within(ops.linear_4bit(x, *args, **form, bias=bias), expected, limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [32, 256])
def test_fused_is_no_less_accurate_than_a_product_with_rounded_weights(
    fused: str, kernel, m: int, dtype: torch.dtype
) -> None:
    n, k = 4096, 4096
    require_dtype(fused, dtype)
    args, form, weight = quantized(n, k, torch.float32, True)
    x = operands(fused, m, n, k, dtype)
    expected = x.double() @ (weight if fused in GRADIENTS else weight.T).double()
    errors = []
    for name in (fused, "dense"):
        kernel(name)
        errors.append((call(fused, x, args, form).double() - expected).norm())
    assert errors[0] <= errors[1] * 1.01  # of the gradient, the same but for the order of its sums


@pytest.mark.parametrize("m", [3, 40, 256])
def test_fused_takes_any_address(fused: str, m: int) -> None:
    n, k = 200, 1088
    args, form, _ = quantized(n, k, torch.bfloat16, True)
    x = operands(fused, m, n, k, torch.bfloat16)
    expected = call(fused, x, args, form)
    packed, absmax, shape = args
    assert_bitwise_equal(call(fused, shifted(x), args, form), expected)
    assert_bitwise_equal(call(fused, x, (shifted(packed), absmax, shape), form), expected)
    assert_bitwise_equal(call(fused, x, (packed, shifted(absmax), shape), form), expected)
    nested = {
        name: shifted(value) if isinstance(value, torch.Tensor) else value for name, value in form.items()
    }
    assert_bitwise_equal(call(fused, x, args, nested), expected)


def test_fused_reads_what_the_kernel_before_it_wrote(fused: str) -> None:
    """The kernel may be set up early, while the one before it still runs."""
    n = k = 4096
    args, form, _ = quantized(n, k, torch.bfloat16, True)
    packed, absmax, shape = args
    x = operands(fused, 64, n, k, torch.bfloat16)
    expected = call(fused, x, args, form)
    target, source = torch.zeros_like(packed), torch.zeros_like(x)
    for _ in range(20):
        target.zero_(), source.zero_()
        call(fused, source, (target, absmax, shape), form)
        target.copy_(packed), source.copy_(x)
        assert_bitwise_equal(call(fused, source, (target, absmax, shape), form), expected)


def test_rows_behind_the_last_of_the_weight_do_not_matter(fused: str) -> None:
    """Scales of NaN behind the weight's, and bytes of any value, are not read into the result."""
    n, k = 70, 320
    (packed, absmax, shape), form, _ = quantized(n, k, torch.bfloat16, False)
    x = operands(fused, 20, n, k, torch.bfloat16)
    expected = call(fused, x, (packed, absmax, shape), form)
    longer = torch.cat([packed, torch.full_like(packed, 0xFF)])
    scales = torch.cat([absmax, torch.full_like(absmax, float("nan"))])[: absmax.numel()]
    assert_bitwise_equal(call(fused, x, (longer, scales, shape), form), expected)


@pytest.mark.parametrize(("name", "m"), [("narrow_sm90", 20), ("wide_sm90", 100)])
def test_workspace_is_what_the_parts_take(kernel, name: str, m: int) -> None:
    require(name)
    torch.cuda.init()
    kernel(name)
    size = c_library.workspace_size(c_library.describe_weight(1000, 4096), m, torch.bfloat16)
    assert size > 0
    rounded = -(-m // 16) * 16 * (-(-1000 // 16) * 16)  # whole products of 16 rows by 16 tokens
    assert size % (rounded * 4) == 0
    assert c_library.workspace_size(c_library.describe_weight(1 << 17, 4096), m, torch.bfloat16) == 0


@pytest.fixture
def skinny_grad(kernel) -> None:
    """skinny_grad_sm90 alone, which brings dy and scales to fp16 by powers of two."""
    require("skinny_grad_sm90")
    kernel("skinny_grad_sm90")


# [n, k]: a part of one segment, and of several.
@pytest.mark.parametrize("shape", [(1000, 1024), (34000, 1088)])
@pytest.mark.parametrize(
    ("of_dy", "of_scales"), [(1.0, 1e30), (1.0, 1e-30), (1e30, 1e-30), (1e-38, 1e30), (1e36, 1e-28)]
)
@pytest.mark.usefixtures("skinny_grad")
def test_gradient_of_values_of_any_size(shape: tuple[int, int], of_dy: float, of_scales: float) -> None:
    n, k = shape
    (packed, absmax, _), form, weight = quantized(n, k, torch.float32, False)
    # Blocks of columns and tokens of their own size; rows that grow by 10,000 from the first to the last.
    sizes = torch.tensor([1.0, 1e-7, 1e7, 1e3], device="cuda")
    factors = sizes[torch.arange(k // 64, device="cuda") % 4] * of_scales
    absmax = (absmax.view(n, k // 64) * factors).flatten()
    growth = torch.logspace(-2, 2, n, device="cuda")
    dy = (randn(7, n, dtype=torch.float32, seed=n) * growth * of_dy).clamp(-3e38, 3e38)
    dy[1] *= 1e-5
    dy[2], dy[3, : n // 2] = 0.0, 0.0
    dy = dy.bfloat16()
    exact = weight.double() * factors.double().repeat_interleave(64)
    expected = dy.double() @ exact
    info = torch.finfo(torch.bfloat16)
    magnitude = dy.double().abs() @ exact.abs()
    limit = info.eps * magnitude + info.eps / 2 * expected.abs() + info.smallest_normal
    y = ops.linear_4bit_grad_input(dy, packed, absmax, shape, **form)
    # In any order: a float32 sum that ends below the largest value may have passed it on its way.
    is_finite = magnitude < info.max / 2
    assert is_finite.any()
    assert y[is_finite].isfinite().all()
    assert_within(y[is_finite], expected[is_finite], limit[is_finite])
    assert (y[2] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 20000, 33999])
@pytest.mark.usefixtures("skinny_grad")
def test_values_that_are_not_finite_stay_in_their_rows_and_blocks(value: float, row: int) -> None:
    n, k = 34000, 1088
    (packed, absmax, shape), form, _ = quantized(n, k, torch.float32, False)
    dy = randn(5, n, dtype=torch.bfloat16, seed=1)
    expected = ops.linear_4bit_grad_input(dy, packed, absmax, shape, **form)
    spoilt = dy.clone()
    spoilt[3, row] = value
    y = ops.linear_4bit_grad_input(spoilt, packed, absmax, shape, **form)
    assert not y[3].isfinite().any()
    others = [0, 1, 2, 4]
    assert_bitwise_equal(y[others], expected[others])
    scales = absmax.clone().view(n, k // 64)
    scales[row, 2] = value
    y = ops.linear_4bit_grad_input(dy, packed, scales.flatten(), shape, **form)
    assert not y[:, 128:192].isfinite().any()
    assert_bitwise_equal(y[:, :128], expected[:, :128])
    assert_bitwise_equal(y[:, 192:], expected[:, 192:])
