"""DoRA over a 4-bit weight, without its dense form in any forward pass.

With n_i = |row i of (W + s B A)|, a constant for the gradient (section 4.3 of the DoRA paper), and magnitudes m:

    y = m / n * (W x + s B A x) + bias

    n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B A A^T) * B)

|W|^2 depends on the frozen weight only and is kept; W A^T is the linear layer applied to the r rows of A. PEFT's own
DoRA dequantises W, and multiplies A and B out with an identity of in_features, in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from ..nn.module import Module4bit
from .peft_weight import base_product, dense_weight


def row_norms(weight: Tensor) -> Tensor:
    """float32 [rows] of a float32 [rows, cols]."""
    return torch.linalg.vector_norm(weight, dim=1)


class Dora4bitLayer(DoraLinearLayer):
    """The magnitudes, float32 [out], under the name PEFT saves them by."""

    def __init__(self, magnitudes: Tensor) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = nn.Parameter(magnitudes, requires_grad=True)
        self._base_norms: tuple[Any, Tensor] | None = None

    def base_norms(self, base: Module4bit) -> Tensor:
        """|W| by rows, float32 [out], computed again only where the packed bytes are others than last time."""
        weight = base.weight
        key = (weight.data_ptr(), weight._version, weight.device)
        if self._base_norms is None or self._base_norms[0] != key:
            self._base_norms = (key, row_norms(dense_weight(base)))
        return self._base_norms[1]

    @torch.no_grad()
    def update_norms(self, base: Module4bit, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """n, float32 [out]; a [r, in] and b [out, r] in the dtype the products run in."""
        cross = base_product(base, a).float()  # [r, out]
        a, b = a.float(), b.float()
        square = self.base_norms(base).square()
        square = square + 2 * scaling * (b * cross.t()).sum(1) + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        return square.clamp_min_(0.0).sqrt_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Dora4bitLayer:
        new = Dora4bitLayer(self.weight.detach().clone())
        new.weight.requires_grad_(self.weight.requires_grad)
        new.train(self.training)
        memo[id(self)] = new
        return new


class Dora4bitVariant(LoraVariant):
    """What PEFT's DoraLinearVariant is to a 16-bit layer."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        with torch.no_grad():
            if a.is_meta:  # a checkpoint fills it in
                magnitudes = torch.empty(module.out_features, dtype=torch.float32, device="meta")
            else:
                update = module.scaling[adapter_name] * (b.float() @ a.float())
                magnitudes = row_norms(dense_weight(module.get_base_layer()) + update)
        module.lora_magnitude_vector[adapter_name] = Dora4bitLayer(magnitudes)

    @staticmethod
    def merged(module: Any, adapter_name: str, weight: Tensor, original: Tensor) -> Tensor:
        """m / n * (W + s B A) of a float32 W, with n of the weight that no adapter is merged into."""
        update = module._low_rank_product(adapter_name) * module.scaling[adapter_name]
        magnitudes = module.lora_magnitude_vector[adapter_name].weight.float()
        return (weight + update) * (magnitudes / row_norms(original + update))[:, None]

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else result.dtype
        base = module.get_base_layer()
        dora = module.lora_magnitude_vector[active_adapter]
        scaling = module.scaling[active_adapter]
        a, b = (getattr(module, part)[active_adapter].weight.to(dtype) for part in ("lora_A", "lora_B"))
        factor = dora.weight.float() / dora.update_norms(base, a.detach(), b.detach(), scaling)

        dropout = module.lora_dropout[active_adapter]
        x = x.to(dtype)
        if module.training and not isinstance(dropout, nn.Identity):
            # As in the paper's code, the dropped-out input goes through W too for what the factor changes.
            x = dropout(x)
            product = base_product(base, x)
        else:
            product = result if base.bias is None else result - base.bias.to(result.dtype)
        update = nn.functional.linear(nn.functional.linear(x, a), b) * scaling
        changed = (factor - 1).to(dtype) * product.to(dtype) + factor.to(dtype) * update
        return result + changed.to(result.dtype)
