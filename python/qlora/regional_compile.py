"""Decoder layers compiled by torch.compile, in place: `qlora.prepare(model, compile=True)`.

What is left of a training step beside its matrix products is many small operations a layer: norms, rotary embeddings,
activations, residuals, casts. Each layer becomes one graph forward and one backward, in which they are fused, and which
Python calls once instead of operation by operation. All layers of a class share the graphs.

A layer's class is replaced by a subclass of it whose `forward` calls the compiled code, so names in the state dict,
hooks, adapters and `isinstance` stay what they are. Compiled is what computes gradients and fills no cache; evaluation
and generation run as before, and so does a layer with hooks on modules inside it: torch.compile takes no notice of hooks
that come later, or that one layer has and another does not.

Checkpointing. Plain non-reentrant checkpointing is traced into the graphs: the backward graph computes the layer again
in the order it needs it, fused with the gradients, and leaves out what no gradient needs. Any other checkpointing
function (reentrant, offloading) is called around the compiled layer.
"""

from __future__ import annotations

import copyreg
import functools
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from . import compile_passes, lean_mlp
from .nn.module import has_hooks

__all__ = ["compile_layers", "compiled_layers", "uncompile_layers"]

#: Names under which models pass a layer what it is to write keys and values into.
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def compile_layers(
    model: nn.Module, *, dynamic: bool | None = None, backend: Any = "inductor"
) -> dict[str, int]:
    """Has the repeated layers of a model compiled at their next training step. Called again, it starts anew.

    Args:
        model: a transformers model or a PeftModel around one.
        dynamic: None compiles for the first length that it is given and once more, for any length, at the second; True
            compiles for any length from the start.
        backend: of torch.compile.

    Returns:
        For each class of layers how many will be compiled.

    Raises:
        ValueError: the model has no repeated layers.
    """
    uncompile_layers(model)
    layers = repeated_layers(model)
    if not layers:
        raise ValueError(
            f"qlora.prepare: compile: expected a model with a list of equal layers, got {type(model).__name__}"
        )
    lean_mlp.give_back(model)  # compiled layers compute again what is read of them, and no more, without
    regions = {cls: Region(cls, dynamic, backend) for cls in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = regions[type(layer)].compiled_class
    return compiled_layers(model)


def uncompile_layers(model: nn.Module) -> None:
    """Gives compiled layers their own class back."""
    for module in model.modules():
        region = _region_of(module)
        if region is not None:
            module.__class__ = region.layer_class


def compiled_layers(model: nn.Module) -> dict[str, int]:
    """For each class of layers how many are compiled, without those that could not be."""
    regions = [_region_of(module) for module in model.modules()]
    return dict(Counter(r.layer_class.__name__ for r in regions if r is not None and not r.is_off))


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers checkpoints one by one, or else the members of lists of equal modules."""
    layers = [m for m in model.modules() if _is_checkpointed(m)]
    if layers:
        return layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return [m for part in lists if len({type(m) for m in part}) == 1 for m in part if len(m._modules) > 0]


def _is_checkpointed(module: nn.Module) -> bool:
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _region_of(module: nn.Module) -> Region | None:
    region: Region | None = getattr(type(module), "_qlora_region", None)
    return region


class Region:
    """The compiled code of a class of layers.

    Attributes:
        layer_class: the class as it was.
        compiled_class: what the layers are made instances of.
        is_off: whether compiling has failed and the layers run as they did before.
    """

    def __init__(self, layer_class: type[nn.Module], dynamic: bool | None, backend: Any) -> None:
        self.layer_class = layer_class
        self.is_off = False
        # Parameters of a 4-bit class ask Python at every operator that is given them, to be multiplied as what they
        # stand for where a model passes them to F.linear itself. Hardly a layer does; one that does cannot be traced
        # without.
        self._context: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunctionSubclass
        self._warned: set[str] = set()
        self._without_hooks: WeakKeyDictionary[nn.Module, int] = (
            WeakKeyDictionary()
        )  # what `next_id` was then

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return layer_class.forward(layer, *args, **kwargs)

        def run_with_checkpoint(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            function = functools.partial(layer_class.forward, layer, **kwargs)
            return checkpoint(function, *args, use_reentrant=False)

        settings: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic, "backend": backend}
        if backend == "inductor":
            settings["options"] = compile_passes.inductor_options()
        self._run, self._run_with_checkpoint = (
            torch.compile(_with_own_code(function), **settings) for function in (run, run_with_checkpoint)
        )
        self.compiled_class = _subclass(self)

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, by compiled code where gradients are computed."""
        checkpointing = None
        if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
            checkpointing = layer._gradient_checkpointing_func
            kwargs = _without_cache(kwargs)
        if not self._serves(layer, args, kwargs):
            return self._run_as_before(checkpointing, layer, args, kwargs)
        args = _with_gradient(args)
        try:
            if checkpointing is None:
                return self._call(self._run, layer, *args, **kwargs)
            if _is_plain(checkpointing):
                return self._call(self._run_with_checkpoint, layer, *args, **kwargs)
            function: Any = functools.partial(self._call, self._run, layer, **kwargs)
            # For functions that recompute the layer in the end (checkpointing.py): one graph that does.
            function.checkpointed = functools.partial(self._call, self._run_with_checkpoint, layer, **kwargs)
            return checkpointing(function, *args)
        except compile_passes.failures() as error:  # raised while tracing: nothing has been computed
            failure = error
        if self._context is not nullcontext:
            self._context = nullcontext
            return self.forward(layer, args, kwargs)
        self._switch_off(failure)
        return self._run_as_before(checkpointing, layer, args, kwargs)

    def _call(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return compiled(*args, **kwargs)

    def _run_as_before(
        self,
        checkpointing: Callable[..., Any] | None,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        function = functools.partial(self.layer_class.forward, layer, **kwargs)
        return function(*args) if checkpointing is None else checkpointing(function, *args)

    def _serves(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.is_off or not (torch.is_grad_enabled() and args and isinstance(args[0], Tensor)):
            return False
        if not (args[0].requires_grad or any(p.requires_grad for p in layer.parameters())):
            return False
        if any(kwargs.get(name) is not None for name in _CACHES):
            self._warn("run without torch.compile where they are to fill a cache: pass use_cache=False")
            return False
        if self._has_hooks_inside(layer):
            self._warn("run without torch.compile where modules inside them have hooks")
            return False
        return True

    def _has_hooks_inside(self, layer: nn.Module) -> bool:
        latest = RemovableHandle.next_id  # grows with every hook
        if self._without_hooks.get(layer) == latest:
            return False
        if any(has_hooks(module) for module in layer.modules() if module is not layer):
            return True
        self._without_hooks[layer] = latest
        return False

    def _switch_off(self, error: Exception) -> None:
        self.is_off = True
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        self._warn(f"run without torch.compile from here on: {reason}")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"qlora: layers of class {self.layer_class.__name__} {what}", stacklevel=2)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: compiled code is kept, and limited in number, by code object."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _subclass(region: Region) -> type[nn.Module]:
    base = region.layer_class

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return region.forward(self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Copies and pickles are of the class as it was."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle demands the object's own class of it
            function, arguments = copyreg._reconstructor, (base, object, None)  # type: ignore[attr-defined]
        return function, (base, *arguments[1:]), *rest

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__init_subclass__": classmethod(lambda cls, **kwargs: None),
        "__reduce_ex__": reduce,
        # Transformers checkpoints in `__call__` up to 5.17, and later in a wrapper that its __init_subclass__ puts
        # around `forward`: Region.forward does it instead.
        "__call__": nn.Module.__call__,
        "_qlora_region": region,
    }
    compiled: Any = type(base.__name__, (base,), members)
    compiled.forward = forward
    return compiled  # type: ignore[no-any-return]


def _is_plain(checkpointing: Any) -> bool:
    return (
        isinstance(checkpointing, functools.partial)
        and checkpointing.func is checkpoint
        and not checkpointing.args
        and checkpointing.keywords == {"use_reentrant": False}
    )


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers passes on under checkpointing."""
    return {
        name: None if name in _CACHES else False if name == "use_cache" and value else value
        for name, value in kwargs.items()
    }


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input of the first layer has no gradient; with one it can use the graphs of all the others."""
    if args[0].requires_grad:
        return args
    return (args[0].detach().requires_grad_(True), *args[1:])
