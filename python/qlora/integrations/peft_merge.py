"""Merging for PEFT's tuners that compute on the base layer's weight itself, IA3, AdaLoRA and RandLoRA among them.

PEFT's own `merge` runs, unchanged, against a float32 stand-in that holds the weight from before the first merge. What it
leaves there is quantised into the base layer, once for all merged adapters, with the block size, code and dtype it had.
`unmerge` puts the weight from before back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..nn.linear import Linear4bit
from .peft_weight import KeptWeight, set_dense_weight, standing_in


def merge(
    layer: Any,
    original: Callable[..., None],
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """`original`, a PEFT layer's own `merge`, for any base layer.

    Raises:
        ValueError: the merged weight is not finite; nothing is changed.
    """
    if not isinstance(layer.get_base_layer(), Linear4bit):
        original(layer, safe_merge, adapter_names)
        return
    names = check_adapters_to_merge(layer, adapter_names)
    if names:
        _merge(layer, original, safe_merge, names)


def unmerge(layer: Any, original: Callable[..., None]) -> None:
    """`original`, a PEFT layer's own `unmerge`, for any base layer."""
    kept: KeptWeight | None = layer.__dict__.get("_qlora_kept")
    if kept is None:
        original(layer)
        return
    kept.put_back(layer.get_base_layer())
    del layer._qlora_kept
    layer.merged_adapters = []


def _merge(layer: Any, original: Callable[..., None], safe_merge: bool, names: list[str]) -> None:
    base = layer.get_base_layer()
    kept = layer.__dict__.get("_qlora_kept") or KeptWeight.of(base)
    stand_in = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    stand_in.weight = nn.Parameter(kept.dense(base.weight.device), requires_grad=False)
    if kept.bias is not None:
        stand_in.bias = nn.Parameter(kept.bias.clone(), requires_grad=False)
    before, layer.merged_adapters = layer.merged_adapters, []
    try:
        with standing_in(layer, stand_in):
            # Adapters that were merged before are merged again into the weight from before.
            original(layer, safe_merge, [*before, *names])
        set_dense_weight(base, stand_in.weight.data)
    except Exception:
        layer.merged_adapters = before
        raise
    if kept.bias is not None:
        base.bias.data.copy_(stand_in.bias.data)
    layer._qlora_kept = kept
