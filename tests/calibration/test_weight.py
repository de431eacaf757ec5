"""One weight, fitted to the inputs of its layer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from assertions import assert_within
from qlora import QuantConfig, reference
from qlora.calibration import feedback
from qlora.calibration.codes import Rounder
from qlora.calibration.feedback import (
    DAMPING,
    Refinement,
    damped,
    inverse_factor,
    round_with_feedback,
    times_inverse,
)
from qlora.calibration.moments import InputMoments, OutputError
from qlora.calibration.weight import CalibratedWeight, calibrate_weight, check_fit
from qlora.nn.params import Params4bit
from qlora.nn.tensor import dequantize_tensor


def make_layer(rows: int = 48, cols: int = 192) -> tuple[Tensor, Tensor]:
    """A weight [rows, cols] and the moments [cols, cols] of 1,000 inputs of very different and coupled columns."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(1000, cols, generator=generator) * torch.logspace(-1, 1, cols) @ mix
    return torch.randn(rows, cols, generator=generator), x.T @ x


def sums(square: Tensor, drift: float = 0.0) -> InputMoments:
    """The moments of inputs x that the original layer had as (1 + drift) x."""
    return InputMoments(square, drift * square, drift**2 * square)


def calibrated(weight: Tensor, moments: InputMoments, config: QuantConfig | None = None) -> CalibratedWeight:
    return calibrate_weight(weight, OutputError(weight.float(), moments), config or QuantConfig())


def regular(moments: Tensor) -> Tensor:
    """A damped copy."""
    with damped(moments.clone()) as result:
        return result.clone()


def output_error(difference: Tensor, moments: Tensor) -> float:
    return float(((difference @ moments) * difference).sum(dtype=torch.float64))


def test_the_factor_is_that_of_the_inverse() -> None:
    _, moments = make_layer()
    moments = regular(moments)
    factor = inverse_factor(moments).double()
    assert torch.equal(factor, factor.triu())
    # U is rounded to float32 once; H U^T U then errs by at most 2 u |H| |U^T| |U|, entry by entry.
    bound = 2.0**-22 * (moments.abs().double() @ factor.abs().T @ factor.abs())
    assert ((moments.double() @ factor.T @ factor - torch.eye(192, dtype=torch.float64)).abs() <= bound).all()


@pytest.mark.parametrize("together", [2048, 50])
def test_the_factor_is_that_of_the_columns_in_their_order(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "_SOLVED_TOGETHER", together)
    _, moments = make_layer()
    moments = regular(moments)
    order = moments.diagonal().argsort(descending=True, stable=True)
    # Each is rounded to float32 once, from float64 steps whose roundings are 2^29 times smaller than that.
    expected = inverse_factor(moments[order][:, order])
    assert_within(inverse_factor(moments, order), expected.double(), 2.0**-23 * expected.abs().double())


def test_the_inverse_is_applied_in_the_order_of_the_columns() -> None:
    weight, moments = make_layer()
    moments = regular(moments)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments, order)
    found = times_inverse(weight, factor, order)
    back = order.argsort()
    inverse = (factor.T @ factor)[back][:, back].double()
    bound = 2 * 192 * 2.0**-23 * (weight.abs() @ (factor.abs().T @ factor.abs())[back][:, back]).double()
    assert_within(found, weight.double() @ inverse, bound)


def test_damping_ends_with_the_moments_as_they_were() -> None:
    _, moments = make_layer()
    before = moments.clone()
    with damped(moments) as found:
        assert found is moments
        assert torch.equal(found, before + DAMPING * before.diagonal().mean() * torch.eye(192))
    assert torch.equal(moments, before)


def test_feedback_over_uncoupled_columns_is_plain_rounding() -> None:
    weight, _ = make_layer()
    moments = torch.diag(torch.linspace(1.0, 5.0, 192))
    scales = weight.abs().amax(dim=1).expand(192, 48).contiguous()
    rounder = Rounder("cpu")
    found = round_with_feedback(weight.T.contiguous(), inverse_factor(moments), scales)
    assert torch.equal(found, rounder.units(weight.T, scales) * scales)


