"""The linear kernels against each other: dense against naive, any chunk against one chunk."""

from __future__ import annotations

import ctypes

import c_library
import pytest
import torch
from linear_cases import check_products, quantized, randn, shifted, tolerance
from torch import Tensor

from assertions import assert_bitwise_equal, assert_within
from qlora import ops

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# In the order in which they are tried.
FUSED = ("skinny_sm90", "narrow_sm90", "wide_sm90", "skinny_grad_sm90", "wide_grad_sm90", "skinny_sm80")
# [n, k]: whole chunks, a rest, rows that no chunk fits evenly, straddling rows of odd length, one row, one column.
SHAPES = ((1024, 512), (768 + 64, 320), (300, 776), (37, 77), (1, 64), (70, 1))


@pytest.fixture
def skinny(kernel) -> None:
    """skinny_sm90 alone; a skip with the reason where the GPU has not what it needs."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("skinny_sm90 needs compute capability 9.0")
    kernel("skinny_sm90")


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 130])
@pytest.mark.parametrize("name", ["naive", "dense"])
def test_kernel_equals_float64_product_of_the_rounded_weight(
    kernel, name: str, m: int, dtype: torch.dtype, shape: tuple[int, int], is_nested: bool
) -> None:
    kernel(name, None if name == "naive" else 300_000)
    args, form, weight = quantized(*shape, dtype, is_nested)
    n, k = shape
    x, dy, bias = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate([(m, k), (m, n), (n,)]))
    check_products(args, form, weight, x, dy, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_written_whole_whatever_the_chunk(kernel, dtype: torch.dtype) -> None:
    args, form, weight = quantized(1088, 576, dtype, True)
    x, dy = (randn(33, size, dtype=dtype, seed=size) for size in (576, 1088))
    for chunk_bytes in (1, 700_000, 1_500_000, 1 << 30):
        kernel("dense", chunk_bytes)
        expected = x.double() @ weight.double().T
        assert_within(ops.linear_4bit(x, *args, **form), expected, tolerance(x, weight.T, expected))
        expected = dy.double() @ weight.double()
        assert_within(
            ops.linear_4bit_grad_input(dy, *args, **form), expected, tolerance(dy, weight, expected)
        )


# [n, k] for skinny_sm90: one row, a tile and a rest, a chunk or many of k, clusters of 1 to 8 blocks, two chunks a warp.
SKINNY_SHAPES = (
    (1, 256),
    (7, 512),
    (1000, 1024),
    (1024, 4096),
    (264, 5120),
    (2100, 8192),
    (40, 18944),
    (17, 32768),
    (152064, 256),
)


@pytest.mark.usefixtures("skinny")
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SKINNY_SHAPES)
@pytest.mark.parametrize("m", [1, 8, 9, 16])
def test_skinny_equals_float64_product_of_the_exact_weight(
    m: int, shape: tuple[int, int], dtype: torch.dtype, quant_type: str, is_nested: bool
) -> None:
    n, k = shape
    args, form, weight = quantized(*shape, torch.float32, is_nested, quant_type)
    x, bias = randn(m, k, dtype=dtype, seed=1), randn(n, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T
    # A code value is rounded to dtype, which is a relative error of a weight of at most eps / 2.
    rounding = torch.finfo(dtype).eps / 2 * (x.double().abs() @ weight.double().abs().T)
    y = ops.linear_4bit(x, *args, **form)
    assert_within(y, expected, tolerance(x, weight.T, expected) + 2 * rounding)
    with_bias = expected + bias.double()
    slack = torch.finfo(torch.float32).eps * bias.double().abs()
    limit = tolerance(x, weight.T, with_bias) + slack + 2 * rounding
    assert_within(ops.linear_4bit(x, *args, **form, bias=bias), with_bias, limit)
    assert_bitwise_equal(ops.linear_4bit(x, *args, **form), y)
    assert_bitwise_equal(ops.linear_4bit(x.flip(0), *args, **form), y.flip(0))


@pytest.mark.usefixtures("skinny")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 16])
def test_skinny_is_more_accurate_than_a_product_with_rounded_weights(
    kernel, m: int, dtype: torch.dtype
) -> None:
    args, form, weight = quantized(4096, 4096, torch.float32, True)
    x = randn(m, 4096, dtype=dtype, seed=3)
    expected = x.double() @ weight.double().T
    errors = []
    for name in ("skinny_sm90", "dense"):
        kernel(name)
        errors.append((ops.linear_4bit(x, *args, **form).double() - expected).norm())
    assert errors[0] < errors[1]


@pytest.mark.usefixtures("skinny")
def test_skinny_takes_any_address() -> None:
    args, form, _ = quantized(100, 1024, torch.bfloat16, True)
    x = randn(5, 1024, dtype=torch.bfloat16, seed=4)
    expected = ops.linear_4bit(x, *args, **form)

    packed, absmax, shape = args
    assert_bitwise_equal(ops.linear_4bit(shifted(x), packed, absmax, shape, **form), expected)
    assert_bitwise_equal(ops.linear_4bit(x, shifted(packed), absmax, shape, **form), expected)
    assert_bitwise_equal(ops.linear_4bit(x, packed, shifted(absmax), shape, **form), expected)


@pytest.mark.usefixtures("skinny")
def test_skinny_reads_what_the_kernel_before_it_wrote() -> None:
    """The kernel may be set up early, while the one before it still runs."""
    args, form, _ = quantized(4096, 4096, torch.bfloat16, True)
    packed, absmax, shape = args
    x = randn(1, 4096, dtype=torch.bfloat16, seed=5)
    expected = ops.linear_4bit(x, *args, **form)
    target, source = torch.zeros_like(packed), torch.zeros_like(x)
    for _ in range(20):
        target.zero_(), source.zero_()
        ops.linear_4bit(source, target, absmax, shape, **form)
        target.copy_(packed), source.copy_(x)
        assert_bitwise_equal(ops.linear_4bit(source, target, absmax, shape, **form), expected)


def test_no_tf32_in_float32(kernel) -> None:
    args, form, weight = quantized(512, 1024, torch.float32, False)
    x = randn(64, 1024, dtype=torch.float32, seed=1)
    kernel("dense")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # set back after the test: see conftest.py
    y = ops.linear_4bit(x, *args, **form)
    expected = x.double() @ weight.double().T
    assert_within(y, expected, tolerance(x, weight.T, expected))


def test_repeated_calls_are_bitwise_equal(kernel) -> None:
    args, form, _ = quantized(1024, 512, torch.bfloat16, True)
    x = randn(130, 512, dtype=torch.bfloat16, seed=1)
    for name in ("naive", "dense"):
        kernel(name)
        assert_bitwise_equal(ops.linear_4bit(x, *args, **form), ops.linear_4bit(x, *args, **form))


def test_explain_names_the_kernel_and_the_reasons_of_those_before_it(kernel) -> None:
    torch.cuda.init()
    weight = c_library.describe_weight(4096, 1024)
    text = c_library.explain(weight, 3000, torch.bfloat16)
    assert text.startswith("linear_4bit m=3000 n=4096 k=1024 bfloat16 nf4 block 64 on device 0 (sm_")
    first, *reasons = text.splitlines()
    assert first.endswith(": dense")
    assert [reason.partition(":")[0] for reason in reasons] == [*FUSED]
    if torch.cuda.get_device_capability() == (9, 0):
        assert reasons == [
            "skinny_sm90: m: expected 1 to 16",
            "narrow_sm90: m: expected 1 to 64",
            "wide_sm90: yields to one further down",
            "skinny_grad_sm90: expected the input gradient",
            "wide_grad_sm90: expected the input gradient",
            "skinny_sm80: m: expected 1 to 32",
        ]
        assert c_library.explain(weight, 16, torch.bfloat16).endswith(": skinny_sm90")
        for m, name in ((17, "narrow_sm90"), (64, "narrow_sm90"), (65, "wide_sm90"), (2048, "wide_sm90")):
            assert c_library.explain(weight, m, torch.bfloat16).splitlines()[0].endswith(f": {name}")
        deep = c_library.describe_weight(4096, 14336)
        assert c_library.explain(deep, 8, torch.bfloat16).endswith(": skinny_sm90")
        first, reason = c_library.explain(deep, 16, torch.bfloat16).splitlines()
        assert first.endswith(": narrow_sm90")
        assert reason == "skinny_sm90: yields to one further down"
        large, square, small = (c_library.describe_weight(n, 4096) for n in (14336, 4096, 1024))
        for of_grad, m, name in (
            (large, 16, "skinny_grad_sm90"),
            (large, 17, "wide_grad_sm90"),
            (deep, 16, "skinny_grad_sm90"),
            (square, 8, "skinny_grad_sm90"),
            (square, 9, "wide_grad_sm90"),
            (small, 1, "wide_grad_sm90"),
        ):
            text = c_library.explain(of_grad, m, torch.bfloat16, is_grad=True)
            assert text.splitlines()[0].endswith(f": {name}")
        half = c_library.explain(large, 1, torch.float16, is_grad=True).splitlines()
        assert half[0].endswith(": wide_grad_sm90")
        assert half[-1] == "skinny_grad_sm90: expected bfloat16"
    kernel("naive")
    first, *reasons = c_library.explain(weight, 4, torch.bfloat16).splitlines()
    assert first.endswith(": naive")
    assert reasons == [f"{name}: QLORA_LINEAR_KERNEL asks for naive" for name in (*FUSED, "dense")]
    assert c_library.explain(weight, 4, torch.bfloat16, size=8) == "linear_"


def test_workspace_holds_a_chunk_and_cublas(kernel) -> None:
    torch.cuda.init()
    weight = c_library.describe_weight(4096, 1024)
    kernel("dense", 1 << 20)
    assert c_library.workspace_size(weight, 4, torch.bfloat16) == (32 << 20) + 512 * 1024 * 2
    assert c_library.workspace_size(weight, 4, torch.bfloat16, is_grad=True) == (32 << 20) + 256 * 4096 * 2
    with_bias = (32 << 20) + 512 * 1024 * 2 + 4 * 512 * 4  # the chunk's product in fp32
    assert c_library.workspace_size(weight, 4, torch.bfloat16, has_bias=True) == with_bias
    kernel("naive")
    assert c_library.workspace_size(weight, 4, torch.bfloat16) == 0


def test_unknown_kernel_is_an_error_with_the_names(kernel) -> None:
    kernel("fastest")
    args, form, _ = quantized(64, 64, torch.bfloat16, False)
    with pytest.raises(
        RuntimeError,
        match="QLORA_LINEAR_KERNEL: expected one of skinny_sm90, narrow_sm90, wide_sm90, skinny_grad_sm90, wide_grad_sm90, skinny_sm80, dense, naive, got fastest",
    ):
        ops.linear_4bit(randn(2, 64, dtype=torch.bfloat16, seed=0), *args, **form)


def linear(x: Tensor, weight: c_library.Weight4bit, y: Tensor, workspace: Tensor, size: int) -> int:
    """qlora_linear_4bit_cuda's status."""
    return c_library.library().qlora_linear_4bit_cuda(
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[0]), c_library.DTYPES[x.dtype]),
        *(ctypes.byref(weight), None, ctypes.c_void_p(y.data_ptr())),
        *(ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(size), 0, None),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_behind_the_workspace_or_the_output(kernel, dtype: torch.dtype) -> None:
    for n, k in (
        (7, 300),
        (300, 776),
        (600, 264),
    ):  # chunks that end within a block of the dequantising kernel
        args, _, _ = quantized(n, k, dtype, False)
        weight = c_library.describe_weight(n, k)
        weight.packed, weight.absmax = args[0].data_ptr(), args[1].data_ptr()
        kernel("dense", 1)
        size = c_library.workspace_size(weight, 3, dtype)
        workspace = torch.full((size + (1 << 20),), 0x5A, dtype=torch.uint8, device="cuda")
        y = torch.full((4, n), 77.0, dtype=dtype, device="cuda")
        x = randn(3, k, dtype=dtype, seed=0)
        torch.cuda.synchronize()
        assert linear(x, weight, y, workspace, size) == c_library.OK, c_library.last_error()
        torch.cuda.synchronize()
        assert (workspace[size:] == 0x5A).all()
        assert (y[3] == 77.0).all()


def test_small_workspace_is_an_error_with_the_sizes(kernel) -> None:
    kernel("dense")
    args, _, _ = quantized(64, 64, torch.bfloat16, False)
    x, y = (torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = c_library.describe_weight(64, 64)
    weight.packed, weight.absmax = args[0].data_ptr(), args[1].data_ptr()
    assert linear(x, weight, y, y, 16) == c_library.INVALID_ARGUMENT
    needed = c_library.workspace_size(weight, 2, torch.bfloat16)
    assert c_library.last_error() == f"linear_4bit: workspace_size: expected at least {needed}, got 16"
