"""lora_linear_4bit and its backward: values and gradients against float64, and that they are one operator each."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from assertions import assert_bitwise_equal, assert_within
from lora_cases import EPS32, Case, check_lora
from op_cases import DTYPES, randn
from qlora import ops
from qlora.lora_ops import MAX_RANK

RANKS = (1, 7, 16, 64, 100, 256)


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_float64(
    dtype: torch.dtype, rank: int, is_separate: bool, device: str
) -> None:
    for shape, lead in (((37, 70), (3, 5)), ((96, 128), (1,)), ((5, 33), (2,)), ((64, 264), (130,))):
        case = Case.random(
            rank, device=device, shape=shape, lead=lead, dtype=dtype, is_separate=is_separate, has_bias=True
        )
        y, left = case.forward()
        check_lora(case, left, y, case.backward(left))


@pytest.mark.parametrize("adapter_dtypes", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_any_dtype_equals_float64(
    dtype: torch.dtype, adapter_dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    case = Case.random(8, device=device, dtype=dtype, adapter_dtypes=adapter_dtypes)
    y, left = case.forward()
    check_lora(case, left, y, case.backward(left))


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
def test_each_gradient_is_the_same_whichever_are_asked_for(
    needed: tuple[bool, bool, bool], device: str
) -> None:
    case = Case.random(8, device=device, dtype=torch.bfloat16)
    _, left = case.forward()
    every = case.backward(left)
    some = case.backward(left, (needed[0], False, *needed[1:]))
    wanted = [gradient for gradient, is_needed in zip(every, needed, strict=True) if is_needed]
    assert len(some) == len(wanted)
    for one, other in zip(some, wanted, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # opcheck's own
@pytest.mark.parametrize("is_separate", [False, True])
def test_opcheck_passes_where_every_operand_trains(is_separate: bool, device: str) -> None:
    case = Case.random(4, device=device, is_separate=is_separate, has_bias=True)
    tensors = [case.x, case.bias, case.a, case.b, case.adapter_input if is_separate else None]
    x, bias, a, b, adapter_input = (
        None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors
    )
    form = (case.weight.shape, case.weight.format["block_size"], case.weight.format["quant_type"])
    arguments = (x, *case.weight.tensors, bias, a, b, case.scaling, adapter_input, *form)
    torch.library.opcheck(torch.ops.qlora.lora_linear_4bit.default, arguments)


def unfused(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The sequence of products that the operators stand for, in the dtype of the input, as PEFT runs it."""
    x = case.x.reshape(-1, case.x.shape[-1])
    dy = case.dy.reshape(-1, case.dy.shape[-1])
    a, b = case.a.to(x.dtype), case.b.to(x.dtype)
    low = x @ a.T
    y = torch.addmm(ops.linear_4bit(x, *case.weight.args, **case.weight.kwargs), low, b.T, alpha=case.scaling)
    dlow = (dy @ b) * case.scaling
    dx = ops.linear_4bit_grad_input(dy, *case.weight.args, **case.weight.kwargs) + dlow @ a
    return y, [dx, (dlow.T @ x).float(), ((dy.T @ low) * case.scaling).float()]


@pytest.mark.parametrize("rank", [16, 64])
def test_errors_are_no_larger_than_those_of_the_unfused_sequence(rank: int, device: str) -> None:
    case = Case.random(rank, device=device, shape=(256, 320), lead=(300,), dtype=torch.bfloat16)
    x, _, dy, a, b, w = case.rows()
    left = case.scaling * x @ a.T
    dleft = case.scaling * dy @ b
    exact = [x @ w.T + left @ b.T, dy @ w + dleft @ a, dleft.T @ x, dy.T @ left]
    y, narrow = case.forward()
    y_unfused, gradients_unfused = unfused(case)
    ours = [y, *case.backward(narrow)]
    for got, theirs, expected in zip(ours, [y_unfused, *gradients_unfused], exact, strict=True):
        error, peer = ((value.double() - expected).norm() for value in (got, theirs))
        assert error <= 1.02 * peer, f"error {error:.4g}, of the sequence {peer:.4g}"


