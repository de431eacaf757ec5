"""LoHa, LoKr and UniLoRA over a 4-bit weight: they ask it for its shape or dtype, and the parameter has those of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import Linear4bit
from .peft_weight import standing_in


def update_layer(layer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """`original`, a PEFT layer's own method that makes an adapter or a part of it, for any base layer."""
    base = layer.get_base_layer()
    if not isinstance(base, Linear4bit):
        original(layer, *args, **kwargs)
        return
    stand_in = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    stand_in.weight = nn.Parameter(_without_memory(base), requires_grad=False)
    with standing_in(layer, stand_in):
        original(layer, *args, **kwargs)


update_scaling = update_layer  # of UniLoRA, which makes its scales after the layer


def get_delta_weight(layer: Any, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`original`, a PEFT layer's own `get_delta_weight`, which each pass calls, for any base layer."""
    base = layer.get_base_layer()
    if isinstance(base, Linear4bit):
        layer = _Shaped(layer, _without_memory(base))
    return original(layer, *args, **kwargs)


class _Shaped:
    """A layer to read from and its base layer in one, with a weight of the right shape; the layer is not touched."""

    def __init__(self, layer: Any, weight: Tensor) -> None:
        self._layer, self.weight = layer, weight

    def get_base_layer(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _without_memory(base: Linear4bit) -> Tensor:
    """float32 [out, in] of one value on the weight's device; adapters are made in its dtype."""
    return base.weight.new_empty(1, 1, dtype=torch.float32).expand(base.weight_shape())
