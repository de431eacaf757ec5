"""linear_4bit_group: each result is linear_4bit's, gradients add up, wrong lists are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assertions import assert_bitwise_equal, assert_within
from op_cases import DTYPES, QUANT_TYPES, Weight, group_lists, linear_tolerance, make_weight, randn
from qlora import ops

NESTED = ("nested_absmax", "nested_quant_map", "nested_offset")
ROWS = (48, 5, 16)


def make_weights(device: str = "cpu", k: int = 128, **options: Any) -> list[Weight]:
    return [make_weight(n, k, device=device, seed=n, **options) for n in ROWS]


def group(x: Tensor, weights: list[Weight], bias: list[Tensor | None] | None = None) -> list[Tensor]:
    packed, absmax, *nested = group_lists(weights)
    rows = [weight.shape[0] for weight in weights]
    names = dict(zip(NESTED, nested, strict=True))
    return ops.linear_4bit_group(x, packed, absmax, rows, **weights[0].format, bias=bias, **names)


def biases(device: str, dtype: torch.dtype, *, last: bool = True) -> list[Tensor | None]:
    first, _, third = (randn(n, seed=n, dtype=dtype, device=device) for n in ROWS)
    return [first, None, third if last else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("lead", [(1,), (2, 3), (40,), ()])
def test_values_are_those_of_single_calls(
    lead: tuple[int, ...], is_nested: bool, quant_type: str, dtype: torch.dtype, device: str
) -> None:
    weights = make_weights(device, quant_type=quant_type, is_nested=is_nested)
    x = randn(*lead, 128, seed=2, dtype=dtype, device=device)
    for bias in (None, biases(device, dtype)):
        outputs = group(x, weights, bias)
        assert len(outputs) == len(weights)
        for output, weight, b in zip(outputs, weights, bias or [None] * 3, strict=True):
            expected = ops.linear_4bit(x, *weight.args, **weight.kwargs, bias=b)
            if device == "cpu":
                assert_bitwise_equal(output, expected)
            else:
                rows = x.reshape(-1, 128)
                size = linear_tolerance(
                    rows, weight.dense, expected.double().reshape(-1, weight.shape[0]), dtype
                )
                assert_within(output, expected, 2 * size.reshape(expected.shape))


def test_gradients_are_the_sums_of_single_calls(device: str) -> None:
    weights = make_weights(device, is_nested=True)
    grads = [randn(4, n, seed=10 + n, device=device) for n in ROWS]

    def run(function: Any) -> list[Tensor]:
        x = randn(4, 128, seed=2, device=device).requires_grad_()
        leaves = [b if b is None else b.clone().requires_grad_() for b in biases(device, torch.float32)]
        outputs = function(x, leaves)
        torch.autograd.backward(outputs, grads)
        assert x.grad is not None
        return [x.grad, *(b.grad for b in leaves if b is not None)]

    def singly(x: Tensor, bias: list[Tensor | None]) -> list[Tensor]:
        return [
            ops.linear_4bit(x, *weight.args, **weight.kwargs, bias=b)
            for weight, b in zip(weights, bias, strict=True)
        ]

    actual = run(lambda x, bias: group(x, weights, bias))
    for one, other in zip(actual, run(singly), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    replayed = run(
        lambda x, bias: checkpoint(lambda y: tuple(group(y, weights, bias)), x, use_reentrant=False)
    )
    for one, other in zip(actual, replayed, strict=True):
        assert_bitwise_equal(one, other)


def test_an_output_without_a_gradient_adds_nothing(device: str) -> None:
    weights = make_weights(device)
    x = randn(4, 128, seed=2, device=device).requires_grad_()
    group(x, weights)[1].sum().backward()
    y = x.detach().clone().requires_grad_()
    ops.linear_4bit(y, *weights[1].args, **weights[1].kwargs).sum().backward()
    assert_within(x.grad, y.grad.double(), torch.full_like(y.grad, 1e-5, dtype=torch.float64).cpu())


def test_gradients_of_gradients_are_right(device: str) -> None:
    weights = make_weights(device, k=64)
    x = randn(2, 64, seed=2, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in group(x, weights)), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    # The sum over all weights of x W^T W, hence its derivative along ones is 2 W^T W ones.
    dense = torch.cat([weight.dense for weight in weights]).double()
    expected = (2 * dense.T @ dense).sum(1).expand(2, -1)
    assert_within(ddx, expected, (expected.abs() * 1e-4 + 1e-4).cpu())


def test_compiled_gradients_are_the_eager_ones(device: str) -> None:
    weights = make_weights(device, is_nested=True)
    x = randn(4, 128, seed=2, device=device).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return torch.stack([y.square().sum() for y in group(x, weights)]).sum()

    torch._dynamo.reset()
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)


def test_empty_groups_and_empty_members(device: str) -> None:
    weight = make_weight(8, 64, device=device)
    empty = ops.quantize_4bit(torch.empty(0, device=device))
    x = randn(3, 64, seed=1, device=device)
    form = {"block_size": 64, "quant_type": "nf4"}
    assert ops.linear_4bit_group(x, [], [], [], **form) == []
    outputs = ops.linear_4bit_group(x, [empty[0], weight.packed], [empty[1], weight.absmax], [0, 8], **form)
    assert outputs[0].shape == (3, 0)
    expected = ops.linear_4bit(x, *weight.args, **weight.kwargs)
    torch.testing.assert_close(outputs[1], expected)
    outputs = ops.linear_4bit_group(x[:0], [weight.packed], [weight.absmax], [8], **form)
    assert outputs[0].shape == (0, 8)
    bias = randn(2, seed=3, device=device)
    outputs = ops.linear_4bit_group(
        x[:, :0], [empty[0]] * 2, [empty[1]] * 2, [2, 3], **form, bias=[bias, None]
    )
    assert_bitwise_equal(outputs[0], bias.expand(3, 2))
    assert_bitwise_equal(outputs[1], torch.zeros(3, 3, device=device))


def test_wrong_arguments_are_named() -> None:
    weights = make_weights(is_nested=True)
    packed, absmax, *nested = group_lists(weights)
    form = {**weights[0].format, **dict(zip(NESTED, nested, strict=True))}
    x = randn(2, 128, seed=1)

    def fails(kind: type[Exception], text: str, *args: Any, **more: Any) -> None:
        with pytest.raises(kind, match=text):
            ops.linear_4bit_group(*args, **{**form, **more})

    name = r"qlora\.linear_4bit_group"
    fails(ValueError, rf"{name}: packed: expected 3 items, got 2", x, packed[:2], absmax, ROWS)
    fails(ValueError, rf"{name}: bias: expected 3 items, got 1", x, packed, absmax, ROWS, bias=[None])
    fails(
        ValueError,
        rf"{name}: nested_offset: expected 3 items, got 0",
        *(x, packed, absmax, ROWS),
        nested_offset=(),
    )
    fails(
        ValueError,
        rf"{name}\[1\]: absmax .*expected 10 values|{name}\[1\]: .*expected",
        *(x, packed, [absmax[0], absmax[0], absmax[2]], ROWS),
    )
    fails(TypeError, rf"{name}: input: expected a tensor of", x.double(), packed, absmax, ROWS)
    fails(ValueError, rf"{name}: input: expected \[\.\.\., k\]", torch.tensor(1.0), packed, absmax, ROWS)
    fails(
        TypeError,
        rf"{name}\[2\]: bias: expected a tensor of torch.float32",
        *(x, packed, absmax, ROWS),
        bias=[None, None, randn(16, seed=1).half()],
    )


def test_direct_calls_do_not_read_out_of_bounds() -> None:
    weights = make_weights()
    packed, absmax, *nested = group_lists(weights)
    x = randn(2, 128, seed=1)
    raw = torch.ops.qlora.linear_4bit_group
    name = r"qlora\.linear_4bit_group"
    with pytest.raises(RuntimeError, match=rf"{name}: absmax: expected 3 items, one a weight, got 2"):
        raw(x, packed, absmax[:2], *nested, [], [], ROWS, 64, "nf4")
    with pytest.raises(RuntimeError, match=rf"{name}: bias: expected 0 tensors.*, got 1"):
        raw(x, packed, absmax, *nested, [x], [], ROWS, 64, "nf4")
    with pytest.raises(RuntimeError, match=rf"{name}: biased: expected indices from 0 to 3 - 1, got 3"):
        raw(x, packed, absmax, *nested, [x], [3], ROWS, 64, "nf4")
    with pytest.raises(RuntimeError, match=rf"{name}: nested_quant_map: expected 3 items, .*got 0"):
        raw(x, packed, absmax, absmax, [], [], [], [], ROWS, 64, "nf4")
    with pytest.raises(RuntimeError, match=r"packed: expected at least .* values, got 10"):
        raw(x, [packed[0], packed[1], packed[2][:10]], absmax, *nested, [], [], ROWS, 64, "nf4")
