"""Rounding to the NF4 code book at a given scale, where `ops.quantize_4bit` takes the scale from the values.

    code(w, s) = number of thresholds below w * (1 / s)        value(w, s) = book[code(w, s)] * s

With s = max |w| of a block the codes are exactly those of `ops.quantize_4bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import NF4_CODES, NF4_THRESHOLDS

_ZERO_CODE = NF4_CODES.index(0.0)


class Rounder:
    """The code book and its thresholds on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.book = torch.tensor(NF4_CODES, dtype=torch.float32, device=device)
        self.thresholds = torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=device)

    def codes(self, values: Tensor, inverse: Tensor) -> Tensor:
        """int32 codes of float32 `values` times `inverse`, which broadcasts. A NaN (0 times inf) takes the code of 0."""
        scaled = (values * inverse).contiguous()
        # bucketize puts NaN behind the last threshold.
        codes = torch.bucketize(scaled, self.thresholds, out_int32=True)
        return codes.masked_fill_(scaled.isnan(), _ZERO_CODE)

    def units(self, values: Tensor, scales: Tensor) -> Tensor:
        """The code book's values, float32, that `values` round to at `scales`, which broadcast."""
        return self.book[self.codes(values, scales.reciprocal())]


def pack(codes: Tensor) -> Tensor:
    """Codes of any shape, row by row -> uint8 [ceil(n / 2), 1]: even index in the high nibble, an odd count ends in 0's code."""
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), _ZERO_CODE)])
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)
