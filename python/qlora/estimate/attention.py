"""Scaled dot-product attention as it runs on a CUDA device, for fake tensors, and what depends on values.

torch chooses the kernel by the device. On fake CPU tensors it would take the CPU's; here the operators of its CUDA
kernels are called, which have fake kernels and gradients as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_FLASH_HEAD = 256  # the widest head of flash attention


@contextmanager
def cuda_attention_kernels() -> Iterator[None]:
    """While active, F.scaled_dot_product_attention is that of a CUDA device."""
    with mock.patch.object(F, "scaled_dot_product_attention", cuda_attention):
        yield


@contextmanager
def unpacked_batches() -> Iterator[None]:
    """While active, transformers takes no batch for one of several sequences in a row.

    It looks at the values of the position ids for that, and of fake ones expects the worst.
    """
    from transformers import masking_utils

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[batch, heads, length, width of a value head], by flash, memory-efficient or plain attention, as torch would."""
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    is_narrow = query.dtype in (torch.float16, torch.bfloat16)
    are_equal = width == key.shape[-1] == value.shape[-1]
    if attn_mask is None and is_narrow and are_equal and width <= _FLASH_HEAD:
        # The kernels take rows of whole 16 bytes.
        padded = [F.pad(x, (0, -width % 8)) if width % 8 else x for x in (query, key, value)]
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale
        )[0]
        return result[..., :width]
    has_all_heads = query.shape[1] == key.shape[1]
    if has_all_heads and (attn_mask is None or not attn_mask.requires_grad):
        keeps_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        bias = None if attn_mask is None else _bias(attn_mask, query)
        if bias is not None:
            bias = bias.expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale
        )[0]
    bias = None if attn_mask is None else _bias(attn_mask, query)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, bias, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of booleans as torch adds it to the scores: in the dtype of the query."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


class CountedLabels(TorchFunctionMode):
    """While active, the labels that count are all but the last of each sequence: a fake tensor cannot tell.

    Args:
        batch, length: of the labels.
    """

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self._batch, self._length = batch, length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero and args[0].shape == (self._batch * self._length,):
            return torch.empty(
                (self._batch * (self._length - 1), 1), dtype=torch.int64, device=args[0].device
            )
        return func(*args, **(kwargs or {}))
