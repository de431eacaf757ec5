"""The kernels of a LoRA adapter on sizes of several blocks, windows and stages, and at any address."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import c_library
import pytest
import torch
from linear_cases import shifted
from torch import Tensor

from assertions import assert_bitwise_equal
from lora_cases import Case, check_lora
from qlora import ops

pytestmark = pytest.mark.gpu

MEBIBYTE = 1 << 20
# m, [n, k], rank: blocks of rows and columns, whole and not; widths and ranks that no vector divides; one of all.
SIZES = (
    (300, (520, 264), 16),
    (1000, (776, 1032), 64),
    (65, (264, 600), 100),
    (33, (1000, 4096), 256),
    (200, (133, 71), 7),
    (4200, (512, 512), 16),
    (1, (256, 320), 1),
    (129, (2304, 256), 48),
    (700, (4352, 2568), 16),
    (520, (9000, 4104), 24),
    (64, (600, 14336), 64),
)


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "shape", "rank"), SIZES)
def test_results_equal_float64(
    m: int, shape: tuple[int, int], rank: int, dtype: torch.dtype, is_separate: bool
) -> None:
    case = Case.random(
        rank, device="cuda", shape=shape, lead=(m,), dtype=dtype, is_separate=is_separate, has_bias=True
    )
    y, left = case.forward()
    gradients = case.backward(left)
    check_lora(case, left, y, gradients)
    for one, other in zip([*case.forward(), *case.backward(left)], [y, left, *gradients], strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize(
    ("m", "shape", "rank"),
    [
        (9000, (1024, 64), 256),  # two windows of the rows of dy
        (100, (20992, 64), 256),  # two of its columns, apart from its projection
        (130, (64, 33024), 200),  # two of the columns of x
        (4500, (1536, 64), 64),  # blocks that have units of two groups of columns
    ],
)
def test_sizes_of_several_windows_equal_float64(m: int, shape: tuple[int, int], rank: int) -> None:
    case = Case.random(rank, device="cuda", shape=shape, lead=(m,), dtype=torch.bfloat16)
    y, left = case.forward()
    check_lora(case, left, y, case.backward(left))


@pytest.mark.parametrize("m", [1, 8, 16, 20, 64, 100, 200, 256, 300])
def test_every_linear_kernel_is_followed_by_the_update(m: int) -> None:
    case = Case.random(16, device="cuda", shape=(1024, 512), lead=(m,), dtype=torch.bfloat16)
    y, left = case.forward()
    check_lora(case, left, y, case.backward(left))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper's"
)
@pytest.mark.parametrize("right_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 64, 100, 256])
@pytest.mark.parametrize(
    ("m", "shape"),
    [(3, (264, 1088)), (40, (1000, 448)), (100, (1000, 320)), (300, (33, 64)), (600, (600, 4096))],
)
def test_wide_kernels_sum_the_update_themselves(
    kernel: Callable[..., None], m: int, shape: tuple[int, int], rank: int, right_dtype: torch.dtype
) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        case = Case.random(
            rank,
            device="cuda",
            shape=shape,
            lead=(m,),
            dtype=dtype,
            adapter_dtypes=(right_dtype, right_dtype),
        )
        kernel("")
        y, left = case.forward()
        gradients = case.backward(left)
        kernel("wide_sm90")
        x = shifted(case.x)
        moved = replace(case, x=x, adapter_input=x, a=shifted(case.a), b=shifted(case.b))
        with wide_kernel_alone():
            y = case.forward()[0]
            assert_bitwise_equal(moved.forward()[0], y)
        kernel("wide_grad_sm90")
        moved = replace(case, dy=shifted(case.dy), a=shifted(case.a))
        with wide_kernel_alone():
            gradients[0] = case.backward(left)[0]
            assert_bitwise_equal(moved.backward(left)[0], gradients[0])
        check_lora(case, left, y, gradients)


@contextmanager
def wide_kernel_alone() -> Iterator[None]:
    """Fails where no wide kernel ran, or a kernel that adds an update."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield
    names = [event.key for event in profile.key_averages()]
    assert any("wide_kernel" in name for name in names)
    assert not any("add_low_rank" in name for name in names)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 44, 100])
