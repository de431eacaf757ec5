"""The 4-bit format in plain torch: what every kernel is measured against.

Written to be read, not to be fast, and independent of the rest of the package, its constants included. Quantise,
dequantise and the scales are bit-exact (float32 steps in the order of the kernels); linear layers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NESTED_BLOCK_SIZE = 256

_CODES = {
    "nf4": [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    "fp4": [
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5),
        *(0.1666666716337204, 0.25),
        *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5),
        *(-0.1666666716337204, -0.25),
    ],
}
# Code c of NF4 serves thresholds[c - 1] < x <= thresholds[c]. These are the float32 values of the CUDA kernels' decimal
# literals; four of those lie half-way between two float32, and read as float64 first they would round to the other one.
_NF4_THRESHOLDS = [
    *(-0.84809643, -0.610632896, -0.45999527, -0.33967942, -0.234607399, -0.137911737, -0.0455250181),
    *(0.0397901498, 0.120255254, 0.203521252, 0.292013764, 0.389312536, 0.501663387, 0.64278692, 0.861478388),
]
# The i-th smallest magnitude of FP4 serves thresholds[i - 1] < |x| <= thresholds[i]; its code is order[i]. Some are
# rounded decimals, not midpoints: the format's own.
_FP4_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
_FP4_ORDER = [0, 1, 6, 7, 4, 5, 2, 3]
_ZERO_CODE = {"nf4": 7, "fp4": 0}


def code_values(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Values of the 16 codes, float32 [16]."""
    return torch.tensor(_CODES[quant_type], dtype=torch.float32, device=device)


