"""LoRA over 4-bit layers: PEFT's own LoRA layers with the few methods replaced that read or write the weight.

Adapters' dtype. An adapter is created in float32 and stays so (PEFT casts to the base layer's dtype only where that
is a float; our weights are bytes). Whatever it is kept in, its products run in the dtype of the base layer's output,
under autocast in autocast's. So a bfloat16 model with float32 adapters computes in bfloat16 and steps in float32. The
operator that multiplies by weight and adapter (`lora_ops.py`) reads the matrices as they are, without copies of them.

Merging. `merge` quantises W + sum of all merged updates once, from the weight as it was before the first merge, and
keeps that weight: packed bytes and scales, 4.1 bits a value, on `kept_device`. `unmerge` puts it back bit for bit.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Embedding, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from .. import lora_ops
from ..nn import function
from ..nn.convert import dequantize_module, is_conv1d
from ..nn.embedding import Embedding4bit
from ..nn.linear import Linear4bit
from ..nn.module import has_hooks
from .peft_dora import Dora4bitVariant
from .peft_init import DenseInits
from .peft_weight import KeptWeight, set_dense_weight

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraVariant

__all__ = ["LoraEmbedding4bit", "LoraLinear4bit", "lora_class_of", "unloading_dense"]

#: Variants that leave the base weight alone or come here for it. Others write to `weight.data` as if it were values.
_VARIANTS = (
    "DoraLinearVariant",
    "ALoraLinearVariant",
    "ArrowLinearVariant",
    "MontecloraLinearVariant",
    "MiCALinearVariant",
)

_dense_dtype: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar(
    "qlora_dense_dtype", default=None
)


@contextmanager
def unloading_dense(dtype: torch.dtype) -> Iterator[None]:
    """While active, `merge_and_unload` returns ordinary layers of `dtype` in place of re-quantised ones."""
    token = _dense_dtype.set(dtype)
    try:
        yield
    finally:
        _dense_dtype.reset(token)


def lora_class_of(base: nn.Module) -> type | None:
    """The LoRA layer for a base layer, or None if it is not one of ours."""
    if isinstance(base, Linear4bit):
        return LoraLinear4bit
    if isinstance(base, Embedding4bit):
        return LoraEmbedding4bit
    return None


class _ExactMerge:
    """Merge and unmerge over a 4-bit weight, for the LoRA layers below."""

    #: Where the weight from before a merge is kept: "cpu" frees no accelerator memory for it and costs a copy of 4 bits
    #: a value each way; None keeps it on the weight's own device.
    kept_device: torch.device | str | None = "cpu"
    # A dataclass hides the parameter inside from nn.Module, which would register it.
    _kept: KeptWeight | None = None

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges the active or the named adapters into the 4-bit weight.

        Values are checked whatever `safe_merge` says: one NaN would spoil its block's scale and with double
        quantisation the whole layer. Nothing is changed unless everything is.

        Raises:
            ValueError: the merged weight or bias is not finite.
            RuntimeError: an adapter has a bias and the base layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._holds(name)]
        if not names:
            return
        base = self.get_base_layer()
        # On the weight's device: a move to kept_device comes after the merge succeeded.
        kept = self._kept or KeptWeight.of(base)
        merged = [*self.merged_adapters, *names]
        weight, bias = self._merged(kept, merged)
        set_dense_weight(base, weight)
        if bias is not None:
            base.bias.data.copy_(bias)
        self._kept = kept.on(self.kept_device)
        self.merged_adapters = merged

    def unmerge(self: Any) -> None:
        """Puts back the weight and bias from before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._kept.put_back(self.get_base_layer())
        self._kept = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer for `unload` and `merge_and_unload`; an ordinary one within `unloading_dense`."""
        base = self.get_base_layer()
        dtype = _dense_dtype.get() if merge else None
        if dtype is None:
            if merge:
                self.merge(safe_merge, adapter_names)
            return base
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._holds(name)]
        weight, bias = self._merged(self._kept or KeptWeight.of(base), [*self.merged_adapters, *names])
        layer = dequantize_module(base, dtype)
        values = weight.t().contiguous() if is_conv1d(layer) else weight
        layer.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return layer

    @torch.no_grad()
    def _merged(self: Any, kept: KeptWeight, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The kept weight, float32, with the adapters `names` in it, and the bias if they change it."""
        base = self.get_base_layer()
        original = kept.dense(base.weight.device)
        weight, bias = original.clone(), None
        for name in names:
            weight = self._with_update(weight, name, original)
            if self.lora_bias.get(name):
                if kept.bias is None:
                    raise RuntimeError(
                        f"qlora: cannot merge adapter {name!r}: it has a bias (lora_bias=True), the base layer has none"
                    )
                bias = kept.bias.float() if bias is None else bias
                bias = bias + self.scaling[name] * self.lora_B[name].bias.float()
            if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
                raise ValueError(
                    f"qlora: cannot merge adapter {name!r}: expected finite values, got NaN or Inf"
                )
        return weight, bias

    def _with_update(self: Any, weight: Tensor, name: str, original: Tensor) -> Tensor:
        """The float32 weight with one more adapter, as forward adds it; `original` is the weight without any."""
        variant = self.lora_variant.get(name)
        if isinstance(variant, Dora4bitVariant):
            return variant.merged(self, name, weight, original)
        if variant is not None:
            return variant.merge_safe(self, name, weight)
        return weight.add_(self._low_rank_product(name), alpha=float(self.scaling[name]))


