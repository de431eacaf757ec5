"""Linear4bit: its values, dtypes and gradients, and that moves and casts leave its bytes alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layer_cases import assert_same_state, make_linear, quantized_linear, randn, state_tensors
from torch import Tensor

from assertions import assert_bitwise_equal, assert_within
from qlora.nn import Linear4bit, LinearFP4, LinearNF4, NonFiniteWeightError, Params4bit

EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of a product in `dtype` with float32 sums: rounding of the weight and the result, and of k partial sums."""
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        size = size + bias.double().abs()
    return size * (3 * EPSILON[dtype] + 2 * x.shape[-1] * 2**-24) + 1e-30


@pytest.mark.parametrize("config", [{}, {"quant_type": "fp4", "double_quant": False}, {"block_size": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_a_product_with_the_dequantised_weight(
    config: dict[str, Any], dtype: torch.dtype, bias: bool, device: str
) -> None:
    layer = quantized_linear(device, linear=make_linear(bias=bias), **config)
    layer.compute_dtype = None
    x = randn(2, 5, 128, seed=3, dtype=dtype, device=device)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 96))
    weight = layer.dequantize(torch.float32)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if not bias else layer.bias.double()
    )
    rounded_bias = None if not bias else layer.bias
    assert_within(y, expected, bound(x, weight, rounded_bias, dtype).cpu())


def test_input_and_bias_get_gradients_and_the_weight_none(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    x = randn(7, 128, seed=3, device=device).requires_grad_()
    grad = randn(7, 96, seed=4, device=device)
    layer(x).backward(grad)
    weight = layer.dequantize().double()
    assert x.grad is not None
    assert_within(x.grad, grad.double() @ weight, bound(grad, weight.T, None, torch.float32).cpu())
    assert_within(layer.bias.grad, grad.double().sum(0), (grad.double().abs().sum(0) * 7 * 2**-23).cpu())
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compute_dtype_is_that_of_the_product_and_not_of_the_result(
    dtype: torch.dtype, compute_dtype: torch.dtype, device: str
) -> None:
    layer = quantized_linear(device, compute_dtype=compute_dtype)
    x = randn(5, 128, seed=3, dtype=dtype, device=device)
    bias_before = layer.bias.detach().clone()
    y = layer(x)
    assert y.dtype == dtype
    assert_bitwise_equal(layer.bias, bias_before)
    plain = copy.deepcopy(layer)
    plain.compute_dtype = None
    assert_bitwise_equal(y, plain(x.to(compute_dtype)).to(dtype))


def test_without_compute_dtype_autocast_decides_as_for_nn_linear(device: str) -> None:
    layer = quantized_linear(device)
    layer.compute_dtype = None
    linear = make_linear().to(device)
    x = randn(5, 128, seed=3, device=device)
    assert layer(x).dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
        assert_bitwise_equal(y, layer(x.bfloat16()))
        layer.compute_dtype = torch.float32
        assert layer(x).dtype == torch.float32


def test_a_compute_dtype_set_by_hand_is_not_changed_by_inputs() -> None:
    layer = quantized_linear()
    layer.compute_dtype = None
    layer(randn(2, 128, seed=0, dtype=torch.bfloat16))
    assert layer.compute_dtype is None


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.empty(0, dtype=torch.float16)),
        lambda m: m._apply(lambda t: t.half() if t.is_floating_point() else t),
    ],
)
@pytest.mark.parametrize("quant_storage", ["uint8", "bfloat16", "float32"])
def test_casts_of_the_module_change_neither_bytes_nor_scales(cast: Any, quant_storage: str) -> None:
    layer = quantized_linear(quant_storage=quant_storage)
    before = state_tensors(layer)
    cast(layer)
    after = state_tensors(layer)
    for tensors in (before, after):
        tensors["packed"] = tensors["packed"].as_subclass(Tensor).view(torch.uint8)
    assert_same_state(after, before)
    assert layer.weight.dtype == getattr(torch, quant_storage)


def test_casts_change_the_bias() -> None:
    assert quantized_linear().to(torch.bfloat16).bias.dtype == torch.bfloat16


