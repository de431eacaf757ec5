"""HiRA over a 4-bit weight, which it multiplies value by value:

    y = x W^T + dropout(x) (W * (B A))^T + bias

W is dequantised in every pass, as PEFT does over bitsandbytes. The backward pass does it once more, so that no dense
weight is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..nn.linear import Linear4bit
from ..nn.tensor import dequantize_tensor
from . import peft_merge


def forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`original`, the `forward` of PEFT's Linear, for any base layer."""
    base = layer.get_base_layer()
    if not isinstance(base, Linear4bit) or layer.disable_adapters or layer.merged:
        return original(layer, x, *args, **kwargs)
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    kind, dtype = x.device.type, result.dtype
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    for name in layer.active_adapters:
        if name not in layer.hira_A:
            continue
        a, b = layer.hira_A[name], layer.hira_B[name]
        dropped = layer.hira_dropout[name](x).to(compute_dtype)
        if torch.is_grad_enabled():
            update = checkpoint(_update, dropped, base, a, b, use_reentrant=False, preserve_rng_state=False)
        else:
            update = _update(dropped, base, a, b)
        result = result + update
    return result.to(dtype)


def _update(x: Tensor, base: Linear4bit, a: Tensor, b: Tensor) -> Tensor:
    """x (W * (B A))^T: [..., k] -> [..., n] in the dtype of x; a [r, k] and b [n, r] of any float."""
    # Detached, not made plain as by `dense_weight`, which torch.compile does not trace.
    weight = dequantize_tensor(base.weight.detach(), base.quantized_state(), x.dtype)
    return F.linear(x, weight * (b.to(x.dtype) @ a.to(x.dtype)))


def merge(
    layer: Any,
    original: Callable[..., None],
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """`original`, the `merge` of PEFT's Linear, for any base layer."""
    ours = isinstance(layer.get_base_layer(), Linear4bit)
    try:
        peft_merge.merge(layer, original, safe_merge, adapter_names)
    finally:
        if ours:  # the dense values from before: the packed ones are kept, and the same
            layer._base_weight_before_merge = None
