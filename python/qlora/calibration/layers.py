"""The decoder layers of a causal language model: where they are, what they are called with, what their linears see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


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
        for layer in layers:
            layer.__dict__.pop("forward", None)


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


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The layer's hidden states [1, length, width]."""
    args, kwargs = arguments
    output = layer(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


#: No token counts for more than this many times the median token of its window. A few tokens, the first above all, have
#: inputs of a thousand times the energy of the others in some layers (SmolLM2-135M, the last but one down_proj: 65 % of
#: the sum), and the layer would be fitted to them alone.
_MOST_ENERGY = 16.0


@dataclass
class InputMoments:
    """Sums over the tokens of a layer's inputs: x as the quantised layers before it give them, y as the original ones do.

    Attributes:
        square: float32 [k, k], sum of x x^T.
        drift: float32 [k, k], sum of (y - x) x^T.
    """

    square: Tensor
    drift: Tensor


class Moments:
    """Takes the sums for linear layers while their decoder layer runs; those that are given the same tensor share them.

    For each window the decoder layer is run over the original hidden states (`original()`), then over those of the
    quantised model (`quantised()`).
    """

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self._sums: dict[str, InputMoments] = {}
        self._owner: dict[str, str] = {}
        self._original: dict[str, Tensor] = {}
        self._is_original = True
        self._last: tuple[Tensor, str] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in linears.items()
        ]

    def original(self) -> None:
        self._is_original = True
        self._original.clear()

    def quantised(self) -> None:
        self._is_original = False

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            x: Tensor = args[0] if args else kwargs["input"]
            if name not in self._owner:
                self._owner[name] = self._last[1] if self._last is not None and self._last[0] is x else name
            if self._owner[name] == name:
                self._last = (x, name)
                self._add(name, x.reshape(-1, x.shape[-1]))

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        if self._is_original:
            self._original[name] = x
            return
        y = self._original.pop(name, None)
        if y is None or y.shape != x.shape:
            got = "nothing" if y is None else str(list(y.shape))
            raise ValueError(f"qlora: {name}: expected original inputs of shape {list(x.shape)}, got {got}")
        weight = _token_weights(x)[:, None]
        weighted = weight * x
        square, drift = weighted.T @ x, (y - x).T @ weighted
        if name in self._sums:
            self._sums[name].square += square
            self._sums[name].drift += drift
        else:
            self._sums[name] = InputMoments(square, drift)

    def of(self, name: str) -> InputMoments | None:
        """The sums of a layer, or None where it never ran."""
        owner = self._owner.get(name)
        return None if owner is None else self._sums[owner]

    def close(self) -> None:
        self._last = None
        self._original.clear()
        for handle in self._handles:
            handle.remove()


def _token_weights(x: Tensor) -> Tensor:
    """float32 [num_tokens], 1 but for tokens [num_tokens, k] above _MOST_ENERGY times the median energy."""
    energy = x.square().sum(dim=1)
    most = _MOST_ENERGY * energy.median()
    return torch.where((energy > most) & (most > 0), most / energy, 1.0)
