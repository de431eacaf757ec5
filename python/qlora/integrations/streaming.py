"""Quantises weights while they are read from a checkpoint that is mapped into memory.

Reading a mapped file costs page faults and a copy, and a GPU can copy at full speed only from pinned memory. So worker
threads copy a weight chunk by chunk into pinned buffers, from there to the GPU, and quantise the chunk there:

    mapped file --(worker: page faults, memcpy)--> pinned chunk --(DMA)--> GPU chunk --(quantise)--> packed, scales

On the GPU this needs two chunks a worker beside the 4-bit model, less than one large weight; on the host as much pinned
memory. Chunks are whole blocks, so the result is that of the weight in one piece, to the bit.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..format import BLOCK_SIZES, NESTED_BLOCK_SIZE, num_blocks, num_nested_blocks, num_packed_bytes
from ..nn.params import Params4bit, plain_tensor
from ..nn.quant_state import QuantState, code_tensor
from ..nn.tensor import check_storage, is_finite

# H100, PCIe 5, an 8B model in page cache: 2, 4 and 8 workers took 1.15, 1.14 and 1.30 s with chunks of 32 MiB.
CHUNK_BYTES = 16 * 2**20
NUM_WORKERS = 2
# Below this a weight is copied in one piece by the calling thread.
_SMALLEST = 2**20


@dataclass
class _Slot:
    """A pinned buffer, its twin on the GPU, and when the copy between them was through."""

    pinned: Tensor
    on_device: Tensor
    copied: torch.cuda.Event


class _Lane:
    """What one worker needs on one device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self.stream):
            self.slots = [
                _Slot(
                    torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True),
                    torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device),
                    torch.cuda.Event(),
                )
                for _ in range(2)
            ]


class WeightStreamer:
    """Fills 4-bit weights on GPUs from 16- or 32-bit weights on the host, in the background, until `finish`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._lanes: list[_Lane] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(2 * NUM_WORKERS)
        self._futures: list[Future[None]] = []

    def __reduce__(self) -> tuple[type[WeightStreamer], tuple[()]]:
        return WeightStreamer, ()  # a copied or pickled model takes its quantizer along

    @staticmethod
    def takes(source: Tensor, device: torch.device) -> bool:
        """Whether a weight is worth the pipeline: the rest is quantised at once by `Params4bit.to`."""
        size = source.numel() * source.element_size()
        return (
            device.type == "cuda"
            and source.device.type == "cpu"
            and source.is_contiguous()
            and size >= _SMALLEST
        )

    def start(self, param: Params4bit, device: torch.device, name: str) -> Tensor:
        """Gives a fresh parameter its final buffers on `device`, and their contents in the background.

        Returns:
            bool [] on the device, to be looked at after `finish`: whether all values are finite.
        """
        source = plain_tensor(param)
        num_values = source.numel()
        check_storage(name, num_values, param.quant_storage)
        blocks = num_blocks(num_values, param.blocksize)
        # Allocated here, from the calling thread's memory pool, since the model keeps them.
        packed = torch.empty(num_packed_bytes(num_values), 1, dtype=torch.uint8, device=device)
        state = QuantState(
            torch.empty(blocks, dtype=torch.float32, device=device),
            source.shape,
            code_tensor(param.quant_type, device),
            param.blocksize,
            param.quant_type,
            source.dtype,
        )
        if param.compress_statistics:
            _, _, nested_map, _ = ops.quantize_absmax(state.absmax[:0])
            state.absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
            state.offset = torch.empty((), dtype=torch.float32, device=device)
            nested = torch.empty(num_nested_blocks(blocks), dtype=torch.float32, device=device)
            state.state2 = QuantState(
                nested, code=nested_map, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
            )
            state.nested = True
        finite = torch.empty((), dtype=torch.bool, device=device)
        allocated = torch.cuda.current_stream(device).record_event()
        param._become(packed.view(-1).view(param.quant_storage).unsqueeze(1), state)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="qlora-load")
        self._places.acquire()
        self._futures.append(self._pool.submit(self._fill, source, packed, state, finite, allocated, device))
        return finite

    def finish(self) -> None:
        """Waits until every weight is filled; raises what went wrong in the background."""
        futures, self._futures = self._futures, []
        try:
            for future in futures:
                future.result()
            for lane in self._lanes:
                lane.stream.synchronize()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._pool, self._lanes, self._local = None, [], threading.local()

    # ------------------------------------------------------------------------------------------------------- in workers
    def _lane(self, device: torch.device) -> _Lane:
        lanes = self._local.__dict__.setdefault("lanes", {})
        if device not in lanes:
            lanes[device] = _Lane(device)
            with self._lock:
                self._lanes.append(lanes[device])
        return lanes[device]

    @torch.no_grad()
    def _fill(
        self,
        source: Tensor,
        packed: Tensor,
        state: QuantState,
        finite: Tensor,
        allocated: torch.cuda.Event,
        device: torch.device,
    ) -> None:
        try:
            with torch.cuda.device(device):
                lane = self._lane(device)
                with torch.cuda.stream(lane.stream):
                    lane.stream.wait_event(allocated)
                    absmax = (
                        state.absmax
                        if state.offset is None
                        else torch.empty(state.absmax.numel(), dtype=torch.float32, device=device)
                    )
                    self._fill_blocks(lane, source.view(-1), packed.view(-1), absmax, state)
                    if state.offset is not None and state.state2 is not None:
                        codes, nested, _, offset = ops.quantize_absmax(absmax)
                        state.absmax.copy_(codes)
                        state.state2.absmax.copy_(nested)
                        state.offset.copy_(offset)
                    finite.copy_(is_finite(state))
        finally:
            self._places.release()

    @staticmethod
    def _fill_blocks(lane: _Lane, source: Tensor, packed: Tensor, absmax: Tensor, state: QuantState) -> None:
        block_size, quant_type = state.blocksize, state.quant_type
        assert block_size is not None
        assert quant_type is not None
        step = CHUNK_BYTES // source.element_size() // BLOCK_SIZES[-1] * BLOCK_SIZES[-1]
        for index, begin in enumerate(range(0, source.numel(), step)):
            chunk = source[begin : begin + step]
            slot = lane.slots[index % 2]
            pinned = slot.pinned.view(source.dtype)[: chunk.numel()]
            on_device = slot.on_device.view(source.dtype)[: chunk.numel()]
            slot.copied.synchronize()
            pinned.copy_(chunk)
            on_device.copy_(pinned, non_blocking=True)
            slot.copied.record()
            codes, scales = ops.quantize_4bit(on_device, block_size, quant_type)
            packed[begin // 2 : begin // 2 + codes.numel()].copy_(codes.view(-1))
            absmax[begin // block_size : begin // block_size + scales.numel()].copy_(scales)
