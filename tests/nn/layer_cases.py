"""Layers and models that the module tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from qlora import QuantConfig
from qlora.nn import Linear4bit


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def make_linear(
    cols: int = 128,
    rows: int = 96,
    *,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Linear:
    linear = torch.nn.Linear(cols, rows, bias=bias, dtype=dtype)
    linear.weight.data.copy_(randn(rows, cols, seed=seed) / cols**0.5)
    if bias:
        linear.bias.data.copy_(randn(rows, seed=seed + 1))
    return linear


def make_model(seed: int = 0) -> torch.nn.Sequential:
    """Two linear layers; the second has a width that is no multiple of the block size."""
    return torch.nn.Sequential(
        make_linear(128, 96, seed=seed), torch.nn.ReLU(), make_linear(96, 40, seed=seed + 2, bias=False)
    )


def quantized_linear(
    device: str = "cpu", *, linear: torch.nn.Linear | None = None, **config: Any
) -> Linear4bit:
    from qlora.nn.convert import quantize_module

    source = copy.deepcopy(linear) if linear is not None else make_linear()
    layer = quantize_module(source, QuantConfig(**config), name="layer", device=device)
    assert isinstance(layer, Linear4bit)
    return layer


def state_tensors(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Clones of the packed bytes and all scales."""
    weight: Any = layer.weight
    state = weight.quant_state
    tensors = {"packed": weight.data, "absmax": state.absmax, "code": state.code}
    if state.state2 is not None:
        tensors |= {
            "offset": state.offset,
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
        }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    from assertions import assert_bitwise_equal

    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise_equal(actual[name].as_subclass(torch.Tensor), tensor)