def test_moves_take_the_state_along(device: str) -> None:
    layer = quantized_linear(compute_dtype="float32")
    before = state_tensors(layer)
    x = randn(5, 128, seed=3)
    y = layer(x)
    weight = layer.weight
    layer.to(device)
    assert layer.weight is weight
    assert layer.quant_state is weight.quant_state
    assert layer.quant_state is not None
    assert layer.quant_state.device.type == device
    assert layer(x.to(device)).device.type == device
    layer.to("cpu")
    assert_same_state(state_tensors(layer), before)
    assert_bitwise_equal(layer(x), y)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_share_nothing(duplicate: Any, device: str) -> None:
    layer = quantized_linear(device)
    x = randn(5, 128, seed=3, device=device)
    y = layer(x)
    other = duplicate(layer)
    assert_bitwise_equal(other(x), y)
    assert other.quant_state is other.weight.quant_state
    assert other.quant_state is not layer.quant_state
    other.weight.data.fill_(0)
    other.weight.absmax.fill_(0)
    assert_bitwise_equal(layer(x), y)


def test_constructor_has_bitsandbytes_arguments_and_the_first_move_quantises() -> None:
    layer = Linear4bit(128, 96, True, torch.bfloat16, False, "nf4", torch.uint8, "cpu", block_size=128)
    assert isinstance(layer, torch.nn.Linear)
    assert type(layer.weight) is Params4bit
    assert layer.quant_state is None
    dense = layer.weight.detach().clone()
    layer.to("cpu")
    assert layer.weight.bnb_quantized
    assert layer.quant_state is not None
    assert (layer.quant_state.blocksize, layer.quant_state.nested) == (128, False)
    assert (layer.dequantize() - dense).abs().max() < dense.abs().max() * 0.16
    assert (LinearNF4(64, 8).weight.quant_type, LinearFP4(64, 8).weight.quant_type) == ("nf4", "fp4")
    assert Linear4bit(64, 8).weight.quant_type == "fp4"
    assert "nf4, block_size=128, fp32 scales" in repr(layer)


def test_a_replaced_weight_brings_its_state() -> None:
    layer, other = quantized_linear(), quantized_linear(linear=make_linear(seed=9))
    layer.weight = other.weight
    x = randn(3, 128, seed=1)
    layer.bias = other.bias
    assert_bitwise_equal(layer(x), other(x))
    assert layer.quant_state is other.quant_state


def test_a_weight_that_lost_its_state_finds_it_in_the_module() -> None:
    layer = quantized_linear()
    x = randn(3, 128, seed=1)
    y = layer(x)
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert_bitwise_equal(layer(x), y)
    assert "weight.absmax" in layer.state_dict()


def test_a_layer_is_freed_as_soon_as_nobody_holds_it() -> None:
    import gc
    import weakref

    layer = quantized_linear()
    reference = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert reference() is None
    finally:
        gc.enable()


def test_errors_name_the_argument_and_the_value() -> None:
    layer = quantized_linear()
    with pytest.raises(ValueError, match=r"input: expected a last dimension of 128, got \[3, 96\]"):
        layer(randn(3, 96, seed=0))
    fresh = Linear4bit(128, 96)
    with pytest.raises(
        RuntimeError, match=r"expected a 4-bit weight, got torch.float32 on cpu: move the layer"
    ):
        fresh(randn(3, 128, seed=0))
    fresh.weight.data[3, 5] = float("nan")
    fresh.layer_name = "model.up_proj"
    with pytest.raises(NonFiniteWeightError, match="the weight of model.up_proj holds NaN or Inf"):
        fresh.to("cpu")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(use_reentrant: bool, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = quantized_linear(device, compute_dtype="float32")
    x = randn(6, 128, seed=1, device=device)
    plain, recomputed = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(plain).square().sum().backward()
    checkpoint(layer, recomputed, use_reentrant=use_reentrant).square().sum().backward()
    assert_bitwise_equal(recomputed.grad, plain.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute_dtype", ["auto", "bfloat16"])
def test_compiles_to_one_graph_forward_and_backward(compute_dtype: str, device: str) -> None:
    torch._dynamo.reset()
    layer = quantized_linear(device, compute_dtype=compute_dtype)
    layer.compute_dtype = None if compute_dtype == "auto" else torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, other = (randn(6, 128, seed=1, device=device).requires_grad_() for _ in range(2))
    y = compiled(x)
    expected = layer(other)
    assert_bitwise_equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_bitwise_equal(x.grad, other.grad)  # type: ignore[arg-type]
    with torch.autocast(device, torch.bfloat16):
        assert_bitwise_equal(compiled(x), layer(x))


@pytest.mark.gpu
def test_replays_in_a_cuda_graph() -> None:
    layer = quantized_linear("cuda", compute_dtype="bfloat16")
    x = randn(6, 128, seed=1, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    x.copy_(randn(6, 128, seed=2, dtype=torch.bfloat16, device="cuda"))
    graph.replay()
    assert_bitwise_equal(y, layer(x).detach())