class LoraLinear4bit(_ExactMerge, DenseInits, Linear):
    """peft.tuners.lora.Linear over a Linear4bit."""

    @property
    def fan_in_fan_out(self) -> bool:
        """The weight is [out, in], also where it was a Conv1D's."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant | None:
        variant = super().resolve_lora_variant(**kwargs)
        if variant is None:
            return None
        name = type(variant).__name__
        if name == "DoraLinearVariant":
            return Dora4bitVariant()
        if name not in _VARIANTS:
            raise ValueError(
                f"qlora: {name} changes or reads the values of the weight: expected a 16-bit layer, got 4-bit"
            )
        return variant

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling B A: [out, in] in the adapter's dtype, the product in float32."""
        product = self._low_rank_product(adapter) * self.scaling[adapter]
        return product.to(self.lora_B[adapter].weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        for_variants = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **for_variants, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not args and not kwargs and self._is_plain(names):
            fused = self._fused(x, names)
            rest = [name for name in names if name not in fused]
            rows = x.reshape(-1, x.shape[-1]) if rest else x
            result = self._multiplied(rows, fused) if fused else self.base_layer(rows)
            for name in rest:
                result = self._add_update(result, rows, name)
            return result.view(*x.shape[:-1], result.shape[-1]) if rest else result
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = self._add_by_modules(result, x, name, for_variants | kwargs)
        return result.to(dtype)

    def _is_plain(self, names: list[str]) -> bool:
        """Whether nobody watches or wraps the parts that the fast path does not call as modules."""
        if has_hooks(self.base_layer):
            return False
        for name in names:
            for part in (self.lora_A[name], self.lora_B[name]):
                if type(part) is not nn.Linear or has_hooks(part) or "forward" in part.__dict__:
                    return False
            if has_hooks(self.lora_dropout[name]):
                return False
            if name in self.lora_variant:
                return False
        return True

    def _fused(self, x: Tensor, names: list[str]) -> list[str]:
        """The adapters that one call with the base layer serves: all that read x itself, or else the first of the rest.

        They and the base layer multiply in the same dtype.
        """
        base: Any = self.base_layer
        if type(base).forward is not Linear4bit.forward or "forward" in base.__dict__:
            return []
        compute_dtype, result_dtype = base.dtypes(x)
        if not compute_dtype == result_dtype == _product_dtype(x):
            return []
        served = [
            name
            for name in names
            if not isinstance(self.scaling[name], Tensor) and self.lora_B[name].bias is None
        ]
        undropped = [name for name in served if not self._drops(name)]
        rank = sum(self._matrices(name)[0].shape[0] for name in undropped)
        return undropped if undropped and rank <= lora_ops.MAX_RANK else served[:1]

    def _drops(self, name: str) -> bool:
        dropout: Any = self.lora_dropout[name]
        return not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0

    def _multiplied(self, x: Tensor, names: list[str]) -> Tensor:
        """The base layer's result with the updates of these adapters, in one call; `_fused` says which it may be."""
        base: Any = self.base_layer
        first = names[0]
        a, b = self._matrices(first)
        scaling = self.scaling[first]
        if len(names) > 1:
            matrices = [self._matrices(name) for name in names]
            a = torch.cat([a for a, _ in matrices])
            scaled = [b * self.scaling[name] for name, (_, b) in zip(names, matrices, strict=True)]
            b, scaling = torch.cat(scaled, dim=1), 1.0
        dropped = self.lora_dropout[first](x) if self._drops(first) else None
        result: Tensor = base.forward_with_lora(x, a, b, scaling, dropped)
        return result

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return a, b

    def _add_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        """result + the adapter's update, in place where the dtypes allow: [rows, n] and [rows, k]."""
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name]
        dtype = _product_dtype(result)
        x = self.lora_dropout[name](x).to(dtype)
        scaling = self.scaling[name]
        if dtype == result.dtype:
            low = F.linear(x, a.to(dtype))
            if isinstance(scaling, Tensor):  # after peft's prepare_model_for_compiled_hotswap
                low, scaling = low * scaling.to(low.dtype), 1.0
            result = function.add_low_rank(result, low, b.weight.to(dtype), scaling)
        else:
            result = result + (F.linear(F.linear(x, a.to(dtype)), b.weight.to(dtype)) * scaling).to(
                result.dtype
            )
        if b.bias is not None:
            result = result + (b.bias * scaling).to(result.dtype)
        return result

    def _add_by_modules(self, result: Tensor, x: Tensor, name: str, kwargs: dict[str, Any]) -> Tensor:
        """The same by calling the adapter's modules, or by its variant."""
        variant = self.lora_variant.get(name)
        if isinstance(variant, Dora4bitVariant):
            return variant.forward(self, active_adapter=name, x=x, result=result, **kwargs)
        a: Any = self.lora_A[name]
        x = self._cast_input_dtype(x, a.weight.dtype)
        if variant is not None:
            return variant.forward(self, active_adapter=name, x=x, result=result, **kwargs)
        update = self.lora_B[name](a(self.lora_dropout[name](x))) * self.scaling[name]
        return result + update.to(result.dtype)

    def _holds(self, name: str) -> bool:
        return name in self.lora_A

    def _low_rank_product(self, name: str) -> Tensor:
        """B A: float32 [out, in]."""
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        product: Tensor = b.weight.float() @ a.weight.float()
        return product


class LoraEmbedding4bit(_ExactMerge, Embedding):
    """peft.tuners.lora.Embedding over an Embedding4bit. Plain LoRA only."""

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant | None:
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            name = type(variant).__name__
            raise ValueError(
                f"qlora: {name}: expected a 16-bit embedding, got a 4-bit one; use plain LoRA on it"
            )
        return None

    def _holds(self, name: str) -> bool:
        return name in self.lora_embedding_A

    def _low_rank_product(self, name: str) -> Tensor:
        """(B A)^T: float32 [num_embeddings, embedding_dim]."""
        return (self.lora_embedding_B[name].float() @ self.lora_embedding_A[name].float()).t()


def _product_dtype(result: Tensor) -> torch.dtype:
    kind = result.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else result.dtype
