"""Gradient checkpointing whose checkpoints, the inputs of the layers, wait in pinned host memory.

    forward    compute  |  layer 0  |  layer 1  | ...       backward   |  layer 3  |  layer 2  | ...
               copies     | 0 out     | 1 out                            | 2 back    | 1 back

An input leaves while its layer computes; its GPU memory is free when the next layer begins. In backward it is back
before its layer is reached. The last one never has to leave. What is recomputed, random numbers, autocast, nested
calls and errors are those of torch.utils.checkpoint (non-reentrant), which is given the input through saved-tensor
hooks. A tensor that is not on a GPU, or is small, is left where it is: on a CPU this is the plain checkpoint.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .lean_mlp import LeanMlps
from .memory_budget import MemoryBudget, Meter, cuda_meter

__all__ = ["Copies", "OffloadedCheckpoint", "layer_checkpoints", "use_checkpoints"]

BLOCK = 8 << 20  # bytes of a pinned block; a copy of one takes about 0.2 ms
MIN_BYTES = 1 << 20  # what is smaller costs more to move than to keep


class Copies(Protocol):
    """How values leave a device and come back."""

    def send(self, value: Tensor) -> tuple[Any, Any]:
        """Begins the copy of a contiguous value: (where it will be, the running copy)."""

    def fetch(self, place: Any, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Begins the copy back: (the value on the device, the running copy)."""

    def wait(self, copy: Any) -> None:
        """What is queued on the device from now on runs after the copy."""

    def recycle(self, place: Any) -> None:
        """`place` may be used again by copies that begin later."""


@dataclass
class _Running:
    """A copy in flight, and the stream whose allocator owns the device's memory."""

    done: torch.cuda.Event
    owner: torch.cuda.Stream


class _PinnedCopies:
    """Copies of one GPU, all on one stream, so that a block is read before it is written again.

    The memory of a value belongs to the stream that computes. It is not told to the allocator that the copies use it
    (record_stream): memory would then come back when the GPU is done, which Python may be many layers ahead of.
    Instead whoever lets go of a value has the computing stream wait for its copy first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: list[Tensor] = []  # blocks; as many as were ever in use at one time

    def send(self, value: Tensor) -> tuple[list[Tensor], _Running]:
        parts = torch.split(value.view(-1).view(torch.uint8), BLOCK)
        blocks = [self._block() for _ in parts]
        return blocks, self._copy(
            [(block[: len(part)], part) for block, part in zip(blocks, parts, strict=True)]
        )

    def fetch(self, place: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, _Running]:
        value = torch.empty(shape, dtype=dtype, device=self._device)
        parts = torch.split(value.view(-1).view(torch.uint8), BLOCK)
        return value, self._copy(
            [(part, block[: len(part)]) for block, part in zip(place, parts, strict=True)]
        )

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> _Running:
        owner = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(owner)
        with torch.cuda.stream(self._stream), torch.no_grad():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _Running(self._stream.record_event(), owner)

    def wait(self, copy: _Running) -> None:
        for stream in {copy.owner, torch.cuda.current_stream(self._device)}:
            stream.wait_event(copy.done)

    def recycle(self, place: list[Tensor]) -> None:
        self._free += place

    def _block(self) -> Tensor:
        return self._free.pop() if self._free else torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)


def pinned_copies(device: torch.device) -> Copies | None:
    """Copies between a GPU and pinned memory; None where there is nothing to leave."""
    return _PinnedCopies(device) if device.type == "cuda" else None


class _Parked:
    """A layer's input: leaving, away, or on its way back. Lives as long as autograd keeps the layer's graph."""

    def __init__(self, value: Tensor, copies: Copies, before: _Parked | None) -> None:
        self._copies = copies
        self._shape, self._dtype, self._version = value.shape, value.dtype, value._version
        self._before = None if before is None else weakref.ref(before)
        self._place, self._copy = copies.send(value)
        self._value: Tensor | None = value  # on the device
        self._is_original = True

    def leave(self) -> None:
        """Lets go of the device's memory, once."""
        if self._value is not None and self._is_original:
            self._let_go()

    def _let_go(self) -> Tensor:
        value = self._value
        assert value is not None
        if self._is_original and value._version != self._version:
            raise RuntimeError(
                "qlora.OffloadedCheckpoint: input: expected a layer's input to stay as it was until the next layer, got "
                f"a tensor of {list(value.shape)} modified in place; use gradient_checkpointing=True for this model"
            )
        self._copies.wait(self._copy)
        self._value = None
        return value

    def _come_back(self) -> None:
        if self._value is None:
            self._value, self._copy = self._copies.fetch(self._place, self._shape, self._dtype)
            self._is_original = False

    def value(self) -> Tensor:
        """The input on the device, for the backward pass; that of the layer before is sent for."""
        self._come_back()
        value = self._let_go()
        before = None if self._before is None else self._before()
        if before is not None:
            before._come_back()
        return value

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "_place"):
            return
        if self._value is not None:
            self._copies.wait(self._copy)
        self._copies.recycle(self._place)


