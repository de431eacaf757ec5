"""Embedding4bit: a look-up in a frozen 4-bit table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  registers the operators
from ..format import DEFAULT_BLOCK_SIZE
from .module import Module4bit
from .params import Params4bit
from .quant_state import scale_operands

_embedding_4bit = torch.ops.qlora.embedding_4bit.default


class Embedding4bit(Module4bit, torch.nn.Embedding):  # type: ignore[misc]  # weight is a Params4bit
    """nn.Embedding with its table [num_embeddings, embedding_dim] stored in 4 bits.

    Only the rows asked for are dequantised. Saved and loaded like Linear4bit; bitsandbytes cannot save its own.

    Args:
        dtype: dtype of the result.
        quant_type, quant_storage, device, block_size: as for Linear4bit.
        compress_statistics: double quantisation; off by default, as in bitsandbytes.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        compress_statistics: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            blocksize=block_size,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """input: int64 or int32 [...], each in [0, num_embeddings) -> `dtype` [..., embedding_dim]."""
        state = self.quant_state
        if state is None:
            state = self.quantized_state()
        with torch._C.DisableTorchFunctionSubclass():
            rows: Tensor = _embedding_4bit(
                input.long(),
                self.weight,
                *scale_operands(state),
                state.shape,
                state.blocksize,
                state.quant_type,
                self.dtype,
            )
        return rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._format_repr()}"


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit with the NF4 code book."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device, **kwargs)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit with the FP4 code book."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device, **kwargs)
