"""transformers: our quantizer behind QuantConfig, BitsAndBytesConfig(load_in_4bit=True) and 4-bit checkpoints."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available  # type: ignore[attr-defined]
from transformers.utils.quantization_config import BitsAndBytesConfig

from ..config import QuantConfig
from ..nn import convert
from ..nn.module import Module4bit
from ..nn.report import KEPT_ATTRIBUTE
from . import is_installed, run_postponed
from .transformers_quantizer import QloraHfQuantizer, from_bitsandbytes
from .transformers_save import save_model

__all__ = ["QloraHfQuantizer", "enable", "patch_models", "register", "save_model"]

_METHOD_4BIT = "bitsandbytes_4bit"


def register(host: ModuleType | None = None) -> None:  # noqa: ARG001  the post-import hook passes it
    """Makes QuantConfig known to transformers, and 4-bit configurations ours where bitsandbytes is not installed."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZER_MAPPING[QuantConfig.quant_method] = QloraHfQuantizer
    if not is_installed("bitsandbytes"):
        auto.AUTO_QUANTIZER_MAPPING[_METHOD_4BIT] = QloraHfQuantizer
    _patch_merge(auto.AutoHfQuantizer)
    if _note_on_model not in convert.after_quantize:
        convert.after_quantize.append(_note_on_model)
        convert.after_dequantize.append(_clear_model)


def _patch_merge(owner: Any) -> None:
    """Lets QuantConfig be passed for a 4-bit checkpoint: its format rules, compute_dtype is the user's."""
    original = owner.merge_quantization_configs
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def merge(_: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not isinstance(given, QuantConfig):
            return original(quantization_config, given)
        merged = original(quantization_config, None)
        if not isinstance(merged, BitsAndBytesConfig) or not merged.load_in_4bit:
            raise ValueError(
                f"qlora: quantization_config: expected a 16-bit or 4-bit bitsandbytes checkpoint for a QuantConfig, got "
                f"one of {getattr(merged, 'quant_method', merged)}"
            )
        if given.calibration is not None:
            raise ValueError(
                "qlora: quantization_config: expected a 16-bit checkpoint for a calibration, got a 4-bit one"
            )
        stored = from_bitsandbytes(merged)
        stored.skip_modules = merged.llm_int8_skip_modules
        if given.compute_dtype != "auto":
            stored.compute_dtype = given.compute_dtype
        return stored

    merge.__qlora__ = True  # type: ignore[attr-defined]
    owner.merge_quantization_configs = classmethod(merge)


def enable() -> None:
    """Route every 4-bit load here (see `qlora.enable`)."""
    from transformers.quantizers import auto

    register()
    auto.AUTO_QUANTIZER_MAPPING[_METHOD_4BIT] = QloraHfQuantizer
    from transformers import PreTrainedModel

    _patch_from_pretrained(PreTrainedModel)


def _patch_from_pretrained(owner: Any) -> None:
    original = owner.__dict__["from_pretrained"].__func__
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, load_in_4bit: bool | None = None, **kwargs: Any) -> Any:
        if load_in_4bit:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    "qlora: load_in_4bit: expected either load_in_4bit=True or quantization_config, got both; "
                    "put all settings into the quantization_config"
                )
            given = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("bnb_4bit_")}
            kwargs["quantization_config"] = QuantConfig.from_dict(given)
        return original(cls, *args, **kwargs)

    from_pretrained.__qlora__ = True  # type: ignore[attr-defined]
    owner.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]


def patch_models(host: ModuleType) -> None:
    """Makes `model.num_parameters()` count the weights, not the packed bytes; without bitsandbytes."""
    owner = host.ModuleUtilsMixin
    original = owner.num_parameters
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        packed = [module for module in self.modules() if isinstance(module, Module4bit)]
        if not packed:
            return original(self, only_trainable, exclude_embeddings)
        total = 0
        seen: set[int] = set()
        for module in self.modules():
            skipped = exclude_embeddings and isinstance(module, torch.nn.Embedding)
            for name, param in module._parameters.items():
                if param is None or id(param) in seen or (only_trainable and not param.requires_grad):
                    continue
                seen.add(id(param))
                if skipped and name == "weight":
                    continue
                if isinstance(module, Module4bit) and name == "weight":
                    rows, cols = module.weight_shape()
                    total += rows * cols
                else:
                    total += param.numel()
        return total

    num_parameters.__qlora__ = True  # type: ignore[attr-defined]
    owner.num_parameters = num_parameters


def _note_on_model(model: Any, config: QuantConfig) -> None:
    """After `qlora.quantize_` on a transformers model: what makes save_pretrained write a loadable checkpoint."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    host: Any = model
    quantizer = QloraHfQuantizer(config, pre_quantized=False)
    if config.compute_dtype == "auto":
        dtypes = {module.compute_dtype for module in host.modules() if hasattr(module, "compute_dtype")} - {
            None
        }
        quantizer.quantization_config.bnb_4bit_compute_dtype = next(iter(dtypes), None) or host.dtype
    reasons = getattr(host, KEPT_ATTRIBUTE)
    quantizer.quantization_config.llm_int8_skip_modules = quantizer.skip_list(host, reasons)
    host.hf_quantizer = quantizer
    host.is_quantized = True
    host.quantization_method = quantizer.quantization_config.quant_method
    host.config.quantization_config = quantizer.quantization_config
    host.config._is_quantized = True
    if is_bitsandbytes_available():
        host.is_loaded_in_4bit = True


def _clear_model(model: Any) -> None:
    """After `dequantize_`: the opposite."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QloraHfQuantizer):
        return
    quantizer.remove_quantization_config(model)
    model.config._is_quantized = False
    if "is_loaded_in_4bit" in model.__dict__:
        del model.is_loaded_in_4bit


run_postponed()
