"""Where a fake step's layer inputs go, and what its allocator says: stands for the GPU in `qlora.checkpointing`."""

from __future__ import annotations

import torch
from torch import Tensor

from .timeline import Timeline


class FakeCopies:
    """A host whose memory is not counted, and copies that take no time."""

    def send(self, value: Tensor) -> tuple[None, None]:
        return None, None

    def fetch(self, place: None, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, None]:
        return torch.empty(shape, dtype=dtype), None

    def wait(self, copy: None) -> None:
        pass

    def recycle(self, place: None) -> None:
        pass


class TimelineMeter:
    """What the allocator would say during the step that `timeline` watches.

    Args:
        beside: bytes that no timeline shows.
    """

    def __init__(self, beside: int) -> None:
        self.timeline = Timeline()
        self._beside = beside

    def held(self) -> int:
        return self.timeline.held + self._beside

    def peak(self) -> int:
        return self.timeline.highest + self._beside

    def restart(self) -> None:
        self.timeline.highest = self.timeline.held


def no_line(_: str) -> None:
    """For a plan that nobody is to be told of."""
