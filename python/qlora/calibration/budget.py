"""Which linear layers stay in 16 bits, where there is room for some of them.

A linear layer's harm is what quantising it alone, with the scales max |w|, does to what its decoder layer hands on:

    harm = mean over the tokens of |h - h'|^2 / |h|^2        h, h' the hidden states after the decoder layer

The share of the hidden state is what the norm of the next layer sees, so layers of different depth compare. That harms
add up, and that the layers after it pass all of them on alike, is an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantConfig
from ..format import NESTED_BLOCK_SIZE
from ..nn import convert
from .layers import LayerArguments, run_layer


@dataclass
class Harm:
    """What quantising one linear layer alone does.

    Attributes:
        name: dotted name in the model.
        num_values: of its weight.
        harm: mean |h - h'|^2 / |h|^2 of the hidden states after its decoder layer.
    """

    name: str
    num_values: int
    harm: float


def bits_per_weight(config: QuantConfig) -> float:
    """Bits that a 4-bit weight takes, scales included."""
    scale = 8 + 32 / NESTED_BLOCK_SIZE if config.double_quant else 32
    return 4 + scale / config.block_size


def check_budget(budget: float, config: QuantConfig, stored_bits: int) -> None:
    """Raises ValueError where no choice of layers has `budget` mean bits, `stored_bits` being those of the model."""
    least = bits_per_weight(config)
    if not least <= budget < stored_bits:
        raise ValueError(
            f"qlora: budget: expected mean bits a weight from {least:.4g} (all layers in 4 bits) to below {stored_bits} "
            f"(none), got {budget:g}"
        )


def choose_kept(harms: list[Harm], budget: float, config: QuantConfig, stored_bits: int) -> list[str]:
    """Names of the layers to leave as they are: the most harm a weight first, those that do not fit passed over.

    Args:
        budget: mean bits a weight over all of `harms`.
        stored_bits: bits of a weight that is left as it is.
    """
    least = bits_per_weight(config)
    room = (budget - least) * sum(item.num_values for item in harms)
    kept = set()
    for item in sorted(harms, key=lambda item: -item.harm / item.num_values):
        cost = (stored_bits - least) * item.num_values
        if cost <= room:
            kept.add(item.name)
            room -= cost
    return [item.name for item in harms if item.name in kept]


@torch.no_grad()
def measure_harm(
    dense: nn.Module,
    names: list[str],
    prefix: str,
    hidden: list[Tensor],
    after: list[Tensor],
    arguments: LayerArguments,
    config: QuantConfig,
) -> list[Harm]:
    """The harm of each of the linears `names` of a decoder layer.

    Args:
        dense: the layer in float32, as it is again afterwards.
        prefix: dotted name of the layer.
        hidden, after: float32 [1, length, width] of each window, before and after the layer.
    """
    device = next(dense.parameters()).device
    harms = []
    for name in names:
        module: Any = dense.get_submodule(name)
        weight = module.weight.data
        stored = convert.quantize_module(module, config, name=f"{prefix}.{name}").dequantize(torch.float32)
        module.weight.data = stored.T.contiguous() if convert.is_conv1d(module) else stored
        total, count = 0.0, 0
        for before, expected in zip(hidden, after, strict=True):
            wanted = expected.to(device)
            lost = (run_layer(dense, before.to(device), arguments) - wanted).square().sum(dim=-1)
            # A token whose state is 0 has nothing to lose.
            share = (lost / wanted.square().sum(dim=-1)).nan_to_num(0.0, posinf=0.0)
            total += float(share.sum(dtype=torch.float64))
            count += share.numel()
        module.weight.data = weight
        harms.append(Harm(f"{prefix}.{name}", weight.numel(), total / count))
    return harms
