"""The caller's stream and device: graphs, side streams, threads, a second device, tensors past 2^31 values."""

from __future__ import annotations

import ctypes
import threading

import c_library
import pytest
import torch
from torch import Tensor

from assertions import assert_bitwise_equal
from qlora import ops

pytestmark = pytest.mark.gpu

FORM = {"block_size": 64, "quant_type": "nf4"}


def randn(*shape: int, seed: int = 0, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(device)


def run_every_kernel(x: Tensor, w: Tensor) -> list[Tensor]:
    """Outputs of each operator, from x [m, k] and a weight w [n, k]."""
    packed, absmax = ops.quantize_4bit(w, **FORM)
    codes, *tensors = ops.quantize_absmax(absmax)
    nested = dict(zip(("nested_absmax", "nested_quant_map", "nested_offset"), tensors, strict=True))
    y = ops.linear_4bit(x, packed, codes, tuple(w.shape), **FORM, **nested)
    a, b = w[:9].float(), w[:, :9].float().contiguous()
    arguments = (packed, codes, tuple(w.shape), a, b, 0.5)
    with_lora, left = ops.lora_linear_4bit(x, *arguments, **FORM, **nested)
    gradients = ops.lora_linear_4bit_backward(y, x, left, *arguments, **FORM, **nested)
    return [
        *(packed, codes, y, with_lora, left),
        *(gradient for gradient in gradients if gradient is not None),
        ops.dequantize_absmax(codes, *tensors),
        ops.dequantize_4bit(packed, codes, tuple(w.shape), **FORM, **nested, dtype=torch.bfloat16),
        ops.linear_4bit_grad_input(y, packed, codes, tuple(w.shape), **FORM, **nested),
        ops.embedding_4bit(
            torch.arange(5, device=w.device), packed, absmax, tuple(w.shape), **FORM, dtype=x.dtype
        ),
    ]


def test_graph_replays_follow_their_inputs() -> None:
    x, w = randn(16, 512), randn(768, 512, seed=1)
    run_every_kernel(x, w)  # makes the cuBLAS handle
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run_every_kernel(x, w)
    for seed in (2, 3):
        x.copy_(randn(16, 512, seed=seed))
        w.copy_(randn(768, 512, seed=seed + 10))
        graph.replay()
        for output, expected in zip(outputs, run_every_kernel(x, w), strict=True):
            assert_bitwise_equal(output, expected)


def test_work_is_ordered_on_the_current_stream() -> None:
    x, w = randn(16, 512), randn(768, 512, seed=1)
    expected = run_every_kernel(x, w)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late_x, late_w = torch.zeros_like(x), torch.zeros_like(w)
        torch.cuda._sleep(50_000_000)  # Work on another stream would overtake the copies.
        late_x.copy_(x)
        late_w.copy_(w)
        outputs = run_every_kernel(late_x, late_w)
    side.synchronize()
    for output, value in zip(outputs, expected, strict=True):
        assert_bitwise_equal(output, value)


def test_threads_on_their_own_streams_do_not_disturb_each_other() -> None:
    inputs = [(randn(16, 512, seed=i), randn(768, 512, seed=i + 10)) for i in range(4)]
    expected = [run_every_kernel(*pair) for pair in inputs]
    torch.cuda.synchronize()
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    outputs = run_every_kernel(*inputs[index])
                torch.cuda.current_stream().synchronize()
            for output, value in zip(outputs, expected[index], strict=True):
                assert_bitwise_equal(output, value)
        except (AssertionError, RuntimeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_second_device_is_used_and_the_current_one_stays() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second gpu")
    x, w = randn(16, 512), randn(768, 512, seed=1)
    expected = run_every_kernel(x, w)
    outputs = run_every_kernel(x.to("cuda:1"), w.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for output, value in zip(outputs, expected, strict=True):
        assert output.device.index == 1
        if output.dtype is torch.uint8:
            assert_bitwise_equal(output, value)


def test_device_that_is_not_there_is_an_error_with_its_index() -> None:
    absmax = torch.ones(4, device="cuda")
    pointer = ctypes.c_void_p(absmax.data_ptr())
    count = torch.cuda.device_count()
    status = c_library.library().qlora_dequantize_absmax_cuda(
        *(pointer, ctypes.c_int64(4), pointer, pointer, pointer, pointer, ctypes.c_int32(count), None)
    )
    assert status == c_library.INVALID_ARGUMENT
    assert (
        c_library.last_error() == f"dequantize_absmax: device: expected an index below {count}, got {count}"
    )


@pytest.mark.slow
def test_more_than_2_31_values_round_trip() -> None:
    rows, cols = 2**31 // 4096 + 3, 4096
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs a gpu with 24 GB")
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    tail = randn(4, cols)
    x[-4:] = tail
    packed, absmax = ops.quantize_4bit(x, **FORM)
    expected_packed, expected_absmax = ops.quantize_4bit(tail, **FORM)
    assert_bitwise_equal(packed[-expected_packed.shape[0] :], expected_packed)
    assert_bitwise_equal(absmax[-expected_absmax.shape[0] :], expected_absmax)
    del x
    y = ops.dequantize_4bit(packed, absmax, (rows, cols), **FORM, dtype=torch.bfloat16)
    expected = ops.dequantize_4bit(expected_packed, expected_absmax, (4, cols), **FORM, dtype=torch.bfloat16)
    assert_bitwise_equal(y[-4:], expected)
    assert not y[:-4].any()
    last = ops.embedding_4bit(
        torch.tensor([rows - 1], device="cuda"), packed, absmax, (rows, cols), **FORM, dtype=torch.bfloat16
    )
    assert_bitwise_equal(last, expected[-1:])