def test_dense_adds_the_update_to_its_weight_or_output(
    kernel: Callable[..., None], rank: int, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    # Rows that whole units of the weight's columns make up, and not; an input of the adapter's own.
    for shape, is_separate in (((1000, 832), False), ((1000, 832), True), ((700, 600), False)):
        case = Case.random(
            rank,
            device="cuda",
            shape=shape,
            lead=(900,),
            dtype=dtype,
            adapter_dtypes=(adapter_dtype, adapter_dtype),
            is_separate=is_separate,
            has_bias=rank == 16,
        )
        kernel("dense", chunk_bytes=300 * 1000 * 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y, left = case.forward()
        names = [event.key for event in profile.key_averages()]
        is_in_weight = shape[1] % 64 == 0 and not is_separate
        assert any("merged_weight" in name for name in names) == is_in_weight
        assert any("add_low_rank" in name for name in names) != is_in_weight
        check_lora(case, left, y, case.backward(left))
        moved = replace(case, a=shifted(case.a), b=shifted(case.b))
        assert_bitwise_equal(moved.forward()[0], y)
        case.b.zero_()
        y, _ = case.forward()
        assert_bitwise_equal(
            y, ops.linear_4bit(case.x, *case.weight.args, **case.weight.kwargs, bias=case.bias)
        )


def test_ranks_that_need_more_and_less_memory_in_any_order(kernel: Callable[..., None]) -> None:
    kernel("dense")
    cases = {
        rank: Case.random(rank, device="cuda", shape=(256, 512), lead=(600,), dtype=torch.bfloat16)
        for rank in (256, 16, 100)
    }
    first = {rank: case.forward()[0] for rank, case in cases.items()}
    for rank in (256, 100, 16, 256):
        assert_bitwise_equal(cases[rank].forward()[0], first[rank])


@pytest.mark.parametrize("rank", [7, 100])
@pytest.mark.parametrize("is_separate", [False, True])
def test_any_address_gives_equal_bits(kernel: Callable[..., None], is_separate: bool, rank: int) -> None:
    kernel("naive")
    case = Case.random(
        rank,
        device="cuda",
        shape=(264, 520),
        lead=(130,),
        dtype=torch.bfloat16,
        adapter_dtypes=(torch.float32, torch.bfloat16),
        is_separate=is_separate,
    )
    y, left = case.forward()
    expected = [y, left, *case.backward(left)]
    for names in (
        ("x",),
        ("adapter_input",),
        ("dy",),
        ("a",),
        ("b",),
        ("x", "adapter_input", "dy", "a", "b"),
    ):
        moved = replace(case, **{name: shifted(getattr(case, name)) for name in names})
        if not is_separate:
            moved.adapter_input = moved.x
        for one, other in zip([*moved.forward(), *moved.backward(shifted(left))], expected, strict=True):
            assert_bitwise_equal(one, other)


def test_kernels_read_what_those_before_them_wrote() -> None:
    """They may be set up early, while the one before still runs."""
    case = Case.random(16, device="cuda", shape=(512, 512), lead=(512,), dtype=torch.bfloat16)
    y, left = case.forward()
    expected = [y, left, *case.backward(left)]
    names = ("x", "dy", "a", "b")
    targets = {name: torch.zeros_like(getattr(case, name)) for name in names}
    moved = replace(case, **targets, adapter_input=targets["x"])
    for _ in range(20):
        for target in targets.values():
            target.zero_()
        moved.backward(moved.forward()[1])
        for name, target in targets.items():
            target.copy_(getattr(case, name))
        y, left = moved.forward()
        for one, other in zip([y, left, *moved.backward(left)], expected, strict=True):
            assert_bitwise_equal(one, other)


def test_rows_do_not_depend_on_those_beside_them() -> None:
    """Of left and dleft, hence of y: a row's sums are cut by columns alone."""
    case = Case.random(16, device="cuda", shape=(256, 1000), lead=(300,), dtype=torch.bfloat16)
    _, left = case.forward()
    for rows in (slice(0, 64), slice(17, 200), slice(299, 300)):
        part = replace(case, x=case.x[rows].contiguous())
        assert_bitwise_equal(part.forward()[1], left[rows])


@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (4096, 14336), (128256, 4096), (64, 64)])
@pytest.mark.parametrize("m", [1, 4096, 65536])
@pytest.mark.parametrize("rank", [1, 16, 100, 256])
def test_scratch_is_bounded(n: int, k: int, m: int, rank: int) -> None:
    weight = c_library.describe_weight(n, k)
    for is_backward in (False, True):
        product = c_library.workspace_size(weight, m, torch.bfloat16, is_grad=is_backward)
        size = c_library.lora_workspace_size(weight, m, torch.bfloat16, rank, is_backward=is_backward)
        narrow = -(-m * -(-rank // 64) * 64 * 2 // 256) * 256 if is_backward else 0
        assert size <= narrow + max(product, 32 * MEBIBYTE)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor, and the values behind it, which are to stay 77."""
    count = int(torch.Size(shape).numel())
    values = torch.full((count + 4096,), 77.0, dtype=dtype, device="cuda")
    return values[:count].view(shape), values[count:]


@pytest.mark.parametrize(("m", "shape", "rank"), [(70, (133, 300), 7), (65, (264, 71), 100)])
def test_nothing_is_written_behind_workspace_and_outputs(
    kernel: Callable[..., None], m: int, shape: tuple[int, int], rank: int
) -> None:
    kernel("naive")
    n, k = shape
    case = Case.random(rank, device="cuda", shape=shape, lead=(m,), dtype=torch.bfloat16)
    weight = c_library.describe_weight(n, k)
    absmax = torch.ones(-(-n * k // 64), device="cuda")
    weight.packed, weight.absmax = case.weight.packed.data_ptr(), absmax.data_ptr()
    lora = c_library.Lora(
        a=case.a.data_ptr(), b=case.b.data_ptr(), a_dtype=0, b_dtype=0, rank=rank, scaling=case.scaling
    )
    sizes = [
        c_library.lora_workspace_size(weight, m, torch.bfloat16, rank, is_backward=is_backward)
        for is_backward in (False, True)
    ]
    spaces = [torch.full((size + MEBIBYTE,), 0x5A, dtype=torch.uint8, device="cuda") for size in sizes]
    bf16 = torch.bfloat16
    outputs = {
        "y": guarded(m, n, dtype=bf16),
        "left": guarded(m, -(-rank // 64) * 64, dtype=bf16),
        "dx": guarded(m, k, dtype=bf16),
        "da": guarded(rank, k, dtype=torch.float32),
        "db": guarded(n, rank, dtype=torch.float32),
    }
    place = {name: pointer(tensor) for name, (tensor, _) in outputs.items()}
    common = (ctypes.c_int64(m), c_library.DTYPES[bf16], ctypes.byref(weight))
    torch.cuda.synchronize()
    lib = c_library.library()
    status = lib.qlora_lora_linear_4bit_cuda(
        *(pointer(case.x), None, *common, None, ctypes.byref(lora), place["y"], place["left"]),
        *(pointer(spaces[0]), ctypes.c_int64(sizes[0]), 0, None),
    )
    assert status == c_library.OK, c_library.last_error()
    status = lib.qlora_lora_linear_4bit_backward_cuda(
        *(pointer(case.dy), pointer(case.x), place["left"], *common, ctypes.byref(lora), 0),
        *(place["dx"], None, place["da"], place["db"]),
        *(pointer(spaces[1]), ctypes.c_int64(sizes[1]), 0, None),
    )
    assert status == c_library.OK, c_library.last_error()
    torch.cuda.synchronize()
    for size, space in zip(sizes, spaces, strict=True):
        assert (space[size:] == 0x5A).all()
    for name, (values, behind) in outputs.items():
        assert (behind == 77.0).all(), name
        assert not (values == 77.0).all(), name


def test_wrong_arguments_of_the_c_interface_are_named() -> None:
    torch.cuda.init()
    weight = c_library.describe_weight(64, 64)
    size = ctypes.c_int64(-1)
    for rank in (0, 257):
        status = c_library.library().qlora_lora_linear_4bit_workspace_size(
            *(ctypes.byref(weight), ctypes.c_int64(1), 2, ctypes.byref(c_library.Lora(rank=rank))),
            *(0, 0, 0, ctypes.byref(size)),
        )
        assert status == c_library.INVALID_ARGUMENT
        assert (
            c_library.last_error() == f"lora_linear_4bit_workspace_size: rank: expected 1 to 256, got {rank}"
        )
