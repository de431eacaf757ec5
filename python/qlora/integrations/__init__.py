"""Integrations: they attach themselves to a host library when it is imported; none is imported from here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

from ._post_import import when_imported

__all__ = ["enable", "register_hooks", "when_imported"]

# Host module, our module, and the function in it to call with the host once that is imported.
_HOOKS = (
    ("transformers.quantizers.auto", "transformers", "register"),
    ("transformers.modeling_utils", "transformers", "patch_models"),
    ("peft.tuners.lora.model", "peft_dispatch", "install"),
)
_registered = False


def _call(module: str, function: str) -> Callable[[ModuleType], None]:
    def callback(host: ModuleType) -> None:
        getattr(importlib.import_module(f"qlora.integrations.{module}"), function)(host)

    return callback


def register_hooks() -> None:
    """Waits for the hosts. `import qlora` calls it; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    for host, module, function in _HOOKS:
        when_imported(host, _call(module, function))


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def enable() -> None:
    """Serves every 4-bit load of transformers, also where bitsandbytes is installed.

    From now on `BitsAndBytesConfig(load_in_4bit=True, ...)` and 4-bit checkpoints go through this package, and
    `from_pretrained(..., load_in_4bit=True)` works again, with the defaults of QuantConfig. Without this call an
    installed bitsandbytes keeps its own configuration class, and ours serves `quantization_config=QuantConfig()`.

    Raises:
        ImportError: transformers is not installed.
    """
    if not is_installed("transformers"):
        raise ImportError("qlora.enable: needs the package transformers, which is not installed: pip install transformers")
    register_hooks()
    from . import transformers

    transformers.enable()
