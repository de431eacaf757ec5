"""One weight, with the second moments of its layer's input, to calibrated NF4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantConfig
from ..format import NESTED_BLOCK_SIZE
from ..nn.quant_state import QuantState, code_tensor
from ..nn.tensor import check_storage, dequantize_tensor, quantize_tensor
from .codes import Rounder, pack
from .feedback import Refinement, damped, inverse_factor, output_error, round_with_feedback
from .scales import Scales, free_scales

#: Rounds of refinement. Each takes off less: 5 %, 3 %, then about 1 % of the output error.
_ROUNDS = 3


@dataclass
class CalibratedWeight:
    """An ordinary 4-bit weight, and what it does to the layer's output.

    Attributes:
        packed: quant_storage [bytes / itemsize, 1].
        state: its QuantState.
        error_absmax: |output error|^2 / |output|^2 over the text with the scales max |w|. The error is that beside the
            best unquantised weight for the inputs as they are.
        error: the same of this weight.
        is_calibrated: False where the scales max |w| did better and were kept.
    """

    packed: Tensor
    state: QuantState
    error_absmax: float
    error: float
    is_calibrated: bool


@torch.no_grad()
def calibrate_weight(
    weight: Tensor, moments: Tensor, config: QuantConfig, name: str, *, drift: Tensor | None = None
) -> CalibratedWeight:
    """Quantises `weight` so that the layer's output changes least.

    With inputs x where the original layer had y, the weight to come near is not W but that which makes W y of x:
    W + W drift (sum x x^T)^-1, by least squares.

    Args:
        weight: float32, float16 or bfloat16 [n, k].
        moments: float32 [k, k], the sum of x x^T over the layer's inputs x [k], on the weight's device.
        drift: float32 [k, k], the sum of (y - x) x^T; None: x is y.
        config: block size, double quantisation and storage; its quant_type is "nf4".
        name: of the weight, for errors.

    Raises:
        ValueError: the weight or the moments hold NaN or Inf, the moments are all 0, or the packed bytes do not fill whole
            items of quant_storage.
    """
    check_storage(name, weight.numel(), config.torch_quant_storage)
    if not torch.isfinite(weight).all():
        raise ValueError(f"qlora: {name}: expected finite weights, got NaN or Inf")
    if not torch.isfinite(moments).all() or not (moments.diagonal() > 0).any():
        got = (
            "NaN or Inf"
            if not torch.isfinite(moments).all()
            else "none: the calibration text never reached the layer"
        )
        raise ValueError(f"qlora: {name}: expected finite inputs that are not all 0, got {got}")
    regular = damped(moments)
    target = weight.float()
    if drift is not None:
        lower = torch.linalg.cholesky(regular.double())
        target = target + (target @ torch.cholesky_solve(drift.T.double(), lower).T.float())
    baseline, baseline_state = _absmax(weight, config)
    result, scales = _search(target, regular, config)
    packed, state = _pack(result, scales, weight, config)
    total = output_error(target, moments)
    total = total if total > 0 else 1.0  # a weight of zeros has no error
    before = (
        output_error(target - dequantize_tensor(baseline, baseline_state, torch.float32), moments) / total
    )
    after = output_error(target - dequantize_tensor(packed, state, torch.float32), moments) / total
    if after < before:
        return CalibratedWeight(packed, state, before, after, True)
    return CalibratedWeight(baseline, baseline_state, before, before, False)


def _absmax(weight: Tensor, config: QuantConfig) -> tuple[Tensor, QuantState]:
    return quantize_tensor(
        weight,
        block_size=config.block_size,
        quant_type="nf4",
        double_quant=config.double_quant,
        quant_storage=config.torch_quant_storage,
    )


def _search(weight: Tensor, moments: Tensor, config: QuantConfig) -> tuple[Tensor, Scales]:
    """float32 [n, k] representable values near `weight` for damped moments, and the scales that represent them."""
    rows, cols = weight.shape
    rounder = Rounder(weight.device)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order])
    # What an error of column j costs after all later columns have made up for it as well as they can.
    importance = torch.empty_like(moments[0])
    importance[order] = factor.diagonal().square().reciprocal()
    blocks = in_blocks(weight, config.block_size)
    of_blocks = in_blocks(importance.expand(rows, cols), config.block_size)
    scales = Scales(free_scales(rounder, blocks, of_blocks), double_quant=config.double_quant)
    scales.take_best(rounder, blocks, of_blocks)
    of_weights = scales.values().repeat_interleave(config.block_size)[: weight.numel()].view(rows, cols)
    of_weights = of_weights.T.contiguous()
    transposed = weight.T.contiguous()
    ordered = round_with_feedback(rounder, transposed[order], factor, of_weights[order])
    result = torch.empty_like(ordered)
    result[order] = ordered
    refinement = Refinement(rounder, transposed, moments, result, of_weights)
    for turn in range(_ROUNDS):
        refinement.improve_codes()
        if turn + 1 < _ROUNDS and cols % config.block_size == 0:
            refinement.improve_scales(scales, config.block_size)
    return refinement.result.T.contiguous(), scales


def _pack(result: Tensor, scales: Scales, weight: Tensor, config: QuantConfig) -> tuple[Tensor, QuantState]:
    rounder = Rounder(result.device)
    blocks = in_blocks(result, config.block_size)
    codes = rounder.codes(blocks, scales.values().reciprocal()[:, None]).reshape(-1)[: result.numel()]
    packed = pack(codes)
    if config.torch_quant_storage is not torch.uint8:
        packed = packed.view(-1).view(config.torch_quant_storage).unsqueeze(1)
    state = QuantState(
        absmax=scales.codes,
        shape=weight.shape,
        code=code_tensor("nf4", weight.device),
        blocksize=config.block_size,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=scales.offset,
        state2=None
        if scales.nested_absmax is None
        else QuantState(
            absmax=scales.nested_absmax,
            code=scales.nested_map,
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        ),
    )
    state.check()
    return packed, state


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """[num_blocks, block_size] of the flattened values; a partial last block is filled up with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
