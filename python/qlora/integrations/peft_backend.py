"""The 4-bit weight for PEFT's tuners that reach it through a QuantizationBackend: OFT, BOFT, MiSS, SHiRA, VeRA."""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor

from ..nn.linear import Linear4bit
from .peft_weight import KeptWeight, dense_weight, set_dense_weight


class QloraBackend(QuantizationBackend):
    """Reads the weight dequantised and quantises what a merge writes, in the format it had.

    The weight from before the first merge is kept, so that undoing the last one gives it back bit for bit.
    """

    supports_merge = True
    backend_name = "qlora 4bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """[out, in] in the dtype it was quantised from."""
        return dense_weight(base_layer, base_layer.quantized_state().dtype)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Called by `merge` before, and by `unmerge` after, it changes the list of merged adapters."""
        base = peft_layer.get_base_layer()
        kept: KeptWeight | None = peft_layer.__dict__.get("_qlora_kept")
        if kept is not None and not peft_layer.merged_adapters:
            kept.put_back(base)
            del peft_layer._qlora_kept
            return
        if kept is None:
            kept = KeptWeight.of(base)
        set_dense_weight(base, weight_data)
        peft_layer._qlora_kept = kept


def backend_of(base_layer: Any) -> QloraBackend | None:
    return QloraBackend() if isinstance(base_layer, Linear4bit) else None
