"""when_imported: run something once a module has been imported, without importing it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
_lock = threading.RLock()


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module that is waited for, and hooks its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _hook(fullname, spec.loader)
                return spec
        return None


def _hook(name: str, loader: Loader) -> None:
    """Makes this loader run the callbacks after the module's own code. It stays the same object for all other uses."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module  # type: ignore[method-assign]
        execute(module)
        _run(name, sys.modules.get(name, module))

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError:
        warnings.warn(f"qlora: cannot follow the import of {name}: import qlora after it", stacklevel=2)


def _run(name: str, module: ModuleType) -> None:
    with _lock:
        callbacks = _callbacks.pop(name, [])
    for callback in callbacks:
        try:
            callback(module)
        except Exception as error:  # noqa: BLE001  a host's import must not fail because of us
            warnings.warn(
                f"qlora: its integration with {name} failed and is off: {type(error).__name__}: {error}",
                stacklevel=2,
            )


_finder = _Finder()


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls `callback(module)` once the module `name` has been imported; at once if it already is.

    Where the import is yet to come, a failure of the callback is a warning.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        callback(module)
        return
    with _lock:
        _callbacks.setdefault(name, []).append(callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
