"""_qlora_ext on arrays of numpy and torch: same results as the reference, whoever lends the memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from assertions import assert_bitwise_equal, assert_within
from qlora import _qlora_ext as ext
from qlora import reference

ROWS, COLS, BLOCK_SIZE = 24, 160, 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def to_torch(array: Any) -> torch.Tensor:
    return torch.from_dlpack(array)


class Legacy:
    """An array of a library from before DLPack 1.0: no max_version."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.fixture
def weight() -> torch.Tensor:
    return values(ROWS, COLS)


@pytest.fixture
def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_4bit(weight, BLOCK_SIZE, "nf4")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_and_dequantize_equal_the_reference(dtype: torch.dtype, quant_type: str) -> None:
    x = values(3, 77, dtype=dtype)
    packed, absmax = map(to_torch, ext.quantize_4bit(x, BLOCK_SIZE, quant_type))
    expected_packed, expected_absmax = reference.quantize_4bit(x, BLOCK_SIZE, quant_type)
    assert_bitwise_equal(packed, expected_packed)
    assert_bitwise_equal(absmax, expected_absmax)
    y = ext.dequantize_4bit(packed, absmax, (3, 77), name_of(dtype), BLOCK_SIZE, quant_type)
    assert_bitwise_equal(
        to_torch(y),
        reference.dequantize_4bit(
            packed, absmax, (3, 77), block_size=BLOCK_SIZE, quant_type=quant_type, dtype=dtype
        ),
    )


