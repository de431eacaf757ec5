"""Takes the copy of the base layer's result out of PEFT's layers over bitsandbytes' 4-bit ones.

PEFT copies that result because, with some older autograd nodes, it could not be written to. Ours can (and is
contiguous), so `clone()` becomes `contiguous()`, which returns the tensor itself. Only that one name changes in the
compiled method; a method that names `clone` not once but never or several times stays as it is.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import FunctionType, ModuleType
from typing import Any

from ._post_import import when_imported

# Module of PEFT, class in it, method that copies.
_METHODS = (
    ("peft.tuners.lora.bnb", "Linear4bit", "forward"),
    ("peft.tuners.adalora.bnb", "SVDLinear4bit", "forward"),
    ("peft.tuners.ia3.bnb", "Linear4bit", "forward"),
    ("peft.tuners.hira.bnb", "Linear4bit", "forward"),
    ("peft.tuners.pvera.bnb", "Linear4bit", "forward"),
    ("peft.tuners.randlora.bnb", "Linear4bit", "forward"),
    ("peft.utils.quantization_utils", "Bnb4bitBackend", "maybe_clone_base_result"),
)

_is_on = False
_waited_for: set[str] = set()
_originals: list[tuple[type, str, Any]] = []


def without_clone(method: Any) -> Any:
    """The function with `contiguous` for its one `clone`; None where there is not exactly one."""
    code = getattr(method, "__code__", None)
    if code is None or sum(step.argval == "clone" for step in dis.get_instructions(code)) != 1:
        return None
    names = tuple("contiguous" if name == "clone" else name for name in code.co_names)
    new = FunctionType(
        code.replace(co_names=names),
        method.__globals__,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    new.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(new, method)


def _replace(module: ModuleType, class_name: str, method: str) -> None:
    owner = getattr(module, class_name, None)
    original = vars(owner).get(method) if isinstance(owner, type) else None
    new = without_clone(original)
    if _is_on and isinstance(owner, type) and new is not None:
        setattr(owner, method, new)
        _originals.append((owner, method, original))


def switch_on() -> None:
    """For the modules of PEFT that are imported, and for the others once they are."""
    global _is_on  # noqa: PLW0603
    _is_on = True
    for name, class_name, method in _METHODS:
        if name not in _waited_for:
            _waited_for.add(name)
            when_imported(name, functools.partial(_replace, class_name=class_name, method=method))
        elif name in sys.modules:
            _replace(sys.modules[name], class_name, method)


def switch_off() -> None:
    global _is_on  # noqa: PLW0603
    _is_on = False
    while _originals:
        owner, method, original = _originals.pop()
        setattr(owner, method, original)
