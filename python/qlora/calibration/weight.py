"""One weight, with the second moments of its layer's inputs, to calibrated NF4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantConfig
from ..format import NESTED_BLOCK_SIZE
from ..nn.quant_state import QuantState, code_tensor
from ..nn.tensor import check_storage, dequantize_tensor, quantize_tensor
from .codes import Rounder, pack
from .feedback import Refinement, damped, inverse_factor, round_with_feedback, times_inverse
from .moments import InputMoments, OutputError
from .scales import Scales, free_scales

#: Rounds of refinement. Each takes off less: 5 %, 3 %, then about 1 % of the output error.
_ROUNDS = 3


@dataclass
class CalibratedWeight:
    """An ordinary 4-bit weight, and what it does to the layer's output.

    Attributes:
        packed: quant_storage [bytes / itemsize, 1].
        state: its QuantState.
        error_absmax: sum |W y - Q x|^2 / sum |W y|^2 with Q at the scales max |w|.
        error: the same with this weight as Q, over the same inputs.
        is_calibrated: False where the scales max |w| did better and were kept.
    """

    packed: Tensor
    state: QuantState
    error_absmax: float
    error: float
    is_calibrated: bool


def check_fit(weight: Tensor, moments: InputMoments, config: QuantConfig, name: str) -> None:
    """Whether a weight can be calibrated.

    Raises:
        ValueError: the weight or the moments hold NaN or Inf, the moments are all 0, or the packed bytes do not fill whole
            items of quant_storage.
    """
    check_storage(name, weight.numel(), config.torch_quant_storage)
    if not torch.isfinite(weight).all():
        raise ValueError(f"qlora: {name}: expected finite weights, got NaN or Inf")
    is_finite = all(torch.isfinite(part).all() for part in (moments.square, moments.drift, moments.lost))
    if not is_finite or not (moments.square.diagonal() > 0).any():
        got = "NaN or Inf" if not is_finite else "none: the calibration text never reached the layer"
        raise ValueError(f"qlora: {name}: expected finite inputs that are not all 0, got {got}")


@torch.no_grad()
def calibrate_weight(weight: Tensor, output_error: OutputError, config: QuantConfig) -> CalibratedWeight:
    """Quantises `weight` W to the Q for which the layer's output changes least.

    Where the inputs are x and were y, W y is best made of x by W + W (sum (y - x) x^T) (sum x x^T)^-1, by least squares:
    Q comes near to that.

    Args:
        weight: float32, float16 or bfloat16 [n, k], one that `check_fit` has passed.
        output_error: of this weight.
        config: block size, double quantisation and storage; its quant_type is "nf4".
    """
    with damped(output_error.square) as moments:
        result, scales = _search(output_error, moments, config)
    baseline = quantize_tensor(
        weight,
        block_size=config.block_size,
        quant_type="nf4",
        double_quant=config.double_quant,
        quant_storage=config.torch_quant_storage,
    )
    calibrated = _pack(result, scales, weight, config)
    del result
    before, after = (
        output_error.of(dequantize_tensor(*stored, torch.float32)) for stored in (baseline, calibrated)
    )
    if after < before:
        return CalibratedWeight(*calibrated, before, after, True)
    return CalibratedWeight(*baseline, before, before, False)


def _search(output_error: OutputError, moments: Tensor, config: QuantConfig) -> tuple[Tensor, Scales]:
    """float32 [n, k] representable values near the best weight for damped moments, and the scales that represent them.

    Matrices are let go as soon as they have served: of a wide weight, those of [k, k] are most of the memory.
    """
    rows, cols = output_error.weight.shape
    device = output_error.weight.device
    rounder = Rounder(device)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments, order)
    target = output_error.weight + times_inverse(output_error.crossed, factor, order)
    # What an error of column j costs after all later columns have made up for it as well as they can.
    importance = torch.empty_like(moments[0])
    importance[order] = factor.diagonal().square().reciprocal()
    blocks = in_blocks(target, config.block_size)
    of_blocks = in_blocks(importance.expand(rows, cols), config.block_size)
    scales = Scales(free_scales(rounder, blocks, of_blocks), double_quant=config.double_quant)
    scales.take_best(rounder, blocks, of_blocks)
    del blocks, of_blocks
    transposed = target.T.contiguous()
    del target
    of_weights = (
        scales.values().repeat_interleave(config.block_size)[: rows * cols].view(rows, cols).T.contiguous()
    )
    result = torch.empty_like(transposed)
    result[order] = round_with_feedback(transposed[order], factor, of_weights[order])
    del factor
    refinement = Refinement(transposed, moments, result, of_weights)
    del transposed
    for turn in range(_ROUNDS):
        refinement.improve_codes()
        if turn + 1 < _ROUNDS and cols % config.block_size == 0:
            refinement.improve_scales(rounder, scales, config.block_size)
    return result.T.contiguous(), scales


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
