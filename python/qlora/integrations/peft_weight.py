"""The 4-bit weight under a PEFT layer: as dense values, replaced by others of the same format, kept aside and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.module import Module4bit
from ..nn.params import Params4bit


def dense_weight(base: Module4bit, dtype: torch.dtype = torch.float32) -> Tensor:
    """The base layer's weight, dequantised: dtype [rows, cols], a tensor of its own."""
    return base.dequantize(dtype)


def set_dense_weight(base: Module4bit, values: Tensor) -> None:
    """Quantises `values` [rows, cols] into the base layer: same block size, code, scales, storage, dtype and device.

    Raises:
        ValueError: values hold NaN or Inf; the base layer is unchanged.
    """
    old: Params4bit = base.weight
    dtype = base.quantized_state().dtype or values.dtype
    attributes = {**old.__dict__, "bnb_quantized": False, "quant_state": None, "module": None}
    new = type(old)(values.to(old.device, dtype), requires_grad=False, **attributes).to(old.device)
    _place(base, new, old.module)


def base_product(base: Module4bit, x: Tensor) -> Tensor:
    """x W^T without the bias: [..., cols] -> [..., rows], in the dtype of x."""
    state: Any = base.quantized_state()
    nested = state.state2
    return ops.linear_4bit(
        *(x, base.weight.detach(), state.absmax, state.shape),
        block_size=state.blocksize,
        quant_type=state.quant_type,
        nested_absmax=None if nested is None else nested.absmax,
        nested_quant_map=None if nested is None else nested.code,
        nested_offset=state.offset,
    )


@contextmanager
def standing_in(layer: Any, stand_in: nn.Module) -> Iterator[None]:
    """While active, `stand_in` is the innermost base layer of a PEFT layer."""
    owner = layer
    while hasattr(owner.base_layer, "base_layer"):
        owner = owner.base_layer
    base = owner.base_layer
    owner.base_layer = stand_in
    try:
        yield
    finally:
        owner.base_layer = base


def _place(base: Module4bit, weight: Params4bit, module: nn.Module | None) -> None:
    weight.module = module
    base.weight = weight
    if module is not None:
        setattr(module, "quant_state", weight.quant_state)  # noqa: B010  a property, to a type checker a submodule


@dataclass
class KeptWeight:
    """Packed weight and bias of a base layer as they were before a merge.

    A move of a 4-bit parameter copies its bytes, so what comes back is what was kept, bit for bit.
    """

    weight: Params4bit
    bias: Tensor | None

    @classmethod
    def of(cls, base: Module4bit) -> KeptWeight:
        """The weight where it is, shared with the base layer until that gets another one; a copy of the bias."""
        bias = getattr(base, "bias", None)
        return cls(base.weight, None if bias is None else bias.detach().clone())

    def on(self, device: torch.device | str | None) -> KeptWeight:
        """The weight on `device` (None is where it is). The bias, being small, stays."""
        return self if device is None else KeptWeight(self.weight.to(device), self.bias)

    def dense(self, device: torch.device) -> Tensor:
        """float32 [rows, cols] on device."""
        return self.weight.to(device).dequantize(torch.float32)

    def put_back(self, base: Module4bit) -> None:
        old = base.weight
        _place(base, self.weight.to(old.device), old.module)
        if self.bias is not None:
            base.get_parameter("bias").data.copy_(self.bias)