def test_no_sweep_over_the_codes_makes_the_error_larger() -> None:
    weight, moments = make_layer()
    moments = regular(moments)
    scales = weight.abs().amax(dim=1).expand(192, 48).contiguous()
    rounder = Rounder("cpu")
    start = rounder.units(weight.T, scales) * scales
    refinement = Refinement(weight.T.contiguous(), moments, start, scales)
    errors = [output_error(weight - refinement.result.T, moments)]
    for _ in range(4):
        refinement.improve_codes()
        errors.append(output_error(weight - refinement.result.T, moments))
    # The slope is kept up to date in float32: 192 products of terms no larger than the output's energy.
    slack = 192 * 2.0**-24 * output_error(weight, moments)
    assert all(after <= before + slack for before, after in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cols", [192, 100])  # blocks that end with rows, and blocks that straddle them
def test_the_output_error_falls(double_quant: bool, cols: int) -> None:
    weight, moments = make_layer(cols=cols)
    config = QuantConfig(double_quant=double_quant)
    result = calibrated(weight, sums(moments), config)
    assert result.is_calibrated
    assert result.error < 0.6 * result.error_absmax
    difference = weight - dequantize_tensor(result.packed, result.state, torch.float32)
    assert output_error(difference, moments) / output_error(weight, moments) == result.error


def test_both_errors_are_those_of_the_outputs_over_the_same_inputs() -> None:
    """W y - Q x, computed from the tokens themselves, for the calibrated weight and the one at the scales max |w|."""
    weight, _ = make_layer()
    y, noise = torch.randn(2, 1000, 192, generator=torch.Generator().manual_seed(1))
    x = y + 0.1 * noise
    lost = y - x
    moments = InputMoments(x.T @ x, lost.T @ x, lost.T @ lost)
    result = calibrated(weight, moments)
    absmax = Params4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True).quantize_on("cpu")
    stored = dequantize_tensor(result.packed, result.state, torch.float32)
    wanted = y.double() @ weight.T.double()
    for values, found in ((stored, result.error), (absmax.dequantize(torch.float32), result.error_absmax)):
        expected = (wanted - x.double() @ values.T.double()).square().sum() / wanted.square().sum()
        # Three float32 sums of 1,000 products over 192 columns; the terms are no larger than the output's energy.
        assert abs(found - float(expected)) <= 1192 * 2.0**-24


def test_what_the_layers_before_lost_is_made_up_for() -> None:
    """Where inputs come 0.8 times as large as they were, the weight becomes 1.25 times as large."""
    weight, moments = make_layer()
    result = calibrated(weight, sums(moments, 0.25))
    values = dequantize_tensor(result.packed, result.state, torch.float32)
    plain = output_error(weight - values, moments)
    assert output_error(1.25 * weight - values, moments) < 0.2 * plain
    assert result.error < 0.1 * result.error_absmax


def test_the_result_is_an_ordinary_weight() -> None:
    weight, moments = make_layer()
    result = calibrated(weight.bfloat16(), sums(moments))
    again = Params4bit.from_prequantized(result.packed, result.state.as_dict(packed=True))
    state = result.state
    assert state.dtype is torch.bfloat16 and state.shape == (48, 192) and state.blocksize == 64
    assert state.state2 is not None and state.offset is not None and state.state2.code is not None
    absmax = reference.dequantize_absmax(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    expected = reference.dequantize_4bit(result.packed, absmax, (48, 192))
    assert torch.equal(again.dequantize(torch.float32), expected)


def test_bitsandbytes_reads_the_same_values() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight, moments = make_layer()
    result = calibrated(weight, sums(moments))
    stats = result.state.as_dict(packed=True)
    state = functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(result.packed, state)
    # Their scales come from one fused multiply-add or two roundings: one unit in the last place of each scale.
    ours = dequantize_tensor(result.packed, result.state, torch.float32)
    assert ((theirs - ours).abs() <= 2.0**-22 * ours.abs().amax()).all()


def test_columns_without_input_and_rows_of_zeros_are_stored() -> None:
    weight, moments = make_layer()
    moments[5], moments[:, 5] = 0.0, 0.0
    weight[2] = 0.0
    result = calibrated(weight, sums(moments), QuantConfig(double_quant=False))
    assert result.is_calibrated
    values = dequantize_tensor(result.packed, result.state, torch.float32)
    assert torch.equal(values[2], torch.zeros(192))
    # Nothing speaks for another value there, so it is the nearest up to a step: 0.304 is the widest, between -1 and -0.696.
    scale = result.state.absmax.view(48, 3)[:, 0]
    assert ((values - weight)[:, 5].abs() <= torch.maximum(0.304 * scale, (weight[:, 5].abs() - scale))).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weight, moments: weight[0].fill_(float("nan")), "w: expected finite weights, got NaN or Inf"),
        (
            lambda weight, moments: moments[0].fill_(float("inf")),
            "w: expected finite inputs that are not all 0, got NaN",
        ),
        (lambda weight, moments: moments.zero_(), "got none: the calibration text never reached the layer"),
    ],
)
def test_bad_values_are_named(spoil: object, message: str) -> None:
    weight, moments = make_layer()
    spoil(weight, moments)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        check_fit(weight, sums(moments), QuantConfig(), "w")
