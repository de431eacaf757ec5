"""qlora: 4-bit (NF4, FP4) fine-tuning of large language models on CPU and CUDA.

    import qlora
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=qlora.QuantConfig())
    model = qlora.add_lora(model, r=16)

Importing this module loads neither torch nor any other package. Each attribute loads what it needs when it is first
used, and says what to install where that is missing. Transformers and peft meet our classes when they are imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from .integrations import register_hooks

# Attribute -> module that holds it; a submodule stands for itself.
_SUBMODULES = ("nn", "ops", "reference", "format", "config", "calibration", "integrations")
_ATTRIBUTES = {
    "QuantConfig": "qlora.config",
    "Calibration": "qlora.config",
    "quantize_": "qlora.nn",
    "dequantize_": "qlora.nn",
    "report": "qlora.nn",
    "enable": "qlora.integrations",
    "accelerate_bitsandbytes": "qlora.integrations.bitsandbytes",
    "add_lora": "qlora.lora",
    "merge_and_unload": "qlora.lora",
    "prepare": "qlora.preparation",
    "merge": "qlora.merging",
    "estimate_memory": "qlora.estimate",
    "loftq_init": "qlora.loftq",
}
# Packages that parts of qlora need and that may be absent, with the requirement to install.
_OPTIONAL = {
    "torch": "torch>=2.10",
    "transformers": "transformers>=5.17",
    "peft": "peft>=0.18",
    "trl": "trl>=1.0",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "safetensors": "safetensors",
}

__all__ = [*_SUBMODULES, *_ATTRIBUTES, "__version__"]  # noqa: PLE0604


def _import(name: str, needed_for: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            raise
        raise ImportError(
            f"qlora.{needed_for}: needs the package {package}, which is not installed: "
            f"pip install '{_OPTIONAL[package]}'",
            name=package,
        ) from error


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return _import(f"qlora.{name}", needed_for=name)
    if name in _ATTRIBUTES:
        value = getattr(_import(_ATTRIBUTES[name], needed_for=name), name)
    elif name == "__version__":
        value = importlib.import_module("qlora._qlora_ext").build_info()["version"]
    else:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Attaches the integrations to transformers and peft whenever these are imported; imports neither.
register_hooks()