def test_double_quantised_scales_equal_the_reference() -> None:
    weight = values(64, 320)
    packed, absmax = reference.quantize_4bit(weight, BLOCK_SIZE, "nf4")
    codes, nested_absmax, quant_map, offset = reference.quantize_absmax(absmax)
    assert_bitwise_equal(to_torch(ext.nested_code()), quant_map)
    own_codes, own_nested = map(to_torch, ext.quantize_absmax(absmax, offset, quant_map))
    assert_bitwise_equal(own_codes, codes)
    assert_bitwise_equal(own_nested, nested_absmax)
    scales = reference.dequantize_absmax(codes, nested_absmax, quant_map, offset)
    assert_bitwise_equal(to_torch(ext.dequantize_absmax(codes, nested_absmax, quant_map, offset)), scales)
    y = ext.dequantize_4bit(
        packed,
        codes,
        (64, 320),
        nested_absmax=nested_absmax,
        nested_quant_map=quant_map,
        nested_offset=offset,
    )
    assert_bitwise_equal(to_torch(y), reference.dequantize_4bit(packed, scales, (64, 320)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_and_its_gradient_equal_the_reference(
    quantised: tuple[torch.Tensor, torch.Tensor], with_bias: bool
) -> None:
    dequantised = reference.dequantize_4bit(*quantised, (ROWS, COLS), block_size=BLOCK_SIZE)
    x, grad, bias = values(2, 5, COLS, seed=1), values(2, 5, ROWS, seed=2), values(ROWS, seed=3)
    y = ext.linear_4bit(x, *quantised, (ROWS, COLS), bias=bias if with_bias else None)
    dx = ext.linear_4bit_grad_input(grad, *quantised, (ROWS, COLS))
    # fp32 sum of k terms: each addition rounds by at most half an ulp of the sum of magnitudes.
    eps = torch.finfo(torch.float32).eps
    expected = reference.linear_4bit(x, dequantised, bias if with_bias else None)
    magnitude = reference.linear_4bit(x.abs(), dequantised.abs(), bias.abs() if with_bias else None)
    assert_within(to_torch(y), expected, (COLS + 1) * eps * magnitude)
    magnitude = reference.linear_4bit_grad_input(grad.abs(), dequantised.abs())
    assert_within(to_torch(dx), reference.linear_4bit_grad_input(grad, dequantised), ROWS * eps * magnitude)


def test_embedding_equals_the_reference(quantised: tuple[torch.Tensor, torch.Tensor]) -> None:
    dequantised = reference.dequantize_4bit(*quantised, (ROWS, COLS), block_size=BLOCK_SIZE)
    indices = torch.tensor([[3, 0, ROWS - 1], [3, 7, 1]])
    y = to_torch(ext.embedding_4bit(indices, *quantised, (ROWS, COLS)))
    assert_bitwise_equal(y, reference.embedding_4bit(indices, dequantised))


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_every_number_of_threads_gives_the_same_bytes(num_threads: int) -> None:
    x = values(7, 1 << 16)
    packed, absmax = map(to_torch, ext.quantize_4bit(x, num_threads=num_threads))
    expected_packed, expected_absmax = map(to_torch, ext.quantize_4bit(x, num_threads=3))
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)
    one, many = (
        ext.dequantize_4bit(packed, absmax, (7, 1 << 16), num_threads=count) for count in (1, num_threads)
    )
    assert torch.equal(to_torch(one), to_torch(many))


def test_capsules_without_a_version_are_taken(weight: torch.Tensor) -> None:
    packed, absmax = ext.quantize_4bit(Legacy(weight.numpy()))
    expected_packed, expected_absmax = ext.quantize_4bit(weight.numpy())
    assert np.array_equal(np.from_dlpack(packed), np.from_dlpack(expected_packed))
    assert np.array_equal(np.from_dlpack(absmax), np.from_dlpack(expected_absmax))


def test_a_borrowed_array_is_given_back() -> None:
    x = np.ones(BLOCK_SIZE, dtype=np.float32)
    before = sys.getrefcount(x)
    ext.quantize_4bit(x)
    with pytest.raises(ValueError, match="block_size"):
        ext.quantize_4bit(x, 48)
    with pytest.raises(ValueError, match="shape"):
        ext.dequantize_4bit(x, x, (-1, 2))
    assert sys.getrefcount(x) == before


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 3)])
def test_an_output_exports_both_kinds_of_capsule(max_version: tuple[int, int] | None) -> None:
    packed, _ = ext.quantize_4bit(np.ones(BLOCK_SIZE, dtype=np.float32))
    capsule = packed.__dlpack__(max_version=max_version)
    is_versioned = max_version is not None and max_version[0] >= 1
    assert f'"{"dltensor_versioned" if is_versioned else "dltensor"}"' in repr(capsule)
    assert to_torch(capsule).tolist() == [[0xFF]] * (BLOCK_SIZE // 2)


def test_an_output_outlives_the_object_that_lent_it() -> None:
    packed, absmax = ext.quantize_4bit(np.full(BLOCK_SIZE, 3.0, dtype=np.float32))
    array, scales = np.from_dlpack(packed), np.from_dlpack(absmax)
    del packed, absmax
    assert array.shape == (BLOCK_SIZE // 2, 1)
    assert scales.tolist() == [3.0]


def test_a_copy_is_independent() -> None:
    _, absmax = ext.quantize_4bit(np.full(BLOCK_SIZE, 3.0, dtype=np.float32))
    copy = to_torch(absmax.__dlpack__(copy=True))
    copy.zero_()
    assert to_torch(absmax).tolist() == [3.0]


def test_an_output_says_what_it_is() -> None:
    y = ext.dequantize_4bit(np.zeros(32, np.uint8), np.ones(1, np.float32), (4, 16), "bfloat16")
    assert repr(y) == "HostArray(shape=[4, 16], dtype=bfloat16)"
    assert (y.shape, y.dtype, y.nbytes) == ((4, 16), "bfloat16", 128)
    assert y.__dlpack_device__() == (1, 0)


def test_out_is_written_and_returned(weight: torch.Tensor) -> None:
    out = (np.zeros((ROWS * COLS + 1) // 2, np.uint8), np.zeros(ROWS * COLS // BLOCK_SIZE, np.float32))
    packed, absmax = ext.quantize_4bit(weight, out=out)
    assert packed is out[0]
    assert absmax is out[1]
    assert_bitwise_equal(torch.from_numpy(absmax), reference.quantize_4bit(weight)[1])


def test_empty_arrays_are_quantised_to_nothing() -> None:
    packed, absmax = ext.quantize_4bit(np.zeros((0, 64), np.float32))
    assert (packed.shape, absmax.shape) == ((0, 1), (0,))
    y = ext.linear_4bit(
        np.zeros((0, 64), np.float32), *ext.quantize_4bit(np.ones((2, 64), np.float32)), (2, 64)
    )
    assert y.shape == (0, 2)


X = np.ones((2, 64), np.float32)
PACKED = np.zeros(64, np.uint8)
ABSMAX = np.ones(2, np.float32)
READ_ONLY = np.ones((2, 64), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ext.quantize_4bit([1.0]),
            TypeError,
            r"qlora.quantize_4bit: input: .*__dlpack__.*, got list",
        ),
        (
            lambda: ext.quantize_4bit(X.astype(np.float64)),
            ValueError,
            "input: expected float32, float16 or bfloat16",
        ),
        (
            lambda: ext.quantize_4bit(X.T),
            ValueError,
            r"C-contiguous array, got shape \[64, 2\] with strides \[1, 64\]",
        ),
        (
            lambda: ext.quantize_4bit(X, 48),
            ValueError,
            "block_size: expected a power of two from 32 to 4096, got 48",
        ),
        (
            lambda: ext.quantize_4bit(X, 64, "int4"),
            ValueError,
            "quant_type: expected 'nf4' or 'fp4', got 'int4'",
        ),
        (
            lambda: ext.quantize_4bit(X, out=(PACKED, X)),
            ValueError,
            r"out\[1\]: expected 2 values, got shape \[2, 64\]",
        ),
        (
            lambda: ext.dequantize_4bit(PACKED, ABSMAX, (3, 64)),
            ValueError,
            "packed: expected at least 96 bytes",
        ),
        (lambda: ext.dequantize_4bit(PACKED, X, (2, 64)), ValueError, "absmax: expected 2 values"),
        (
            lambda: ext.dequantize_4bit(PACKED, PACKED[:2], (2, 64)),
            ValueError,
            "absmax: expected float32, got uint8",
        ),
        (lambda: ext.dequantize_4bit(PACKED, ABSMAX, (2, 64), "int8"), ValueError, "dtype: .*, got 'int8'"),
        (lambda: ext.dequantize_4bit(PACKED, ABSMAX, (2, -64)), ValueError, r"shape: .*, got \[2, -64\]"),
        (lambda: ext.dequantize_4bit(PACKED, ABSMAX, (1 << 40, 1 << 40)), ValueError, "shape: .*2\\^60"),
        (
            lambda: ext.dequantize_4bit(PACKED, ABSMAX, (2, 64), out=READ_ONLY),
            ValueError,
            "out: expected a writable array",
        ),
        (
            lambda: ext.dequantize_4bit(PACKED, PACKED[:2], (2, 64), nested_absmax=ABSMAX[:1]),
            ValueError,
            "expected nested_quant_map and nested_offset with it",
        ),
        (
            lambda: ext.linear_4bit(X[:, :32].copy(), PACKED, ABSMAX, (2, 64)),
            ValueError,
            r"\[..., 64\], got \[2, 32\]",
        ),
        (
            lambda: ext.linear_4bit(X, PACKED, ABSMAX, (2, 64), bias=ABSMAX.astype(np.float16)),
            ValueError,
            "bias: expected float32, got float16",
        ),
        (
            lambda: ext.embedding_4bit(np.array([0, 2]), PACKED, ABSMAX, (2, 64)),
            ValueError,
            "indices",
        ),
        (
            lambda: ext.embedding_4bit(np.array([0, 1], np.int32), PACKED, ABSMAX, (2, 64)),
            ValueError,
            "indices: expected int64",
        ),
        (lambda: ext.quantize_4bit(X)[0].__dlpack__(stream=3), ValueError, "stream: expected None .*, got 3"),
        (lambda: ext.quantize_4bit(X)[0].__dlpack__(dl_device=(2, 0)), BufferError, "dl_device"),
    ],
)
def test_bad_arguments_are_named_with_their_value(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_error_of_the_lender_is_passed_on() -> None:
    with pytest.raises(BufferError):
        ext.quantize_4bit(torch.ones(64, requires_grad=True))


def cuda_weight(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = values(ROWS, COLS, dtype=dtype).cuda()
    packed = torch.empty(ROWS * COLS // 2, dtype=torch.uint8, device="cuda")
    absmax = torch.empty(ROWS * COLS // BLOCK_SIZE, device="cuda")
    ext.quantize_4bit(weight, out=(packed, absmax), stream=torch.cuda.current_stream().cuda_stream)
    return weight, packed, absmax


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_arrays_give_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    weight, packed, absmax = cuda_weight(dtype)
    expected_packed, expected_absmax = map(to_torch, ext.quantize_4bit(weight.cpu()))
    assert torch.equal(packed.cpu(), expected_packed.flatten())
    assert torch.equal(absmax.cpu(), expected_absmax)
    out = torch.empty(ROWS, COLS, dtype=dtype, device="cuda")
    assert ext.dequantize_4bit(packed, absmax, (ROWS, COLS), name_of(dtype), out=out) is out
    expected = ext.dequantize_4bit(expected_packed, expected_absmax, (ROWS, COLS), name_of(dtype))
    assert_bitwise_equal(out, to_torch(expected))


@pytest.mark.gpu
def test_cuda_work_runs_on_the_given_stream() -> None:
    weight, packed, absmax = cuda_weight(torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    out = torch.empty(ROWS, COLS, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        ext.dequantize_4bit(packed, absmax, (ROWS, COLS), out=out, stream=stream.cuda_stream)
        assert not stream.query()
    stream.synchronize()
    expected = reference.dequantize_4bit(packed.cpu(), absmax.cpu(), (ROWS, COLS))
    assert_bitwise_equal(out, expected)
    assert weight.is_cuda


@pytest.mark.gpu
def test_linear_on_cuda_takes_its_workspace_from_the_caller() -> None:
    _, packed, absmax = cuda_weight(torch.bfloat16)
    x = values(5, COLS, dtype=torch.bfloat16, seed=1).cuda()
    out = torch.empty(5, ROWS, dtype=torch.bfloat16, device="cuda")
    size = ext.linear_4bit_workspace_size(5, (ROWS, COLS), "bfloat16")
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda") if size else None
    ext.linear_4bit(x, packed, absmax, (ROWS, COLS), out=out, workspace=workspace)
    dequantised = reference.dequantize_4bit(packed.cpu(), absmax.cpu(), (ROWS, COLS), dtype=torch.bfloat16)
    expected = reference.linear_4bit(x.cpu(), dequantised)
    magnitude = reference.linear_4bit(x.cpu().abs(), dequantised.abs())
    # One rounding to bfloat16 after an fp32 sum.
    tolerance = (
        torch.finfo(torch.bfloat16).eps * expected.abs() + COLS * torch.finfo(torch.float32).eps * magnitude
    )
    assert_within(out, expected, tolerance)
    if size:
        with pytest.raises(ValueError, match=f"workspace: expected at least {size} bytes"):
            ext.linear_4bit(x, packed, absmax, (ROWS, COLS), out=out)


@pytest.mark.gpu
def test_cuda_outputs_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"out\[0\]: expected uint8 .* on cuda:0 to write to"):
        ext.quantize_4bit(torch.ones(64, device="cuda"))


@pytest.mark.gpu
def test_arrays_of_two_devices_are_refused() -> None:
    _, packed, absmax = cuda_weight(torch.float32)
    with pytest.raises(
        ValueError, match="absmax: expected an array on cuda:0 like the first one, got one on cpu"
    ):
        ext.dequantize_4bit(packed, absmax.cpu(), (ROWS, COLS))
