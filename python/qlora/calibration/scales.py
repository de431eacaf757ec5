"""The scale of each block by the error it causes in the layer's output, among those that can be stored.

For a block w with importances h the scale minimises

    error(s) = sum_j h_j (w_j - s c_j)^2        c = the code book's values that w / s rounds to

A grid of fractions of max |w| finds the valley, and least squares its floor: s = sum h w c / sum h c^2 for fixed codes.
Double-quantised scales are offset + nested_absmax[b / 256] map[q]: offset and nested_absmax are set from the best free
scales, then every block takes the best of the q around its free scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..format import NESTED_BLOCK_SIZE
from .codes import Rounder

#: Candidates as fractions of max |w|. Below 0.6 clipping costs more than finer steps gain; above 1.1 codes are wasted.
GRID = tuple(0.60 + 0.05 * step for step in range(11))
_LEAST_SQUARES_STEPS = 3
#: Stored scales tried on either side of the one nearest to the free scale.
_NEIGHBOURS = 2


def block_error(
    rounder: Rounder, blocks: Tensor, importance: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Error of each block [num_blocks, block_size] at its scale [num_blocks], and the code book's values it rounds to."""
    units = rounder.units(blocks, scales[:, None])
    return (importance * (blocks - scales[:, None] * units).square()).sum(dim=1), units


def free_scales(rounder: Rounder, blocks: Tensor, importance: Tensor) -> Tensor:
    """The best float32 scale found for each block: never worse than max |w|, which is tried first."""
    absmax = blocks.abs().amax(dim=1)
    best = absmax.clone()
    least, _ = block_error(rounder, blocks, importance, best)
    for fraction in GRID:
        scales = absmax * fraction
        error, _ = block_error(rounder, blocks, importance, scales)
        better = error < least
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    for _ in range(_LEAST_SQUARES_STEPS):
        _, units = block_error(rounder, blocks, importance, best)
        below = (importance * units.square()).sum(dim=1)
        scales = (importance * blocks * units).sum(dim=1) / below
        error, _ = block_error(rounder, blocks, importance, scales)
        better = (error < least) & (scales > 0)  # a NaN of 0 / 0 is not better
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    return best


class Scales:
    """float32 scales, or their double-quantised form; `codes` is what is stored of each block.

    Attributes:
        codes: uint8 [num_blocks], or float32 [num_blocks] where they are plain: a plain scale is its own code.
        nested_absmax, offset: float32 [ceil(num_blocks / 256)] and [], or None where they are plain.
    """

    def __init__(self, scales: Tensor, *, double_quant: bool) -> None:
        self.codes = scales
        self.nested_absmax: Tensor | None = None
        self.offset: Tensor | None = None
        self.nested_map: Tensor | None = None
        if double_quant:
            self.codes, self.nested_absmax, self.nested_map, self.offset = ops.quantize_absmax(scales)
            self._middles = (self.nested_map[1:] + self.nested_map[:-1]) / 2
        self._all = torch.arange(scales.numel(), device=scales.device)

    def values(self, codes: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """float32 scales of `codes` for the blocks `index`, as every reader computes them; all that are stored if None."""
        codes = self.codes if codes is None else codes
        if self.nested_absmax is None or self.offset is None or self.nested_map is None:
            return codes
        index = self._all if index is None else index
        return self.nested_map[codes.long()] * self.nested_absmax[index // NESTED_BLOCK_SIZE] + self.offset

    def nearest(self, wanted: Tensor, index: Tensor) -> Tensor:
        """The codes of the blocks `index` whose scales are nearest to float32 `wanted`."""
        if self.nested_absmax is None or self.offset is None:
            return wanted
        relative = (wanted - self.offset) / self.nested_absmax[index // NESTED_BLOCK_SIZE]
        return torch.bucketize(relative.nan_to_num(0.0), self._middles).to(torch.uint8)

    def take_best(self, rounder: Rounder, blocks: Tensor, importance: Tensor) -> None:
        """Gives every block the best of the scales around its stored one."""
        if self.nested_absmax is None:
            return
        stored = self.codes.int()
        least = torch.full_like(blocks[:, 0], float("inf"))
        # The stored one comes first, and stays where no other is better.
        for distance in sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs):
            codes = (stored + distance).clamp(0, 255).to(torch.uint8)
            scales = self.values(codes)
            error, _ = block_error(rounder, blocks, importance, scales)
            better = error < least
            self.codes = torch.where(better, codes, self.codes)
            least = torch.where(better, error, least)
