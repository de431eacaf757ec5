"""The constants of the 4-bit format, free of torch: code books, block sizes, the 8-bit map of double-quantised scales.

`cpp/core/format.h` holds the same constants for the kernels, `reference.py` its own copy as the oracle of the tests.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Values of the 16 codes, ascending: quantiles of the normal distribution.
NF4_CODES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: Where one NF4 code ends and the next begins: code c serves thresholds[c - 1] < x <= thresholds[c]. Each is a float32.
NF4_THRESHOLDS: tuple[float, ...] = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)
#: Values of the 16 codes: bit 3 is the sign, bits 0 to 2 choose a magnitude (not in ascending order).
FP4_CODES: tuple[float, ...] = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    -0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
CODES: dict[str, tuple[float, ...]] = {"nf4": NF4_CODES, "fp4": FP4_CODES}
QUANT_TYPES: tuple[str, ...] = tuple(CODES)

#: Values that may share one scale.
BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64
#: Scales that share one second-level scale.
NESTED_BLOCK_SIZE = 256


def num_packed_bytes(num_values: int) -> int:
    """Bytes of `num_values` 4-bit codes."""
    return (num_values + 1) // 2


def num_blocks(num_values: int, block_size: int) -> int:
    """Scales of `num_values` values."""
    return -(-num_values // block_size)


def num_nested_blocks(num_scales: int) -> int:
    """Second-level scales of `num_scales` double-quantised scales."""
    return -(-num_scales // NESTED_BLOCK_SIZE)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _nested_quant_map_values() -> tuple[float, ...]:
    """Decade e = 0..6 splits [0.1, 1] into 2^e intervals and takes +-(their midpoints) * 10^(e - 6); 0 and 1 complete it.
    The interval ends are those of a float32 linspace: one fused multiply-add from the nearer end. Every step is rounded to
    float32.
    """
    values = [0.0, 1.0]
    start, end = _float32(0.1), 1.0
    for decade in range(7):
        intervals = 2**decade
        step = _float32(_float32(end - start) / intervals)
        half = (intervals + 1) // 2
        ends = [start + step * i if i < half else end - step * (intervals - i) for i in range(intervals + 1)]
        power = _float32(10.0 ** (decade - 6))
        for low, high in pairwise(map(_float32, ends)):
            value = _float32(power * _float32(_float32(low + high) / 2))
            values += [value, -value]
    return tuple(sorted(values))


#: The 256 values of the 8-bit "dynamic" map of double-quantised scales, ascending, each exactly a float32.
NESTED_QUANT_MAP = _nested_quant_map_values()

_map_of_device: dict[torch.device, torch.Tensor] = {}


def nested_quant_map(device: torch.device | str) -> torch.Tensor:
    """The 8-bit map as a float32 [256] tensor on `device`. One tensor per device: clone it before writing to it."""
    import torch

    if torch.compiler.is_compiling():  # a constant of the graph: the cache must not see traced tensors
        return torch.tensor(NESTED_QUANT_MAP, dtype=torch.float32, device=device)
    device = torch.device(device)
    cached = _map_of_device.get(device)
    if cached is None:
        with torch.inference_mode(False):
            cached = torch.tensor(NESTED_QUANT_MAP, dtype=torch.float32, device=device)
        if type(cached) is torch.Tensor:  # not a fake tensor of a tracing mode
            _map_of_device[device] = cached
    return cached
