"""Timing on a GPU: CUDA-graph replays over operands that rotate past the L2 cache, medians, and the eager call time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROTATION_BYTES = 240_000_000
"""Operands are repeated until a rotation reads at least this much: about five times the L2 cache of an H100."""

MIN_GRAPH_CALLS = 40


def num_rotations(bytes_per_call: float, smallest: int = 2, largest: int = 512) -> int:
    """Number of distinct operand sets, so that no call finds its operands in the L2 cache."""
    return max(smallest, min(largest, int(ROTATION_BYTES // max(bytes_per_call, 1.0)) + 1))


def time_graph(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Median time of one call in µs: the calls are captured in one CUDA graph, which is replayed `repeats` times.

    The graph repeats the calls until it has MIN_GRAPH_CALLS, so that its start counts little.
    """
    rounds = -(-MIN_GRAPH_CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return _median_of_events(graph.replay, repeats) / (rounds * len(calls))


def time_events(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Median time of one call in µs, queued eagerly: for calls that cannot be captured in a graph."""

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    return _median_of_events(run_all, repeats) / len(calls)


def time_eager(call: Callable[[], Any], repeats: int = 200) -> float:
    """Median wall time of one synchronised call from Python in µs."""
    times = []
    for repeat in range(repeats + 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if repeat >= 20:
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _median_of_events(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, bytes read and written both counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_events([lambda: target.copy_(source)]) * 1e-6)
