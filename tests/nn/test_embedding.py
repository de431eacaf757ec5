"""Embedding4bit: rows of the dequantised table, and a place in state dicts, which bitsandbytes' has not."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import randn

from assertions import assert_bitwise_equal
from qlora import QuantConfig
from qlora.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from qlora.nn.convert import dequantize_module, quantize_module


def make_embedding(
    device: str = "cpu", *, cols: int = 64, dtype: torch.dtype = torch.float32
) -> Embedding4bit:
    dense = torch.nn.Embedding(50, cols, padding_idx=3, dtype=dtype)
    dense.weight.data.copy_(randn(50, cols, seed=0))
    layer = quantize_module(dense, QuantConfig(quantize_embeddings=True), name="wte", device=device)
    assert isinstance(layer, Embedding4bit)
    return layer


@pytest.mark.parametrize("cols", [64, 48, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looks_up_rows_of_the_dequantised_table(cols: int, dtype: torch.dtype, device: str) -> None:
    layer = make_embedding(device, cols=cols, dtype=dtype)
    indices = torch.tensor([[0, 49, 3], [7, 7, 21]], device=device)
    rows = layer(indices)
    assert rows.dtype == dtype
    assert_bitwise_equal(rows, layer.dequantize()[indices])
    assert_bitwise_equal(layer(indices.int()), rows)


def test_saves_and_loads_to_the_bit() -> None:
    layer = make_embedding()
    state = layer.state_dict()
    assert "weight.quant_state.bitsandbytes__nf4" in state
    other = Embedding4bit(50, 64)
    other.load_state_dict(state)
    indices = torch.arange(50)
    assert_bitwise_equal(other(indices), layer(indices))


def test_moves_casts_and_copies_leave_the_rows() -> None:
    layer = make_embedding()
    indices = torch.arange(50)
    rows = layer(indices)
    assert_bitwise_equal(copy.deepcopy(layer)(indices), rows)
    assert_bitwise_equal(layer.half().to("cpu")(indices), rows)


def test_dequantises_to_a_plain_embedding() -> None:
    layer = make_embedding()
    plain = dequantize_module(layer)
    assert type(plain) is torch.nn.Embedding
    assert plain.padding_idx == 3
    assert_bitwise_equal(plain(torch.arange(50)).detach(), layer(torch.arange(50)))


def test_constructors_follow_bitsandbytes() -> None:
    layer = Embedding4bit(50, 64, dtype=torch.bfloat16)
    assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("fp4", False)
    assert (EmbeddingNF4(5, 64).weight.quant_type, EmbeddingFP4(5, 64).weight.quant_type) == ("nf4", "fp4")
    with pytest.raises(RuntimeError, match="move the layer to its device first"):
        layer(torch.arange(3))
    assert layer.to("cpu")(torch.arange(3)).dtype == torch.bfloat16


def test_compiles_to_one_graph(device: str) -> None:
    torch._dynamo.reset()
    layer = make_embedding(device)
    indices = torch.arange(50, device=device)
    assert_bitwise_equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(indices), layer(indices))
