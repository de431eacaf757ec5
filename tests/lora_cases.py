"""A 4-bit linear layer with a LoRA adapter: its operands, its two operators, and what they may be off by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assertions import assert_within
from op_cases import Weight, linear_tolerance, make_weight, randn
from qlora import ops, reference
from qlora.lora_ops import left_columns

EPS32 = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """A layer with an adapter, its input and the gradient of its output; `adapter_input` is the input unless separate."""

    weight: Weight
    x: Tensor
    adapter_input: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    is_separate: bool

    @classmethod
    def random(
        cls,
        rank: int,
        *,
        device: str,
        shape: tuple[int, int] = (37, 70),
        lead: tuple[int, ...] = (3, 5),
        dtype: torch.dtype = torch.float32,
        adapter_dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        is_separate: bool = False,
        has_bias: bool = False,
    ) -> Case:
        n, k = shape
        x = randn(*lead, k, seed=1, dtype=dtype, device=device)
        return cls(
            make_weight(n, k, device=device, is_nested=True),
            x,
            randn(*lead, k, seed=2, dtype=dtype, device=device) if is_separate else x,
            (randn(rank, k, seed=3) / k**0.5).to(device, adapter_dtypes[0]),
            randn(n, rank, seed=4).to(device, adapter_dtypes[1]),
            randn(n, seed=5, dtype=dtype, device=device) if has_bias else None,
            randn(*lead, n, seed=6, dtype=dtype, device=device),
            0.75,
            is_separate,
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        return ops.lora_linear_4bit(
            self.x,
            *self.weight.args,
            self.a,
            self.b,
            self.scaling,
            **self.weight.kwargs,
            bias=self.bias,
            adapter_input=self.adapter_input if self.is_separate else None,
        )

    def backward(self, left: Tensor, needed: tuple[bool, bool, bool, bool] | None = None) -> list[Tensor]:
        gradients = ops.lora_linear_4bit_backward(
            self.dy,
            self.adapter_input,
            left,
            *self.weight.args,
            self.a,
            self.b,
            self.scaling,
            **self.weight.kwargs,
            is_separate=self.is_separate,
            needed=needed or (True, self.is_separate, True, True),
        )
        return [gradient for gradient in gradients if gradient is not None]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, x', dy as matrices, A, B and W; in float64."""
        tensors = (
            *(tensor.reshape(-1, tensor.shape[-1]) for tensor in (self.x, self.adapter_input, self.dy)),
            *(self.a, self.b, self.weight.dense),
        )
        return tuple(tensor.double() for tensor in tensors)  # type: ignore[return-value]


def check_lora(case: Case, left: Tensor, y: Tensor, gradients: list[Tensor]) -> None:
    """Against float64. Half a step of the dtype for each rounding: of A, B, W, left, dleft, a base and a result."""
    x, narrow, dy, a, b, w = case.rows()
    dtype, s, m, r = case.x.dtype, case.scaling, len(x), a.shape[0]
    n, k = w.shape
    half = torch.finfo(dtype).eps / 2 if dtype is not torch.float32 else 0.0
    floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 4

    expected, exact_left = reference.lora_linear_4bit(x, w, a, b, s, case.bias, narrow)
    exact_dx, exact_update, exact_a, exact_b = reference.lora_linear_4bit_backward(
        dy, narrow, w, a, b, s, is_separate=case.is_separate
    )
    size_left, size_dleft = s * narrow.abs() @ a.abs().T, s * dy.abs() @ b.abs()
    step_left = (2 * half + (k + 2) * EPS32) * size_left
    step_dleft = (2 * half + (n + 2) * EPS32) * size_dleft

    assert left.shape == (m, left_columns(r))
    assert (left[:, r:] == 0).all()
    assert_within(left[:, :r], exact_left, step_left + floor)

    base = reference.linear_4bit(x, w, case.bias)
    update = step_left @ b.abs().T + (half + r * EPS32) * (size_left @ b.abs().T)
    rounded = half * (base.abs() + expected.abs()) + EPS32 * (base.abs() + expected.abs())
    slack = linear_tolerance(x, w, base, dtype)
    assert y.dtype == dtype
    assert_within(y.reshape(expected.shape), expected, slack + update + 2 * rounded + floor)

    update = step_dleft @ a.abs() + (half + r * EPS32) * (size_dleft @ a.abs())
    base = reference.linear_4bit_grad_input(dy, w)
    for index, expected in enumerate([exact_dx, exact_update] if case.is_separate else [exact_dx]):
        limit = floor + 2 * (half + EPS32) * expected.abs()
        if index == 0:
            limit = limit + linear_tolerance(dy, w.T, base, dtype) + (half + EPS32) * base.abs()
        if index == 1 or not case.is_separate:
            limit = limit + update
        assert gradients[index].dtype == dtype
        assert_within(gradients[index].reshape(expected.shape), expected, limit)

    grad_a, grad_b = gradients[-2:]
    assert (grad_a.dtype, grad_b.dtype) == (case.a.dtype, case.b.dtype)
    for got, expected, limit in (
        (grad_a, exact_a, (step_dleft + m * EPS32 * size_dleft).T @ narrow.abs()),
        (grad_b, exact_b, dy.abs().T @ (step_left + m * EPS32 * size_left)),
    ):
        info = torch.finfo(got.dtype)
        assert_within(got, expected, limit + info.eps * expected.abs() + info.smallest_normal)
