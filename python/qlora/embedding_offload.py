"""Frozen input embeddings in host memory, read by the GPU row by row.

The table is page-locked, and the parameter becomes a tensor of the GPU whose bytes are those of the host (unified
addressing): a look-up reads the rows it is asked for over the bus, and no others. Shape, dtype, device and name of the
parameter stay, and so do saving, generation and adapters around the embeddings. A head with a table of its own is not
touched; one that shares the embeddings' would be read as a whole at every product, and is refused.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["offload_embeddings"]


def offload_embeddings(base: Any) -> int:
    """Moves a transformers model's input embeddings from its GPU to the host; returns the bytes that frees, 0 on a CPU.

    Raises:
        ValueError: they are trained, in 4 bits, or shared with the output head.
    """
    embeddings = base.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(embeddings, nn.Embedding) or type(weight) is not nn.Parameter:
        raise _expected("an nn.Embedding without an adapter and not in 4 bits", type(embeddings).__name__)
    if weight.requires_grad:
        raise _expected("frozen input embeddings", "trained ones")
    head = base.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is weight:
        raise _expected("a head of its own", "one tied to the input embeddings")
    if weight.device.type != "cuda" or _is_offloaded(weight):
        return 0
    host = weight.data.cpu()
    weight.data = _on_device(host, weight.device)
    return host.numel() * host.element_size()


def _expected(what: str, got: str) -> ValueError:
    return ValueError(f"qlora.prepare: embedding_offload: expected {what}, got {got}")


def _is_offloaded(weight: Tensor) -> bool:
    return weight.untyped_storage().data_ptr() in _HostTable.addresses


class _HostTable:
    """Page-locked bytes of a CPU tensor, for as long as a tensor of the GPU shows them."""

    addresses: ClassVar[set[int]] = set()

    def __init__(self, host: Tensor) -> None:
        self._host = host
        address, size = host.data_ptr(), host.numel() * host.element_size()
        status = int(_runtime().cudaHostRegister(address, size, 0))
        if status != 0:
            raise RuntimeError(
                f"qlora.prepare: embedding_offload: expected {size / 1e9:.2f} GB of host memory that can be page-locked, "
                f"got CUDA error {status}"
            )
        self.addresses.add(address)
        weakref.finalize(self, _unlock, address).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _unlock(address: int) -> None:
    _HostTable.addresses.discard(address)
    torch.cuda.synchronize()  # a kernel may still be reading
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _on_device(host: Tensor, device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        shown = torch.as_tensor(_HostTable(host), device=device)
    return shown.view(host.dtype).view(host.shape)
