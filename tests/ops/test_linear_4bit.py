"""linear_4bit and linear_4bit_grad_input: values, gradients, checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assertions import assert_bitwise_equal, assert_within
from op_cases import BLOCK_SIZES, DTYPES, QUANT_TYPES, SHAPES, Weight, linear_tolerance, make_weight, randn
from qlora import ops, reference

LEADS = ((1,), (2, 3), (17,), (130,))


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return ops.linear_4bit(x, *weight.args, **weight.kwargs, bias=bias)


def check_forward(x: Tensor, weight: Weight, bias: Tensor | None = None) -> None:
    y = linear(x, weight, bias)
    assert y.dtype == x.dtype
    rows = x.detach().reshape(-1, x.shape[-1])
    expected = reference.linear_4bit(rows, weight.dense, bias)
    tolerance = linear_tolerance(rows, weight.dense, expected, x.dtype)
    assert_within(y, expected.reshape(y.shape), tolerance.reshape(y.shape))


def check_backward(dy: Tensor, weight: Weight) -> None:
    dx = ops.linear_4bit_grad_input(dy, *weight.args, **weight.kwargs)
    assert dx.dtype == dy.dtype
    rows = dy.reshape(-1, dy.shape[-1])
    expected = reference.linear_4bit_grad_input(rows, weight.dense)
    tolerance = linear_tolerance(rows, weight.dense.T, expected, dy.dtype)
    assert_within(dx, expected.reshape(dx.shape), tolerance.reshape(dx.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("shape", [*SHAPES, (320, 192)])
def test_values_and_input_gradient_equal_float64(
    shape: tuple[int, int], lead: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    n, k = shape
    for is_nested in (False, True):
        weight = make_weight(n, k, device=device, is_nested=is_nested)
        check_forward(randn(*lead, k, seed=2, dtype=dtype, device=device), weight)
        check_forward(
            randn(*lead, k, seed=2, dtype=dtype, device=device),
            weight,
            randn(n, seed=3, dtype=dtype, device=device),
        )
        check_backward(randn(*lead, n, seed=4, dtype=dtype, device=device), weight)


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_format_equals_float64(quant_type: str, block_size: int, is_nested: bool, device: str) -> None:
    weight = make_weight(
        40, 136, device=device, block_size=block_size, quant_type=quant_type, is_nested=is_nested
    )
    for m in (1, 9):
        check_forward(randn(m, 136, seed=2, device=device), weight)
        check_backward(randn(m, 40, seed=3, device=device), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_a_model_equals_float64(dtype: torch.dtype, device: str) -> None:
    weight = make_weight(576, 1536, device=device, is_nested=True)
    for m in (1, 4, 100):
        check_forward(randn(m, 1536, seed=2, dtype=dtype, device=device), weight)
        check_backward(randn(m, 576, seed=3, dtype=dtype, device=device), weight)


def test_one_dimensional_input_gives_one_dimensional_output(device: str) -> None:
    weight = make_weight(12, 64, device=device)
    x = randn(64, seed=1, device=device)
    y = linear(x, weight)
    assert y.shape == (12,)
    assert_within(
        y,
        reference.linear_4bit(x, weight.dense),
        linear_tolerance(x[None], weight.dense, reference.linear_4bit(x, weight.dense), x.dtype)[0],
    )


def test_a_nan_in_the_weight_reaches_the_outputs_of_its_rows_alone(device: str) -> None:
    weight = make_weight(4, 64, device=device)
    weight.absmax[2] = torch.nan
    y = linear(randn(5, 64, seed=1, device=device), weight)
    assert y.isnan().all(dim=0).tolist() == [False, False, True, False]
    assert y[:, [0, 1, 3]].isfinite().all()


def test_non_finite_activations_stay_in_their_rows(device: str) -> None:
    weight = make_weight(8, 64, device=device)
    x = randn(3, 64, seed=1, device=device)
    x[1, 5] = torch.inf
    y = linear(x, weight)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_a_zero_weight_gives_the_bias(device: str) -> None:
    packed, absmax = ops.quantize_4bit(torch.zeros(6, 64, device=device))
    bias = randn(6, seed=1, device=device)
    y = ops.linear_4bit(
        randn(3, 64, seed=2, device=device),
        packed,
        absmax,
        (6, 64),
        block_size=64,
        quant_type="nf4",
        bias=bias,
    )
    assert_bitwise_equal(y, bias.expand(3, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_nested", [False, True])
def test_gradients_towards_input_and_bias_equal_float64(
    is_nested: bool, dtype: torch.dtype, device: str
) -> None:
    weight = make_weight(20, 48, device=device, is_nested=is_nested)
    x = randn(2, 5, 48, seed=1, dtype=dtype, device=device).requires_grad_()
    bias = randn(20, seed=2, dtype=dtype, device=device).requires_grad_()
    dy = randn(2, 5, 20, seed=3, dtype=dtype, device=device)
    dx, dbias = torch.autograd.grad(linear(x, weight, bias), (x, bias), dy)
    rows = dy.reshape(-1, 20)
    expected = reference.linear_4bit_grad_input(rows, weight.dense)
    tolerance = linear_tolerance(rows, weight.dense.T, expected, dtype)
    assert dx.dtype == dbias.dtype == dtype
    assert_within(dx, expected.reshape(x.shape), tolerance.reshape(x.shape))
    total = rows.double().sum(0)
    info = torch.finfo(dtype)
    assert_within(
        dbias,
        total,
        10 * torch.finfo(torch.float32).eps * rows.double().abs().sum(0) + info.eps * total.abs(),
    )


def test_gradient_is_the_slope_of_the_forward_pass(device: str) -> None:
    """The layer is linear in x, so a step of any length has exactly the slope that the gradient promises."""
    weight = make_weight(20, 48, device=device)
    x, step = randn(3, 48, seed=1, device=device).requires_grad_(), randn(3, 48, seed=2, device=device)
    dy = randn(3, 20, seed=3, device=device)
    (dx,) = torch.autograd.grad(linear(x, weight), x, dy)
    with torch.no_grad():
        promised = (dx.double() * step).sum()
        found = ((linear(x + step, weight).double() - linear(x, weight)) * dy).sum()
    magnitude = dy.double().abs() @ weight.dense.double().abs() @ (2 * x.double().abs() + step.abs()).T
    assert_within(found, promised, 4 * 48 * torch.finfo(torch.float32).eps * magnitude.sum())


def test_only_what_is_asked_for_gets_a_gradient(device: str) -> None:
    weight = make_weight(20, 48, device=device)
    x, bias = randn(3, 48, seed=1, device=device), randn(20, seed=2, device=device).requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert_bitwise_equal(bias.grad, torch.full_like(bias, 3.0))
    assert not linear(x, weight).requires_grad


def test_second_derivative_equals_float64(device: str) -> None:
    """d/d(dy) of |dx|^2 / 2 with dx = dy W is dx W^T."""
    weight = make_weight(20, 48, device=device)
    x = randn(3, 48, seed=1, device=device).requires_grad_()
    dy = randn(3, 20, seed=2, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(linear(x, weight), x, dy, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum() / 2, dy, create_graph=True)
    dense = weight.dense.double()
    expected = dy.double() @ dense @ dense.T
    magnitude = dy.double().abs() @ dense.abs() @ dense.abs().T
    assert_within(second, expected, (20 + 48) * torch.finfo(torch.float32).eps * magnitude)
    (third,) = torch.autograd.grad(second.sum(), dy)
    expected = torch.ones_like(dy).double() @ dense @ dense.T
    magnitude = torch.ones_like(dy).double() @ dense.abs() @ dense.abs().T
    assert_within(third, expected, (20 + 48) * torch.finfo(torch.float32).eps * magnitude)


def test_gradcheck_of_grad_mode_matches_a_dense_layer(device: str) -> None:
    """In a composed function every gradient equals that of the same function with the dense weight."""
    weight = make_weight(24, 24, device=device)

    def run(layer: object) -> tuple[Tensor, Tensor]:
        x = randn(4, 24, seed=1, device=device).requires_grad_()
        y = torch.tanh(layer(torch.tanh(layer(x))))  # type: ignore[operator]
        y.square().sum().backward()
        return y, x.grad  # type: ignore[return-value]

    y, dx = run(lambda x: linear(x, weight))
    expected_y, expected_dx = run(lambda x: torch.nn.functional.linear(x, weight.dense))
    # Two layers of norm g pass on a relative float32 error of at most about 2 k eps g^2 each way.
    gain = torch.linalg.matrix_norm(weight.dense.double(), 2).item()
    limit = 4 * 24 * torch.finfo(torch.float32).eps * max(1.0, gain) ** 4
    assert_within(y, expected_y, limit)
    assert_within(dx, expected_dx, limit)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_equal_bits(use_reentrant: bool, device: str) -> None:
    weight = make_weight(32, 32, device=device, is_nested=True)

    def block(x: Tensor) -> Tensor:
        return linear(torch.nn.functional.gelu(linear(x, weight)), weight)

    def gradient(is_checkpointed: bool) -> tuple[Tensor, Tensor]:
        x = randn(5, 32, seed=1, device=device).requires_grad_()
        y = checkpoint(block, x, use_reentrant=use_reentrant) if is_checkpointed else block(x)
        y.square().sum().backward()
        return y, x.grad  # type: ignore[return-value]

    for one, other in zip(gradient(True), gradient(False), strict=True):
        assert_bitwise_equal(one, other)


def test_training_step_compiles_as_one_graph(device: str) -> None:
    weight = make_weight(32, 32, device=device, is_nested=True)
    lora = randn(32, 32, seed=4, device=device).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (linear(x, weight) + x @ lora).square().sum()

    x = randn(5, 32, seed=1, device=device).requires_grad_()
    expected = torch.autograd.grad(loss(x), (x, lora))
    torch._dynamo.reset()
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), (x, lora))
    for one, other in zip(actual, expected, strict=True):
        assert_within(one, other, 64 * torch.finfo(torch.float32).eps * other.abs().max())


def test_weight_is_saved_not_copied(device: str) -> None:
    weight = make_weight(32, 32, device=device, is_nested=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(randn(5, 32, seed=1, device=device).requires_grad_(), weight)
    assert set(saved) == {tensor.data_ptr() for tensor in weight.tensors if tensor is not None}


def test_autocast_leaves_the_dtype_to_the_input(device: str) -> None:
    weight = make_weight(16, 64, device=device)
    x = randn(3, 64, seed=1, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = linear(x, weight)
    assert_bitwise_equal(y, linear(x, weight))


def test_inference_mode_gives_equal_bits(device: str) -> None:
    weight = make_weight(16, 64, device=device, is_nested=True)
    x = randn(3, 64, seed=1, device=device)
    with torch.inference_mode():
        y = linear(x, weight)
    assert_bitwise_equal(y.clone(), linear(x, weight))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_thread_count_does_not_change_the_bits(num_threads: int) -> None:
    weight = make_weight(300, 520)
    x = randn(33, 520, seed=1)
    dy = randn(33, 300, seed=2)
    before = torch.get_num_threads()
    outputs = []
    for threads in (1, num_threads):
        torch.set_num_threads(threads)
        outputs.append((linear(x, weight), ops.linear_4bit_grad_input(dy, *weight.args, **weight.kwargs)))
    torch.set_num_threads(before)
    for one, other in zip(*outputs, strict=True):
        assert_bitwise_equal(one, other)
