"""Integrations: they attach themselves to a host library when it is imported; none is imported from here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from ._post_import import when_imported

__all__ = ["enable", "register_hooks", "when_imported"]

# Host module, our module, and the function in it to call with the host once that is imported.
_hooks_to_register = [
    ("transformers.quantizers.auto", "transformers", "register"),
    ("transformers.modeling_utils", "transformers", "patch_models"),
    ("peft.tuners.lora.model", "peft_dispatch", "install"),
    ("peft.utils.loftq_utils", "peft_dispatch", "install_loftq"),
    ("peft.utils.quantization_utils", "peft_dispatch", "install_backend"),
    *(
        (f"peft.tuners.{tuner}.layer", "peft_dispatch", "install_merge")
        for tuner in ("ia3", "adalora", "randlora", "road", "fourierft", "gralora", "pvera", "waveft")
    ),
    *((f"peft.tuners.{tuner}.layer", "peft_dispatch", "install_lycoris") for tuner in ("loha", "lokr")),
    ("peft.tuners.unilora.layer", "peft_dispatch", "install_unilora"),
    ("peft.tuners.hira.layer", "peft_dispatch", "install_hira"),
]


_postponed: list[Callable[[], None]] = []


def _call(module: str, function: str) -> Callable[[ModuleType], None]:
    name = f"qlora.integrations.{module}"

    def callback(host: ModuleType) -> None:
        ours = sys.modules.get(name)
        if ours is not None and getattr(ours.__spec__, "_initializing", False):
            # It is our own module that imports the host: it calls `run_postponed` when it is complete.
            _postponed.append(lambda: getattr(ours, function)(host))
        else:
            getattr(importlib.import_module(name), function)(host)

    return callback


def run_postponed() -> None:
    """Runs what had to wait until one of our own modules was imported; that module calls it at its end."""
    while _postponed:
        _postponed.pop(0)()


def register_hooks() -> None:
    """Waits for the hosts. `import qlora` calls it; a second call does nothing."""
    hooks = list(_hooks_to_register)
    _hooks_to_register.clear()
    for host, module, function in hooks:
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
        raise ImportError(
            "qlora.enable: needs the package transformers, which is not installed: pip install transformers"
        )
    register_hooks()
    from . import transformers

    transformers.enable()
