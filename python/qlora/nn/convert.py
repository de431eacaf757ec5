"""quantize_ and dequantize_: a model's linear layers to 4 bits and back, in place, one layer at a time."""

from __future__ import annotations

import fnmatch
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..config import QuantConfig
from .embedding import Embedding4bit
from .group import link_groups
from .linear import Linear4bit
from .module import Module4bit
from .report import KEPT_ATTRIBUTE, Report, format_bytes, report

logger = logging.getLogger("qlora")

#: Last components of names that output heads go by in models that cannot be asked for theirs.
HEAD_NAMES = ("lm_head", "embed_out", "output_projection", "head", "classifier", "score", "qa_outputs")

#: Called with (model, config) after quantize_: hosts note on their models what happened.
after_quantize: list[Callable[[torch.nn.Module, QuantConfig], None]] = []
#: Called with (model) after dequantize_.
after_dequantize: list[Callable[[torch.nn.Module], None]] = []


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, which stores its weight as [in, out]."""
    return is_conv1d_class(type(module))


def is_conv1d_class(cls: type | None) -> bool:
    return cls is not None and cls.__name__ == "Conv1D" and not issubclass(cls, torch.nn.Linear)


def is_convertible(module: torch.nn.Module, config: QuantConfig) -> bool:
    """Whether quantize_ has a 4-bit form of this module. Subclasses of nn.Linear may do anything with their weight."""
    if type(module) is torch.nn.Linear or is_conv1d(module):
        return True
    return config.quantize_embeddings and is_plain_embedding(module)


def is_plain_embedding(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Embedding and module.max_norm is None


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that a module's dotted name matches (see QuantConfig.skip_modules), or None."""
    for pattern in patterns:
        if any(char in pattern for char in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return pattern
        elif f".{pattern}." in f".{name}." and (
            name == pattern or name.startswith(f"{pattern}.") or name.endswith(f".{pattern}")
        ):
            return pattern
    return None


def tied_modules(model: torch.nn.Module) -> dict[str, str]:
    """Names of modules whose weight is also another module's, each with that other's name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(name)
    result = {}
    for names in owners.values():
        if len(names) > 1:
            result.update({name: next(other for other in names if other != name) for name in names})
    # On the meta device transformers has not tied them yet, but says what it will tie.
    for pair in dict(getattr(model, "all_tied_weights_keys", {})).items():
        target, source = (key.removesuffix(".weight") for key in pair)
        result.setdefault(target, source)
        result.setdefault(source, target)
    return result


def head_modules(model: torch.nn.Module) -> set[str]:
    """Names of the output heads."""
    asked = None
    if hasattr(model, "get_output_embeddings"):
        try:
            asked = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            asked = None
    return {
        name
        for name, module in model.named_modules()
        if module is asked
        or (name and name.rpartition(".")[2] in HEAD_NAMES and type(module) is torch.nn.Linear)
    }


def vision_towers(model: torch.nn.Module) -> list[str]:
    """Names of the modules of a transformers model that its `config.vision_config` describes; not of the model itself."""
    config: Any = getattr(getattr(model, "config", None), "vision_config", None)
    if config is None:
        return []
    return [
        name
        for name, module in model.named_modules()
        if name and type(getattr(module, "config", None)) is type(config)
    ]


def keep_reasons(model: torch.nn.Module, config: QuantConfig) -> dict[str, str]:
    """Name -> reason of each linear layer or embedding that stays as it is under `config`."""
    tied = tied_modules(model)
    heads = head_modules(model)
    vision = () if config.quantize_vision else tuple(f"{name}." for name in vision_towers(model))
    in_float32 = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    in_float32 += list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    reasons = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) or is_conv1d(module)
        if isinstance(module, Module4bit) or not (is_linear or isinstance(module, torch.nn.Embedding)):
            continue
        pattern = matches(name, config.skip_modules or ())
        if pattern is not None:
            reasons[name] = f"skip_modules ({pattern})"
        elif name in tied:
            reasons[name] = f"tied to {tied[name]}"
        elif name in heads and not config.quantize_head:
            reasons[name] = "output head"
        elif name.startswith(vision):
            reasons[name] = "vision tower"
        elif matches(name, in_float32) is not None:
            reasons[name] = "kept in float32 by the model"
        elif not is_convertible(module, config):
            embedding = isinstance(module, torch.nn.Embedding)
            reasons[name] = (
                "embedding" if embedding else f"{type(module).__name__} is a subclass of nn.Linear"
            )
    return reasons


def empty_module_like(
    module: Any, config: QuantConfig, compute_dtype: torch.dtype | None
) -> Linear4bit | Embedding4bit:
    """The 4-bit form of a module with its weight, not yet quantised, on the meta device; its bias is the module's."""
    kwargs: dict[str, Any] = {
        "quant_type": config.quant_type,
        "quant_storage": config.torch_quant_storage,
        "compress_statistics": config.double_quant,
        "block_size": config.block_size,
        "device": "meta",
        "dtype": module.weight.dtype,
    }
    new: Linear4bit | Embedding4bit
    if isinstance(module, torch.nn.Embedding):
        new = Embedding4bit(module.num_embeddings, module.embedding_dim, **kwargs)
        new.padding_idx = module.padding_idx
    else:
        rows, cols = module.weight.shape if not is_conv1d(module) else module.weight.T.shape
        has_bias = module.bias is not None
        new = Linear4bit(cols, rows, has_bias, compute_dtype, **kwargs)
        if has_bias:
            new.bias = module.bias
    new.source_cls = type(module)  # Conv1D comes back as Conv1D
    new.train(module.training)
    new.weight.requires_grad_(False)
    return new


def quantize_module(
    module: Any,
    config: QuantConfig,
    *,
    name: str,
    device: torch.device | str | int | None = None,
) -> Linear4bit | Embedding4bit:
    """A 4-bit layer with the weight of a linear layer or embedding, quantised on `device` or where it is."""
    weight = module.weight
    target = weight.device if device is None else torch.empty(0, device=device).device
    new = empty_module_like(module, config, config.resolve_compute_dtype(target))
    new.layer_name = name
    if weight.device.type == "meta":
        return new
    value = weight.detach()
    fresh = new._fresh_weight(value.T if is_conv1d(module) else value)
    fresh.quantize_on(target, name=new.describe(), check=True)
    new.weight = fresh
    if new._parameters.get("bias") is not None:
        bias: Any = module.bias
        new.bias = torch.nn.Parameter(bias.detach().to(target), requires_grad=bias.requires_grad)
    return new


def quantize_(
    model: torch.nn.Module,
    config: QuantConfig | None = None,
    *,
    device: torch.device | str | int | None = None,
) -> torch.nn.Module:
    """Stores the linear layers of any model in 4 bits, in place, and returns it.

    One layer at a time: at most one 16-bit weight exists beside the 4-bit model, on the device too. The output head,
    tied weights and `config.skip_modules` stay as they are; `qlora.report(model)` lists them. A layer on the meta
    device becomes an empty 4-bit layer, to be filled by `load_state_dict`.

    Args:
        model: the model; where it is itself a linear layer, the 4-bit layer is returned instead.
        config: QuantConfig() if None.
        device: where to quantise and leave the model; None: each layer where it is.

    Raises:
        TypeError: config is no QuantConfig.
        ValueError: a weight holds NaN or Inf (the layer is named and it and the later ones are left as they are), or
            does not fill whole items of quant_storage; or config.calibration is not None.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise TypeError(f"qlora.quantize_: config: expected a QuantConfig, got {type(config).__name__}")
    if config.calibration is not None:
        raise ValueError(
            "qlora.quantize_: config.calibration: expected None, got a Calibration: from_pretrained takes it, and "
            "qlora.calibration.calibrate_ fits a model to tokens"
        )
    if is_convertible(model, config):
        return quantize_module(model, config, name="the layer", device=device)
    reasons = keep_reasons(model, config)
    targets = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name not in reasons and is_convertible(module, config)
    ]
    converted: dict[int, torch.nn.Module] = {}
    # Taken from the end, so that each old module is freed once its last name is replaced.
    while targets:
        name, module = targets.pop()
        new = converted.get(id(module))
        if new is None:
            new = quantize_module(module, config, name=name, device=device)
            if sum(other is module for _, other in targets):
                converted[id(module)] = new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        del module
    if device is not None:
        model.to(device)
    setattr(model, KEPT_ATTRIBUTE, reasons)
    link_groups(model)
    for callback in after_quantize:
        callback(model, config)
    found = report(model)
    logger.info(found.summary())
    warn_of_experts(found)
    return model


def warn_of_experts(found: Report) -> None:
    """Says loudly where the bulk of a mixture-of-experts model is not in 4 bits."""
    if not found.experts:
        return
    size = sum(item.num_bytes for item in found.experts)
    names = ", ".join(item.name for item in found.experts[:2])
    logger.warning(
        "qlora: %s of expert weights are NOT quantised: they are 3-D parameters, not linear layers (%d tensors: %s%s). "
        "Expect the memory of a 16-bit model for them.",
        *(format_bytes(size), len(found.experts), names, ", ..." if len(found.experts) > 2 else ""),
    )


@torch.no_grad()
def dequantize_module(module: Module4bit, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The ordinary layer (nn.Linear, nn.Embedding or Conv1D) with the dequantised weight, on the same device."""
    value = module.dequantize(dtype)
    new: torch.nn.Module
    source: Any = getattr(module, "source_cls", None)
    with torch.device("meta"):
        if isinstance(module, Embedding4bit):
            new = torch.nn.Embedding(
                module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx
            )
        elif is_conv1d_class(source):
            new = source(module.out_features, module.in_features)
            value = value.T.contiguous()
        else:
            assert isinstance(module, Linear4bit)
            new = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    new.weight = torch.nn.Parameter(value, requires_grad=False)
    bias: Tensor | None = module._parameters.get("bias")
    if bias is not None:
        new.bias = (
            bias if dtype is None else torch.nn.Parameter(bias.to(dtype), requires_grad=bias.requires_grad)
        )
    new.train(module.training)
    return new


def dequantize_(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Turns the 4-bit layers of a model back into ordinary ones, in place, and returns it.

    Args:
        model: the model; where it is itself a 4-bit layer, the ordinary layer is returned instead.
        dtype: dtype of the weights; None: that which each was quantised from.
    """
    if isinstance(model, Module4bit):
        return dequantize_module(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, Module4bit):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dequantize_module(module, dtype))
    if hasattr(model, KEPT_ATTRIBUTE):
        delattr(model, KEPT_ATTRIBUTE)
    for callback in after_dequantize:
        callback(model)
    return model
