"""The decoder layers of a causal language model: where they are, what they are called with, how one is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: What a decoder layer is called with beside the hidden states: positional and by name.
LayerArguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


class _LastLayerReachedError(Exception):
    """Ends a forward pass that is run only for what the layers are called with."""


@dataclass
class LayerInputs:
    """What the decoder layers are called with.

    Attributes:
        hidden: float32 [1, length, width] of each window, the input of the first layer.
        arguments: of each layer, what follows the hidden states: positional and by name, the same for all windows.
    """

    hidden: list[Tensor] = field(default_factory=list)
    arguments: list[LayerArguments] = field(default_factory=list)


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder layers: the one ModuleList as long as config.num_hidden_layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, module) for name, module in lists if len(module) == count]
    # A list within a layer (experts) may have the same length.
    found = [pair for pair in found if not any(pair[0].startswith(f"{other}.") for other, _ in found)]
    if len(found) != 1:
        got = ", ".join(f"{name} of {len(module)}" for name, module in lists) or "no list of modules"
        raise ValueError(f"qlora: model: expected one list of {count} decoder layers, got {got}")
    return found[0]


@torch.no_grad()
def record_inputs(model: nn.Module, layers: nn.ModuleList, windows: Tensor) -> LayerInputs:
    """Runs the model with layers that pass their input on, so that no layer is computed.

    Args:
        windows: int64 [num_windows, length].

    Raises:
        ValueError: the model does more between its layers than to pass the hidden states on, or calls a layer with what
            depends on the tokens: layer by layer such a model cannot be run.
    """
    try:
        return _record(model, layers, windows, as_tuple=False)
    except _WrongShapeError:
        return _record(model, layers, windows, as_tuple=True)


class _WrongShapeError(Exception):
    """The model took the first item of what should have been a tuple."""


def _record(model: nn.Module, layers: nn.ModuleList, windows: Tensor, *, as_tuple: bool) -> LayerInputs:
    inputs = LayerInputs()
    for window in windows:
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        with _replaced_forwards(layers, calls, as_tuple=as_tuple), suppress(_LastLayerReachedError):
            model(input_ids=window[None], use_cache=False)
        if len(calls) != len(layers):
            raise ValueError(f"qlora: model: expected {len(layers)} layers to run, got {len(calls)}")
        first = calls[0][0]
        for hidden, _, _ in calls[1:]:
            if not as_tuple and hidden.dim() == first.dim() - 1:
                raise _WrongShapeError
            if hidden.shape != first.shape or not torch.equal(hidden, first):
                raise ValueError(
                    "qlora: model: expected the output of each decoder layer to be the input of the next, got a model that "
                    "changes it in between: it cannot be calibrated layer by layer"
                )
        arguments = [(args, kwargs) for _, args, kwargs in calls]
        if not inputs.arguments:
            inputs.arguments = arguments
        elif not _same(inputs.arguments, arguments):
            raise ValueError(
                "qlora: model: expected decoder layers called with the same arguments for every text, got some that depend "
                "on the tokens: it cannot be calibrated layer by layer"
            )
        inputs.hidden.append(first.float())
    return inputs


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, calls: list[Any], *, as_tuple: bool) -> Iterator[None]:
    last = layers[-1]
    # What another library put there (accelerate's hooks) comes back afterwards.
    own = {layer: layer.__dict__.get("forward") for layer in layers}

    def replacement(layer: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            calls.append((hidden, args, kwargs))
            if layer is last:
                raise _LastLayerReachedError
            return (hidden,) if as_tuple else hidden

        return forward

    try:
        for layer in layers:
            layer.forward = replacement(layer)
        yield
    finally:
        for layer, forward in own.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or not isinstance(a, (bool, int, float, str, type(None))))


def to_float32(value: Any, device: torch.device) -> Any:
    """Arguments of a layer on `device`, floating tensors in float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else None)
    if isinstance(value, (list, tuple)):
        return type(value)(to_float32(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_float32(item, device) for key, item in value.items()}
    return value


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on GPUs, which trainers and some machines' settings allow: it errs by more than what is fitted here."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.allow_tf32 = False  # the older name sets the newer one too; torch wants them to agree
    try:
        yield
    finally:
        matmul.allow_tf32 = before == "tf32"
        matmul.fp32_precision = before


def kept_on(value: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`. What goes from a GPU to the host lies in pinned memory there: it comes back ten times as fast."""
    if device.type == "cpu" and value.is_cuda:
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
    return value.to(device, copy=True)


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Tensor, arguments: LayerArguments) -> Tensor:
    """The layer's hidden states [1, length, width]."""
    args, kwargs = arguments
    output = layer(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
