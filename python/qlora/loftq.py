"""`qlora.loftq_init`: adapters that start by making up for what quantising the weights lost.

LoftQ looks for Q and s B A with Q + s B A near the 16-bit weight W, in turns:

    s B A = the r largest singular directions of W - dequantise(Q)        Q = quantise(W - s B A)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint_reader import CheckpointReader

if TYPE_CHECKING:
    from peft import PeftModel

#: What a PeftModel puts before the names of its base model.
PREFIX = "base_model.model."


@torch.no_grad()
def loftq_init(
    model: PeftModel,
    checkpoint: str | Path,
    adapter_name: str = "default",
    *,
    iterations: int = 1,
    keep: Callable[[PeftModel, str], bool] | None = None,
) -> dict[str, tuple[float, float]]:
    """Initialises the adapter of every 4-bit layer from the 16-bit weights, which are read one at a time.

    Args:
        model: a PeftModel over 4-bit layers, with nothing merged.
        checkpoint: directory or hub name of the 16-bit model that it was quantised from.
        adapter_name: the adapter to overwrite.
        iterations: 1 leaves the 4-bit weights as they are, so the adapter fits any 4-bit load of the model; more also
            quantise W - s B A in between, and the adapter then belongs to the weights of this model.
        keep: called with the model and a layer's name after each layer; False takes that layer's change back.

    Returns:
        Layer -> |W - Q| and |W - Q - s B A|, both relative to |W|.

    Raises:
        ValueError: iterations is below 1, an adapter is merged, no layer has the adapter, or a weight is missing in
            the checkpoint or there in 4 bits only.
    """
    from .integrations.peft import LoraLinear4bit

    if iterations < 1:
        raise ValueError(f"qlora.loftq_init: iterations: expected at least 1, got {iterations}")
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear4bit) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"qlora.loftq_init: adapter_name: expected an adapter over 4-bit layers, got {adapter_name!r}"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError("qlora.loftq_init: model: expected no merged adapter, got one; unmerge it first")
    reader = CheckpointReader(checkpoint)
    known = set(reader.names())
    errors = {}
    for path, layer in layers.items():
        name = f"{path.removeprefix(PREFIX)}.weight"
        if name not in known or reader.is_4bit(name):
            raise ValueError(
                f"qlora.loftq_init: checkpoint: expected the 16-bit weight {name}, got none in {checkpoint}"
            )
        base = layer.get_base_layer()
        weight = reader.read(name, base.weight.device).float()
        if getattr(getattr(base, "source_cls", None), "__name__", "") == "Conv1D":
            weight = weight.t()
        errors[path] = _fit(layer, weight, adapter_name, iterations, keep and partial(keep, model, path))
    return errors


def _fit(
    layer: Any, weight: Tensor, name: str, iterations: int, keep: Callable[[], bool] | None
) -> tuple[float, float]:
    from .integrations.peft_weight import KeptWeight, dense_weight, set_dense_weight

    base = layer.get_base_layer()
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    before = KeptWeight.of(base), a.detach().clone(), b.detach().clone()
    error = (weight - dense_weight(base)).norm() / weight.norm()
    for turn in range(iterations):
        if turn:
            set_dense_weight(base, weight - layer.scaling[name] * (b.float() @ a.float()))
        left, values, right = torch.linalg.svd(weight - dense_weight(base), full_matrices=False)
        root = (values[: a.shape[0]] / layer.scaling[name]).sqrt()
        a.copy_(root[:, None] * right[: a.shape[0]])
        b.copy_(left[:, : a.shape[0]] * root)
    if keep is not None and not keep():
        before[0].put_back(base)
        a.copy_(before[1])
        b.copy_(before[2])
    rest = weight - dense_weight(base) - layer.scaling[name] * (b.float() @ a.float())
    return float(error), float(rest.norm() / weight.norm())