class OffloadedCheckpoint:
    """torch.utils.checkpoint.checkpoint (non-reentrant) that keeps the first argument in host memory.

    Args:
        make_copies: of a device; None leaves its tensors where they are.
        min_bytes: the smallest tensor that is moved; None is MIN_BYTES.
    """

    def __init__(
        self,
        make_copies: Callable[[torch.device], Copies | None] = pinned_copies,
        min_bytes: int | None = None,
    ) -> None:
        self._make_copies = make_copies
        self._min_bytes = MIN_BYTES if min_bytes is None else min_bytes
        self._copies: dict[torch.device, Copies | None] = {}
        self._last: weakref.ref[_Parked] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has streams and blocks of its own."""
        return OffloadedCheckpoint, (self._make_copies, self._min_bytes)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args), to be recomputed in backward; kwargs are those of torch's checkpoint."""
        value = args[0] if args else None
        if not isinstance(value, Tensor) or torch.compiler.is_compiling() or not self._is_moved(value):
            return recompute(function, *args, **kwargs)
        # The hooks live as long as the graph, so they hold no tensor.
        with saved_tensors_hooks(partial(self._pack, _identity(value)), _unpack):
            return recompute(function, *args, **kwargs)

    def _is_moved(self, value: Tensor) -> bool:
        if value.device not in self._copies:
            self._copies[value.device] = self._make_copies(value.device)
        return (
            self._copies[value.device] is not None
            and torch.is_grad_enabled()
            and value.is_contiguous()
            and value.numel() * value.element_size() >= self._min_bytes
        )

    def _pack(self, moved: tuple[Any, ...], tensor: Tensor) -> Tensor | _Parked:
        """Of the tensors that are saved of a layer's arguments, that with the identity `moved`, parked."""
        copies = self._copies.get(tensor.device)
        if copies is None or _identity(tensor) != moved:
            return tensor
        before = None if self._last is None else self._last()
        if before is not None:
            before.leave()
        parked = _Parked(tensor.detach(), copies, before)
        self._last = weakref.ref(parked)
        return parked


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor that is alive, however often it is wrapped, without holding it."""
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype


def _unpack(saved: Tensor | _Parked) -> Tensor:
    return saved.value() if isinstance(saved, _Parked) else saved


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args), to be recomputed in backward: by torch's checkpoint, or by itself.

    A compiled layer has, as `function.checkpointed`, a version of itself whose backward code recomputes it.
    """
    checkpointed = getattr(function, "checkpointed", None)
    if checkpointed is not None:
        return checkpointed(*args)
    return checkpoint(function, *args, **{**kwargs, "use_reentrant": False})


def layer_checkpoints(
    layers: list[nn.Module],
    *,
    is_offloaded: bool,
    num_bytes: int | None = None,
    lean: LeanMlps | None = None,
    make_copies: Callable[[torch.device], Copies | None] = pinned_copies,
    make_meter: Callable[[torch.device], Meter | None] = cuda_meter,
    tell: Callable[[str], None] | None = None,
) -> list[Callable[..., Any]]:
    """The checkpoint function of each layer, with inputs on the host or within a memory budget of num_bytes, or both.

    `lean` is for the layers' feed-forward parts.
    """
    function: Callable[..., Any] = OffloadedCheckpoint(make_copies) if is_offloaded else recompute
    if lean is not None:
        lean.take(layers)
        function = partial(_lean, lean, function)
    if num_bytes is None:
        return [function] * len(layers)
    budget = MemoryBudget(
        num_bytes, layers, function, moves_inputs=is_offloaded, make_meter=make_meter, tell=tell
    )
    return [partial(budget.run, index) for index in range(len(layers))]


def _lean(
    lean: LeanMlps,
    recompute: Callable[..., Any],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not hasattr(function, "checkpointed"):
        function = lean.within(function)
    return recompute(function, *args, **kwargs)


def use_checkpoints(base: Any, make: Callable[[list[nn.Module]], list[Callable[..., Any]]]) -> None:
    """Gives each layer of a transformers model a checkpoint function of its own, whoever enables checkpointing later.

    A trainer enables it again before it starts, with torch's function; the model's hook for that is wrapped.

    Args:
        make: the functions of these layers, in their order.

    Raises:
        ValueError: the model's layers are not transformers' checkpointed ones.
    """
    layers = _layers(base)
    if not layers or "value" in inspect.signature(base._set_gradient_checkpointing).parameters:
        raise ValueError(
            "qlora.prepare: gradient_checkpointing: expected a model of transformers' GradientCheckpointingLayer for "
            f"'offload' or a memory budget, got {type(base).__name__}"
        )
    base._set_gradient_checkpointing = partial(_set_checkpoints, base, make(layers))
    base._set_gradient_checkpointing()


def _set_checkpoints(
    base: Any,
    functions: list[Callable[..., Any]],
    enable: bool = True,
    gradient_checkpointing_func: Any = checkpoint,
    **_: Any,
) -> None:
    if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "qlora.prepare: use_reentrant: expected False with gradient_checkpointing='offload' or a memory budget, "
            "got True"
        )
    type(base)._set_gradient_checkpointing(base, enable, functions[0])
    for layer, function in zip(_layers(base), functions, strict=True):
        layer._gradient_checkpointing_func = function


def _layers(base: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