def test_second_order_gradients_equal_those_of_the_dense_layer(device: str) -> None:
    for is_separate in (False, True):
        case = Case.random(4, device=device, is_separate=is_separate)

        def gradients(layer: Callable[..., Tensor], case: Case = case) -> list[Tensor]:
            leaves = [case.x, case.a, case.b, *([case.adapter_input] if case.is_separate else [])]
            tensors = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            first = torch.autograd.grad(layer(*tensors), tensors, case.dy, create_graph=True)
            total = sum(gradient.square().sum() for gradient in first)
            # Of x nothing depends on x where the adapter reads another tensor.
            second = torch.autograd.grad(total, tensors, allow_unused=True)  # type: ignore[arg-type]
            return [torch.zeros(()) if gradient is None else gradient for gradient in second]

        def ours(x: Tensor, a: Tensor, b: Tensor, *extra: Tensor, case: Case = case) -> Tensor:
            given = extra[0] if extra else None
            more = {**case.weight.kwargs, "adapter_input": given}
            return ops.lora_linear_4bit(x, *case.weight.args, a, b, case.scaling, **more)[0]

        def dense(x: Tensor, a: Tensor, b: Tensor, *extra: Tensor, case: Case = case) -> Tensor:
            return x @ case.weight.dense.T + case.scaling * ((extra[0] if extra else x) @ a.T) @ b.T

        for one, other in zip(gradients(ours), gradients(dense), strict=True):
            assert_within(one, other, 128 * EPS32 * other.abs().max())


