"""The graph nodes of the 4-bit linear layer: gradients of first and second order, and that each layer is one node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import make_linear, quantized_linear, randn
from torch import Tensor

from qlora.lora_ops import left_columns
from qlora.nn import Linear4bit

N, K, R = 96, 128, 4
SCALING = 0.5


def operands(device: str) -> list[Tensor]:
    """x [2, 5, k], A [r, k], B [n, r]."""
    tensors = (
        randn(2, 5, K, seed=3, device=device),
        randn(R, K, seed=4, device=device),
        randn(N, R, seed=5, device=device),
    )
    return [tensor.requires_grad_() for tensor in tensors]


def exact_of(layer: Linear4bit) -> Callable[..., Tensor]:
    """What `forward_with_lora` stands for, composed of torch's operations."""
    weight = layer.dequantize(torch.float32).double()
    bias = None if layer.bias is None else layer.bias.double()

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, a, b = x.double(), a.double(), b.double()
        return torch.nn.functional.linear(x, weight, bias) + SCALING * (x @ a.T) @ b.T

    return forward


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], order: int) -> list[Tensor]:
    grad = randn(2, 5, N, seed=6, device=tensors[0].device)
    result = function(*tensors)
    first = torch.autograd.grad(result, tensors, grad.to(result.dtype), create_graph=order == 2)
    if order == 1:
        return list(first)
    total = sum((gradient.double() ** 2).sum() for gradient in first)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, tensors))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_the_composed_operations(order: int, bias: bool, device: str) -> None:
    layer = quantized_linear(device, linear=make_linear(bias=bias), compute_dtype="float32")
    tensors = operands(device)
    got = gradients(lambda x, a, b: layer.forward_with_lora(x, a, b, SCALING), tensors, order)
    expected = gradients(exact_of(layer), tensors, order)
    for ours, theirs in zip(got, expected, strict=True):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= 64 * 2**-24, f"relative error {error:.3g}"


def test_the_bias_gets_its_gradient_beside_an_adapter(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    x, a, b = operands(device)
    grad = randn(2, 5, N, seed=6, device=device)
    layer.forward_with_lora(x, a, b, SCALING).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_a_layer_is_one_node_that_keeps_activations_and_adapters_only(device: str) -> None:
    layer = quantized_linear(device, linear=make_linear(bias=False), compute_dtype="float32")
    x, a, b = operands(device)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        plain = layer(x)
        with_lora = layer.forward_with_lora(x, a, b, SCALING)
    assert sorted(kept) == sorted([(2, 5, K), (R, K), (N, R), (10, left_columns(R))])
    for result, num_inputs in ((plain, 1), (with_lora, 3)):
        leaves = [edge[0] for edge in result.grad_fn.next_functions if edge[0] is not None]
        assert [type(leaf).__name__ for leaf in leaves] == ["AccumulateGrad"] * num_inputs


def test_no_graph_is_made_where_nothing_needs_a_gradient(device: str) -> None:
    layer = quantized_linear(device, linear=make_linear(bias=False), compute_dtype="float32")
    x, a, b = (tensor.detach() for tensor in operands(device))
    assert layer(x).grad_fn is None
    assert layer.forward_with_lora(x, a, b, SCALING).grad_fn is None
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad


def test_compiled_forward_with_lora_is_one_graph_and_the_same(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    tensors = operands(device)
    compiled = torch.compile(layer.forward_with_lora, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda x, a, b: layer.forward_with_lora(x, a, b, SCALING), tensors, 1)
    for ours, theirs in zip(
        gradients(lambda x, a, b: compiled(x, a, b, SCALING), tensors, 1), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(5, K), (2, 5, K)])
def test_the_result_may_be_written_to(shape: tuple[int, ...], device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    _, a, b = operands(device)
    x = randn(*shape, seed=3, device=device).requires_grad_()
    results = [layer.forward_with_lora(x, a, b, SCALING), layer(x)]
    for result in results:
        before = result.detach().clone()
        result.add_(1)
        torch.testing.assert_close(result.detach(), before + 1)
    sum(result.sum() for result in results).backward()  # type: ignore[union-attr]
    assert x.grad is not None


def test_backward_within_another_autocast_computes_in_the_dtype_of_forward(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    grad = randn(2, 5, N, seed=6, device=device)
    gradients_of = []
    for is_within in (False, True):
        tensors = operands(device)
        result = layer.forward_with_lora(*tensors, SCALING)
        with torch.autocast(device, torch.bfloat16, enabled=is_within):
            result.backward(grad)
        gradients_of.append([tensor.grad for tensor in tensors])
    for within, without in zip(*gradients_of, strict=True):
        torch.testing.assert_close(within, without, rtol=0, atol=0)


def test_autocast_to_another_dtype_than_the_compute_dtype_leaves_the_products_alone(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    x, a, b = operands(device)
    expected = layer.forward_with_lora(x, a, b, SCALING)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(layer.forward_with_lora(x, a, b, SCALING), expected, rtol=0, atol=0)


def test_a_scaled_float16_update_does_not_overflow(device: str) -> None:
    """s x A^T is 245,760, more than float16 holds, where the update is 197."""
    layer = quantized_linear(device, compute_dtype="float16")
    x = torch.full((2, K), 300.0, device=device, dtype=torch.float16)
    a, b = torch.full((8, K), 0.1, device=device), torch.full((N, 8), 1e-4, device=device)
    update = layer.forward_with_lora(x, a, b, 64.0).double() - layer(x).double()
    torch.testing.assert_close(
        update, torch.full_like(update, 64 * 300 * 0.1 * K * 1e-4 * 8), rtol=0.02, atol=1
    )


def test_vmap_over_adapters(device: str) -> None:
    layer = quantized_linear(device, compute_dtype="float32")
    x = randn(5, K, seed=3, device=device)
    a, b = randn(3, R, K, seed=4, device=device), randn(3, N, R, seed=5, device=device)
    got = torch.vmap(lambda a, b: layer.forward_with_lora(x, a, b, SCALING))(a, b)
    for i in range(3):
        torch.testing.assert_close(got[i], layer.forward_with_lora(x, a[i], b[i], SCALING))
