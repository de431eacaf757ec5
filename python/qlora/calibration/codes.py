"""Rounding to the NF4 code book at a given scale, where `ops.quantize_4bit` takes the scale from the values.

    code(w, s) = number of thresholds below w * (1 / s)        value(w, s) = book[code(w, s)] * s

With s = max |w| of a block the codes are exactly those of `ops.quantize_4bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import NF4_CODES, NF4_THRESHOLDS

_ZERO_CODE = NF4_CODES.index(0.0)


#: Cells into which the table cuts -1 to 1. No two thresholds are nearer than 0.08, so none shares a cell.
_NUM_CELLS = 64


class Rounder:
    """The code book and its thresholds on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.book = torch.tensor(NF4_CODES, dtype=torch.float32, device=device)
        self.thresholds = torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=device)
        # Of each cell the thresholds below it, and the one in it or a number that none exceeds.
        own = _cells(self.thresholds)
        cells = torch.arange(_NUM_CELLS + 1, device=device)
        self._below = (own < cells[:, None]).sum(dim=1, dtype=torch.int32)
        self._within = torch.full((_NUM_CELLS + 1,), 2.0, device=device)
        self._within[own.long()] = self.thresholds

    def codes(self, values: Tensor, inverse: Tensor) -> Tensor:
        """int32 codes of float32 `values` times `inverse`, which broadcasts. A NaN (0 times inf) takes the code of 0."""
        # 0 lies between the thresholds of its own code; beyond 1 either way is one code.
        scaled = (values * inverse).contiguous().nan_to_num_(0.0, 1.0, -1.0).clamp_(-1.0, 1.0)
        if scaled.is_cuda:  # the column loops wait for launches there, and these are fewer
            return torch.bucketize(scaled, self.thresholds, out_int32=True)
        # On a CPU the search takes ten times as long as looking the cell up. Cells ascend with the values, so a threshold
        # in a lower cell is a lower threshold, and one comparison settles the cell's own.
        cells = _cells(scaled).view(-1)
        codes = self._below.index_select(0, cells)
        codes += scaled.view(-1) > self._within.index_select(0, cells)
        return codes.view(scaled.shape)

    def rounded(self, values: Tensor, inverse: Tensor) -> Tensor:
        """The code book's values, float32, that `values` times `inverse` round to."""
        codes = self.codes(values, inverse)
        return self.book.index_select(0, codes.view(-1)).view(codes.shape)

    def units(self, values: Tensor, scales: Tensor) -> Tensor:
        """The code book's values, float32, that `values` round to at `scales`, which broadcast."""
        return self.rounded(values, scales.reciprocal())


def _cells(scaled: Tensor) -> Tensor:
    """int32 cell, 0 to _NUM_CELLS, of float32 values from -1 to 1."""
    return (scaled * (_NUM_CELLS / 2) + _NUM_CELLS / 2).to(torch.int32)


def pack(codes: Tensor) -> Tensor:
    """Codes of any shape, row by row -> uint8 [ceil(n / 2), 1]: even index in the high nibble, an odd count ends in 0's code."""
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), _ZERO_CODE)])
    return (flat[0::2] << 4 | flat[1::2]).unsqueeze(1)