def decision_thresholds(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Ascending float32 [15]: where one code ends and the next begins.

    A value on a threshold takes the lower code (NF4) or the smaller magnitude (FP4). Below 0, FP4 decides on |x|; its
    middle threshold, 0, parts code 8 (-0, x < 0) from code 0.
    """
    positive = torch.tensor(_FP4_THRESHOLDS, dtype=torch.float32)
    fp4 = torch.cat([-positive.flip(0), torch.zeros(1), positive])
    return (torch.tensor(_NF4_THRESHOLDS) if quant_type == "nf4" else fp4).to(device)


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """float32 [num_blocks, block_size] of the flattened x; a partial last block is filled up with zeros."""
    flat = x.detach().reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def scale_to_unit(blocks: Tensor, absmax: Tensor) -> Tensor:
    """x * (1 / absmax), both steps rounded to float32 as in the kernels, which is not x / absmax.

    Where absmax or its reciprocal is no normal float32, both are multiplied by 2^64 or 2^-64 first, which is exact.
    """
    is_regular = (absmax == 0) | ((absmax >= 2.0**-126) & (absmax <= 2.0**126)) | ~absmax.isfinite()
    power = torch.where(is_regular, 1.0, torch.where(absmax < 1.0, 2.0**64, 2.0**-64)).to(absmax.dtype)
    return (blocks * power[:, None]) * (1.0 / (absmax * power))[:, None]


def nearest_code(scaled: Tensor, quant_type: str) -> Tensor:
    """uint8 code of each scaled value; a NaN takes the code of 0."""
    bounds = decision_thresholds(quant_type, scaled.device)
    if quant_type == "nf4":
        code = torch.bucketize(scaled, bounds)
    else:
        order = torch.tensor(_FP4_ORDER, device=scaled.device)
        code = order[torch.bucketize(scaled.abs().nan_to_num(0.0), bounds[8:])] + 8 * (scaled < 0)
    return torch.where(scaled.isnan(), _ZERO_CODE[quant_type], code).to(torch.uint8)


def quantize_4bit(x: Tensor, block_size: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """Any shape -> uint8 [ceil(n / 2), 1], float32 absmax [ceil(n / block_size)].

    A zero block keeps absmax 0 and the code of 0. A NaN makes its block's absmax NaN and every code that of 0. In a
    block with an Inf absmax is Inf, Infs take the code of +-1 and finite values the code of 0.
    """
    blocks = in_blocks(x, block_size)
    absmax = blocks.abs().amax(dim=1)  # NaN wins over all
    scaled = scale_to_unit(blocks, absmax)  # 0 * inf = NaN in a zero block
    is_infinite = blocks.isinf() & ~absmax.isnan()[:, None]
    scaled = torch.where(is_infinite, blocks.sign(), scaled)
    code = nearest_code(scaled, quant_type).reshape(-1)[: x.numel()]
    if code.numel() % 2:
        code = torch.cat([code, code.new_full((1,), _ZERO_CODE[quant_type])])
    return (code[0::2] << 4 | code[1::2]).unsqueeze(1), absmax


def unpack(packed: Tensor, num_values: int) -> Tensor:
    """uint8 [num_values] codes of packed bytes of any dtype: even index in the high nibble, odd in the low."""
    byte = packed.contiguous().reshape(-1).view(torch.uint8)[: (num_values + 1) // 2]
    return torch.stack([byte >> 4, byte & 0xF], dim=1).reshape(-1)[:num_values]


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    *,
    block_size: int = 64,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """round(code * absmax) with the float32 product rounded once to dtype; absmax is float32 [num_blocks]."""
    num_values = math.prod(shape)
    values = code_values(quant_type, packed.device)[unpack(packed, num_values).long()]
    scales = absmax.reshape(-1).repeat_interleave(block_size)[:num_values]
    return (values * scales).reshape(tuple(shape)).to(dtype)


def nested_quant_map(device: torch.device | str = "cpu") -> Tensor:
    """The 8-bit map of double-quantised scales, ascending float32 [256]: seven decades of midpoints, 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        ends = torch.linspace(0.1, 1.0, 2**decade + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def quantize_absmax(
    absmax: Tensor, nested_offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 [n] -> codes uint8 [n], nested_absmax [ceil(n / 256)], nested_quant_map [256], nested_offset [].

    codes[b] is the entry of the map nearest to (absmax[b] - offset) / nested_absmax[b / 256]; half-way cases take the
    even index. A zero group takes the code of 0.
    """
    offset = absmax.mean() if nested_offset is None else nested_offset
    if absmax.numel() == 0:
        offset = absmax.new_zeros(())
    quant_map = nested_quant_map(absmax.device)
    blocks = in_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = scale_to_unit(blocks, nested_absmax)
    middles = (quant_map[:-1] + quant_map[1:]) / 2
    index = torch.bucketize(scaled, middles)
    is_half_way = scaled == middles[index.clamp(max=254)]
    index = index + (is_half_way & (index % 2 == 1))
    index = torch.where(scaled.isnan(), 127, index)
    return index.reshape(-1)[: absmax.numel()].to(torch.uint8), nested_absmax, quant_map, offset


def dequantize_absmax(
    absmax_codes: Tensor, nested_absmax: Tensor, nested_quant_map: Tensor, nested_offset: Tensor
) -> Tensor:
    """float32 [n]: map[code] * nested_absmax[b / 256] + offset, product and sum rounded separately."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax_codes.numel()]
    return nested_quant_map[absmax_codes.long()] * scales + nested_offset.float()


def round_columns_nf4(
    values: Tensor, scales: Tensor, inverse: Tensor, coupling: Tensor, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Columns [num_columns, n] of a weight rounded in turn; every step is rounded to float32. A NaN takes the code of -1."""
    book, bounds = code_values("nf4", values.device), decision_thresholds("nf4", values.device)
    still_open = values.clone()
    rounded, change = torch.empty_like(values), torch.empty_like(values)
    for j in range(len(values)):
        code = (still_open[j] * inverse[j])[:, None].gt(bounds).sum(dim=1)
        rounded[j] = book[code] * scales[j]
        change[j] = (still_open if previous is None else previous)[j] - rounded[j]
        for later in range(j + 1, len(values)):
            product = coupling[j, later] * change[j]
            still_open[later] += product
    return rounded, change


def linear_4bit(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float64 x W^T + b of a dequantised weight [n, k]."""
    output = input.double() @ weight.double().T
    return output if bias is None else output + bias.double()


def linear_4bit_grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """float64 dy W of a dequantised weight [n, k]."""
    return grad_output.double() @ weight.double()


def lora_linear_4bit(
    input: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    adapter_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """float64 y = x W^T + bias + left B^T and left = scaling x' A^T [m, rank], x' = adapter_input or else x."""
    narrow = input if adapter_input is None else adapter_input
    left = scaling * narrow.double() @ a.double().T
    return linear_4bit(input, weight, bias) + left @ b.double().T, left.reshape(-1, a.shape[0])


def lora_linear_4bit_backward(
    grad_output: Tensor,
    adapter_input: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    is_separate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 gradients of that towards x, x', A and B; of x' zeros where it is x, whose gradient then has it all."""
    dy = grad_output.reshape(-1, grad_output.shape[-1]).double()
    narrow = adapter_input.reshape(-1, adapter_input.shape[-1]).double()
    grad_left = scaling * dy @ b.double()
    grad_input = linear_4bit_grad_input(grad_output, weight)
    update = (grad_left @ a.double()).view(grad_input.shape)
    grad_b = dy.T @ (scaling * narrow @ a.double().T)
    if is_separate:
        return grad_input, update, grad_left.T @ narrow, grad_b
    return grad_input + update, torch.zeros_like(update), grad_left.T @ narrow, grad_b


def embedding_4bit(indices: Tensor, weight: Tensor) -> Tensor:
    """Rows of a dequantised weight."""
    return weight[indices]
