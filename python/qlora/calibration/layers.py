"""The decoder layers of a causal language model: where they are, what they are called with, what their linears see."""

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
def run_layer(layer: nn.Module, hidden: Tensor, arguments: LayerArguments) -> Tensor:
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
    """Sums over the tokens of a linear's inputs: x in the quantised model, y in the original one.

    Attributes:
        square: float32 [k, k], sum of x x^T.
        drift: float32 [k, k], sum of (y - x) x^T.
    """

    square: Tensor
    drift: Tensor


class _LinearReachedError(Exception):
    """Ends a forward pass that is run only for what one linear is given."""


@torch.no_grad()
def input_groups(
    layer: nn.Module, names: list[str], hidden: list[Tensor], arguments: LayerArguments
) -> list[list[str]]:
    """The linears `names` of a decoder layer in the order in which they run, those given the same tensor together.

    Raises:
        ValueError: no token of the windows reaches one of them.
    """
    seen: dict[str, list[str]] = {}
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            x: Tensor = args[0] if args else kwargs["input"]
            if not any(name in group for group in seen.values()):
                owner = last[-1][1] if last and last[-1][0] is x else name
                seen.setdefault(owner, []).append(name)
                last[:] = [(x, owner)]

        return note

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    device = next(layer.parameters()).device
    try:
        for window in hidden:
            run_layer(layer, window.to(device), arguments)
            if sum(map(len, seen.values())) == len(names):
                return list(seen.values())
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if not any(name in group for group in seen.values())]
    raise ValueError(
        f"qlora: {missing[0]}: expected inputs from the calibration text, got none: no token reaches this layer"
    )


@torch.no_grad()
def input_moments(
    name: str,
    original: tuple[nn.Module, list[Tensor]],
    quantised: tuple[nn.Module, list[Tensor]],
    arguments: LayerArguments,
) -> InputMoments:
    """The sums for one linear: of the original decoder layer over its windows, and of the quantised one over its own.

    Raises:
        ValueError: the two do not give the linear the same number of tokens.
    """
    sums: InputMoments | None = None
    for of_original, of_quantised in zip(original[1], quantised[1], strict=True):
        y = _input_of(original[0], name, of_original, arguments)
        x = _input_of(quantised[0], name, of_quantised, arguments)
        if y is None and x is None:
            continue
        if y is None or x is None or y.shape != x.shape:
            shapes = [None if value is None else list(value.shape) for value in (y, x)]
            raise ValueError(
                f"qlora: {name}: expected the same tokens before and after quantisation, got {shapes[0]} and {shapes[1]}: "
                "a layer that chooses its tokens cannot be calibrated"
            )
        weighted = _token_weights(x)[:, None] * x
        square, drift = weighted.T @ x, (y - x).T @ weighted
        if sums is None:
            sums = InputMoments(square, drift)
        else:
            sums.square += square
            sums.drift += drift
    if sums is None:
        raise ValueError(f"qlora: {name}: expected inputs from the calibration text, got none")
    return sums


def _input_of(layer: nn.Module, name: str, hidden: Tensor, arguments: LayerArguments) -> Tensor | None:
    """[num_tokens, k] that the linear is given first, or None where it does not run; nothing after it is computed."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        found.append(args[0] if args else kwargs["input"])
        raise _LinearReachedError

    handle = layer.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_LinearReachedError):
            run_layer(layer, hidden.to(next(layer.parameters()).device), arguments)
    finally:
        handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]) if found else None


def _token_weights(x: Tensor) -> Tensor:
    """float32 [num_tokens], 1 but for tokens [num_tokens, k] above _MOST_ENERGY times the median energy."""
    energy = x.square().sum(dim=1)
    most = _MOST_ENERGY * energy.median()
    return torch.where((energy > most) & (most > 0), most / energy, 1.0)
