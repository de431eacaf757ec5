"""Makes PEFT put our LoRA layer over our 4-bit layers, whoever creates the adapter, and lets its other tuners merge.

All of PEFT's ways to an adapter (get_peft_model, PeftModel.from_pretrained, load_adapter, add_adapter, transformers'
add_adapter, inject_adapter_in_model, X-LoRA) meet in `LoraModel._create_new_module`, which asks one dispatcher after
the other for a layer. `install` goes before them. The documented alternative, `LoraConfig._register_custom_module`, is
not saved with the adapter and would have to be repeated by the user on every load. A mapping that the user registered
there still comes first.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def install(lora_model: ModuleType) -> None:
    """Wraps `LoraModel._create_new_module` of peft.tuners.lora.model, once; called when that has been imported.

    Nothing of peft is imported here, which is in the middle of its own import then.
    """
    owner = lora_model.LoraModel
    original = owner._create_new_module
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        layer = _our_layer(lora_config, target)
        if layer is None:
            return original(lora_config, adapter_name, target, **kwargs)
        return _create(layer, lora_config, adapter_name, target, kwargs)

    create_new_module.__qlora__ = True  # type: ignore[attr-defined]
    owner._create_new_module = staticmethod(create_new_module)


def install_loftq(loftq_utils: ModuleType) -> None:
    """Makes `peft.replace_lora_weights_loftq`, which knows bitsandbytes' layers only, serve ours."""
    original = loftq_utils.replace_lora_weights_loftq
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def replace_lora_weights_loftq(
        peft_model: Any, model_path: str | None = None, adapter_name: str = "default", callback: Any = None
    ) -> None:
        from .peft import LoraLinear4bit

        if not any(isinstance(module, LoraLinear4bit) for module in peft_model.modules()):
            original(peft_model, model_path, adapter_name, callback)
            return
        from ..loftq import PREFIX, loftq_init

        path = Path(peft_model.base_model.config._name_or_path if model_path is None else model_path)
        if path.name == "model.safetensors":  # PEFT takes the file as well as its directory
            path = path.parent
        keep = callback and (lambda model, name: callback(model, name.removeprefix(PREFIX)))
        loftq_init(peft_model, path, adapter_name, keep=keep)

    _replace_in_peft(original, replace_lora_weights_loftq)


def install_backend(quantization_utils: ModuleType) -> None:
    """Gives PEFT's tuners other than LoRA access to the values of our weights."""
    original = quantization_utils.resolve_quantization_backend
    if hasattr(original, "__qlora__"):
        return

    @functools.wraps(original)
    def resolve_quantization_backend(base_layer: Any, **kwargs: Any) -> Any:
        if _may_be_ours(base_layer):
            from .peft_backend import backend_of

            return backend_of(base_layer) or original(base_layer, **kwargs)
        return original(base_layer, **kwargs)

    _replace_in_peft(original, resolve_quantization_backend)


def install_merge(layers: ModuleType) -> None:
    """Lets adapters of one of PEFT's tuners merge into our layers; called with the tuner's module `layer`."""
    for cls in _classes_to_install(layers, "Linear", "SVDLinear", "FourierFTLinear", "WaveFTLinear"):
        _wrap(cls, _peft_merge, "merge", "unmerge")


def install_lycoris(layers: ModuleType) -> None:
    """LoHa and LoKr."""
    for cls in _classes_to_install(layers, "Linear"):
        _wrap(cls, _peft_merge, "merge", "unmerge")
        _wrap(cls, _peft_shape, "update_layer", "get_delta_weight")


def install_unilora(layers: ModuleType) -> None:
    for cls in _classes_to_install(layers, "Linear"):
        _wrap(cls, _peft_merge, "merge", "unmerge")
        _wrap(cls, _peft_shape, "update_scaling")


def install_hira(layers: ModuleType) -> None:
    for cls in _classes_to_install(layers, "Linear"):
        _wrap(cls, _peft_hira, "merge", "forward")
        _wrap(cls, _peft_merge, "unmerge")


def _classes_to_install(layers: ModuleType, *names: str) -> Iterator[Any]:
    for name in names:
        cls: Any = getattr(layers, name, None)
        if cls is not None and cls.__module__ == layers.__name__ and not hasattr(cls, "__qlora__"):
            yield cls
            cls.__qlora__ = True


def _wrap(cls: Any, module: Callable[[], ModuleType], *methods: str) -> None:
    """Over our layers, functions of a module of ours in place of methods; they get the methods to call."""
    for name in methods:
        setattr(cls, name, _wrapped(getattr(cls, name), module, name))


def _wrapped(original: Any, module: Callable[[], ModuleType], name: str) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _may_be_ours(self.get_base_layer()):
            return original(self, *args, **kwargs)
        return getattr(module(), name)(self, original, *args, **kwargs)

    return method


# Imported when they are needed, since peft is in the middle of its own import when the methods are wrapped.
def _peft_merge() -> ModuleType:
    from . import peft_merge

    return peft_merge


def _peft_shape() -> ModuleType:
    from . import peft_shape

    return peft_shape


def _peft_hira() -> ModuleType:
    from . import peft_hira

    return peft_hira


def _replace_in_peft(original: Any, new: Any) -> None:
    """Puts `new` in the place of a function of peft in every module of it that has imported the function by name."""
    new.__qlora__ = True
    function: str = original.__name__
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and getattr(module, function, None) is original:
            setattr(module, function, new)


def _may_be_ours(base: Any) -> bool:
    """By name, without an import: PEFT asks about every target, and most models are not ours."""
    return any(c.__name__ in ("Linear4bit", "Embedding4bit") for c in type(base).__mro__)


def _our_layer(lora_config: Any, target: Any) -> type | None:
    """The LoRA class for the target, or None where PEFT's own dispatch decides."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if not _may_be_ours(base):
        return None
    if any(isinstance(base, key) for key in lora_config._custom_modules or ()):
        return None
    from .peft import lora_class_of

    return lora_class_of(base)


def _create(layer: Any, lora_config: Any, adapter_name: str, target: Any, kwargs: dict[str, Any]) -> Any:
    # peft 0.19 moved the settings from arguments to `config`; the other branch goes with peft 0.18.
    from peft.tuners.lora.layer import Linear

    takes_config = "config" in inspect.signature(Linear.__init__).parameters
    # A 4-bit layer made from a Conv1D holds its weight as [out, in] like any other, and our LoRA layer never
    # transposes. The setting is saved with the adapter, where it has to say what the 16-bit layer is.
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    is_conv1d = getattr(getattr(base, "source_cls", None), "__name__", "") == "Conv1D"
    if lora_config.fan_in_fan_out and not is_conv1d:
        warnings.warn("fan_in_fan_out is True but the layer is no Conv1D: set to False", stacklevel=3)
    lora_config.fan_in_fan_out = is_conv1d
    if takes_config:
        return layer(target, adapter_name, config=lora_config, **kwargs)
    return layer(target, adapter_name, **{**kwargs, "fan_in_fan_out": False})
