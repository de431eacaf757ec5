"""A module whose layers share their input, and what the tests of groups ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from layer_cases import make_linear
from torch import Tensor, nn

from assertions import assert_bitwise_equal
from qlora import QuantConfig
from qlora.nn import group, quantize_


def unchanged(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Query, key without a bias, value; `change` is called between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = make_linear(128, 96, seed=1)
        self.k_proj = make_linear(128, 32, seed=2, bias=False)
        self.v_proj = make_linear(128, 40, seed=3)
        self.change: Callable[[Tensor], Tensor] = unchanged

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        x = self.change(x)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], -1)


def make_attention(device: str = "cpu", **config: Any) -> Attention:
    """Layers that compute in the dtype of their input."""
    model = quantize_(Attention(), QuantConfig(**config), device=device)
    assert isinstance(model, Attention)
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        layer.compute_dtype = None
    return model


def group_of(model: Attention) -> group.Group:
    assert model.q_proj._group is not None
    return model.q_proj._group[0]


def alone(model: Attention, x: Tensor) -> Tensor:
    """What the layers make of x each by itself."""
    copied = copy.deepcopy(model)
    assert copied.q_proj._group is None
    with torch.no_grad():
        return copied(x)


def assert_close(actual: Tensor, expected: Tensor, device: str) -> None:
    """The same bits on the CPU; on a GPU a group may add up k in other parts."""
    if device == "cpu":
        assert_bitwise_equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