def test_left_carries_no_gradient_and_the_bias_gets_its_own(device: str) -> None:
    case = Case.random(4, device=device, has_bias=True)
    assert case.bias is not None
    case.a.requires_grad_(), case.bias.requires_grad_()
    y, left = case.forward()
    assert y.requires_grad
    assert not left.requires_grad
    y.backward(case.dy)
    torch.testing.assert_close(case.bias.grad, case.dy.sum((0, 1)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_equal_bits(use_reentrant: bool, device: str) -> None:
    case = Case.random(4, device=device, shape=(48, 48), dtype=torch.bfloat16)

    def gradients(is_checkpointed: bool) -> list[Tensor]:
        x, a, b = (tensor.detach().clone().requires_grad_() for tensor in (case.x, case.a, case.b))

        def layer(x: Tensor) -> Tensor:
            return ops.lora_linear_4bit(x, *case.weight.args, a, b, case.scaling, **case.weight.kwargs)[0]

        y = checkpoint(layer, x, use_reentrant=use_reentrant) if is_checkpointed else layer(x)
        y.backward(case.dy)
        return [tensor.grad for tensor in (x, a, b)]  # type: ignore[misc]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert_bitwise_equal(one, other)


def test_a_training_step_compiles_once_for_every_leading_size(device: str) -> None:
    case = Case.random(4, device=device)
    a, b = case.a.requires_grad_(), case.b.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return ops.lora_linear_4bit(x, *case.weight.args, a, b, case.scaling, **case.weight.kwargs)[0].sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for count in (5, 6, 14):
        x = randn(count, 70, seed=count, device=device).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        for one, other in zip(
            torch.autograd.grad(compiled(x), (x, a, b)), torch.autograd.grad(step(x), (x, a, b)), strict=True
        ):
            assert_bitwise_equal(one, other)
    assert counter.frame_count == 1


class Operators(TorchDispatchMode):
    """The names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_pass_is_one_operator(device: str) -> None:
    case = Case.random(4, device=device, dtype=torch.bfloat16)
    case.x.requires_grad_(), case.a.requires_grad_(), case.b.requires_grad_()
    with Operators() as called:
        y, _ = case.forward()
        torch.autograd.grad(y, (case.x, case.a, case.b), case.dy)
    ours = [name for name in called.names if not name.startswith("aten::detach")]
    assert ours == ["qlora::lora_linear_4bit", "qlora::lora_linear_4bit_backward"]


def test_without_rows_gradients_of_the_adapter_are_zeros(device: str) -> None:
    case = Case.random(4, device=device, lead=(0,))
    y, left = case.forward()
    assert y.shape == (0, 37)
    assert left.shape == (0, 64)
    dx, grad_a, grad_b = case.backward(left)
    assert dx.shape == (0, 70)
    assert not grad_a.any()
    assert not grad_b.any()
    assert (grad_a.shape, grad_b.shape) == (case.a.shape, case.b.shape)


def test_a_nan_stays_in_its_row(device: str) -> None:
    for dtype in DTYPES:
        case = Case.random(4, device=device, lead=(70,), dtype=dtype)
        case.x[3, 5] = torch.nan
        case.dy[65, 7] = torch.nan
        y, left = case.forward()
        assert y.isnan().all(-1).nonzero().flatten().tolist() == [3]
        assert (left[:, 4:] == 0).all()
        dx, grad_a, grad_b = case.backward(left)
        assert dx.isnan().any(-1).nonzero().flatten().tolist() == [65]
        assert grad_a.isnan().all()  # of row 65 every value of dleft is NaN
        assert grad_b.isnan().all()  # of row 3 every value of left is


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": (MAX_RANK + 1, 70)}, ValueError, "a: expected [rank, 70] with a rank of 1 to 256, got"),
        ({"a": (0, 70)}, ValueError, "a: expected [rank, 70] with a rank of 1 to 256, got"),
        ({"a": (4, 69)}, ValueError, "a: expected [rank, 70] with a rank of 1 to 256, got"),
        ({"b": (37, 5)}, ValueError, "b: expected [37, 4], got torch.float32 [37, 5]"),
        ({"b": (36, 4)}, ValueError, "b: expected [37, 4], got torch.float32 [36, 4]"),
    ],
)
def test_a_wrong_adapter_is_named_with_its_value(
    change: dict[str, tuple[int, int]], error: type[Exception], text: str
) -> None:
    case = Case.random(4, device="cpu")
    for name, shape in change.items():
        setattr(case, name, torch.zeros(shape))
    left = torch.zeros(15, 64)
    for call, op in (
        (case.forward, "lora_linear_4bit"),
        (lambda: case.backward(left), "lora_linear_4bit_backward"),
    ):
        with pytest.raises(error) as failure:
            call()
        assert str(failure.value).startswith(f"qlora.{op}: {text}")


def test_other_wrong_arguments_are_named() -> None:
    case = Case.random(4, device="cpu")
    with pytest.raises(ValueError, match=r"left: expected 960 values, got torch.float32 \[15, 4\]"):
        case.backward(torch.zeros(15, 4))
    with pytest.raises(ValueError, match=r"needed: expected no gradient of adapter_input where is_separate"):
        case.backward(torch.zeros(15, 64), (True, True, True, True))
    case.a = case.a.double()
    with pytest.raises(TypeError, match=r"qlora\.lora_linear_4bit: a: expected a tensor of torch.float32 or"):
        case.forward()


def test_direct_calls_do_not_read_out_of_bounds() -> None:
    case = Case.random(4, device="cpu")
    form = ((37, 70), 64, "nf4")
    raw = torch.ops.qlora.lora_linear_4bit
    with pytest.raises(RuntimeError, match=r"qlora\.lora_linear_4bit: b: expected \[37, 4\], got 2 sizes"):
        raw(case.x, *case.weight.tensors, None, case.a, case.b[:30], 1.0, None, *form)
    with pytest.raises(RuntimeError, match=r"lora_linear_4bit: adapter_input: expected at least 1050 values"):
        raw(case.x, *case.weight.tensors, None, case.a, case.b, 1.0, case.x[:1], *form)
