"""PEFT's initialisations that compute from the weight's values, over a 4-bit weight.

PEFT's own methods run, unchanged, against a float32 stand-in that holds the dequantised weight. Those that take the
adapter's first value off the weight (PiSSA, OLoRA, CorDA, LoRA-GA) leave a residual in it, which is then quantised
into the base layer with the block size, code and dtype it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .peft_weight import dense_weight, set_dense_weight, standing_in

# What PEFT's preprocessing leaves on a base layer for an initialisation to read and delete.
_PREPARED = ("eigens", "_peft_loraga_grad")


class DenseInits:
    """Mixed into a LoRA layer before PEFT's class."""

    def pissa_init(self, *args: Any) -> None:
        with self._dense_base("PiSSA", changes_weight=True):
            super().pissa_init(*args)  # type: ignore[misc]

    def olora_init(self, *args: Any) -> None:
        with self._dense_base("OLoRA", changes_weight=True):
            super().olora_init(*args)  # type: ignore[misc]

    def corda_init(self, *args: Any) -> None:
        with self._dense_base("CorDA", changes_weight=True):
            super().corda_init(*args)  # type: ignore[misc]

    def lora_ga_init(self, *args: Any) -> None:
        with self._dense_base("LoRA-GA", changes_weight=hasattr(self.get_base_layer(), "_peft_loraga_grad")):  # type: ignore[attr-defined]
            super().lora_ga_init(*args)  # type: ignore[misc]

    def mica_init(self, *args: Any) -> None:
        with self._dense_base("MiCA", changes_weight=False):
            super().mica_init(*args)  # type: ignore[misc]

    def orthogonal_init(self, *args: Any) -> None:
        with self._dense_base("orthogonal", changes_weight=False, values=False):
            super().orthogonal_init(*args)  # type: ignore[misc]

    def loftq_init(self, *args: Any) -> None:
        raise ValueError(
            "qlora: init_lora_weights: LoftQ fits the adapter to what quantising the weight lost, and a 4-bit layer no "
            "longer knows that: expected another initialisation, got 'loftq'. Create the adapter with the default one "
            "and call qlora.loftq_init(peft_model, CHECKPOINT) with the 16-bit checkpoint"
        )

    @contextmanager
    def _dense_base(self, init: str, *, changes_weight: bool, values: bool = True) -> Iterator[None]:
        base: Any = self.get_base_layer()  # type: ignore[attr-defined]
        if changes_weight and self.merged:  # type: ignore[attr-defined]
            raise ValueError(
                f"qlora: init_lora_weights: {init} changes the weight: expected no merged adapter; unmerge"
            )
        stand_in = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        if values:
            stand_in.weight = nn.Parameter(dense_weight(base, torch.float32), requires_grad=False)
        else:
            stand_in.weight = nn.Parameter(base.weight.new_empty(0, dtype=torch.float32), requires_grad=False)
        for name in _PREPARED:
            if hasattr(base, name):
                setattr(stand_in, name, getattr(base, name))
        with standing_in(self, stand_in):
            yield
        for name in _PREPARED:
            if hasattr(base, name) and not hasattr(stand_in, name):
                delattr(base, name)
        if changes_weight:
            set_dense_weight(base, stand_in.weight.data)
