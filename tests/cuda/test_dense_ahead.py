"""The dense kernel with multiprocessors that decode ahead: the same results on any stream, in graphs, among threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linear_cases import check_products, quantized, randn

from assertions import assert_bitwise_equal
from qlora import ops

pytestmark = pytest.mark.gpu

M = 640


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("decoding ahead needs compute capability 9.0")


@pytest.fixture
def ahead(kernel: Callable[..., None]) -> Callable[[int], None]:
    """ahead(4) makes the following calls decode ahead on 4 multiprocessors, 256 columns or a few of them at a time."""

    def choose(decoders: int) -> None:
        kernel("dense", chunk_bytes=600_000, decoders=decoders)

    return choose


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1536, 832), (1100, 264), (2048, 1024), (700, 77)])
@pytest.mark.parametrize("decoders", [1, 4, 8])
def test_equals_float64_product_of_the_rounded_weight(
    ahead: Callable[[int], None], decoders: int, shape: tuple[int, int], dtype: torch.dtype, is_nested: bool
) -> None:
    n, k = shape
    args, form, weight = quantized(n, k, dtype, is_nested)
    x, dy, bias = (randn(*size, dtype=dtype, seed=i) for i, size in enumerate([(M, k), (M, n), (n,)]))
    ahead(decoders)
    check_products(args, form, weight, x, dy, bias)


def test_repeats_its_bits_in_calls_and_graphs(ahead: Callable[[int], None]) -> None:
    args, form, _ = quantized(2048, 1024, torch.bfloat16, True)
    inputs = [randn(M, 1024, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    ahead(4)
    expected = [ops.linear_4bit(x, *args, **form) for x in inputs]
    for _ in range(20):
        for x, y in zip(inputs, expected, strict=True):
            assert_bitwise_equal(ops.linear_4bit(x, *args, **form), y)
    x = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = [ops.linear_4bit(x, *args, **form) for _ in range(2)]
    for source, y in zip(inputs, expected, strict=True):
        x.copy_(source)
        graph.replay()
        for result in twice:
            assert_bitwise_equal(result, y)
        assert_bitwise_equal(ops.linear_4bit(source, *args, **form), y)


def test_calls_of_several_threads_and_streams(ahead: Callable[[int], None]) -> None:
    args, form, _ = quantized(2048, 1024, torch.bfloat16, True)
    inputs = [randn(M, 1024, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    ahead(4)
    expected = [ops.linear_4bit(x, *args, **form) for x in inputs]
    torch.cuda.synchronize()

    def call(index: int) -> list[torch.Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [ops.linear_4bit(inputs[index], *args, **form) for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(inputs)) as pool:
        for y, results in zip(expected, pool.map(call, range(len(inputs))), strict=True):
            for result in results:
                assert_bitwise_equal(result, y)


def test_does_not_wait_for_calls_on_other_streams(ahead: Callable[[int], None]) -> None:
    args, form, _ = quantized(2048, 1024, torch.bfloat16, True)
    x = randn(M, 1024, dtype=torch.bfloat16)
    ahead(4)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:  # Each has its workspace then, and the streams beside them are there.
        with torch.cuda.stream(stream):
            ops.linear_4bit(x, *args, **form)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(4_000_000_000)  # clocks: two seconds
        ops.linear_4bit(x, *args, **form)
    with torch.cuda.stream(streams[1]):
        ops.linear_4bit(x, *args, **form)
    streams[1].synchronize()
    assert not streams[0].query()
    torch.cuda.synchronize()
