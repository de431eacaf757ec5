"""What the linears of a decoder layer are given: in which order they run, and the second moments of their inputs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LayerArguments, kept_on, run_layer

#: No token counts for more than this many times the median token of its window. A few tokens, the first above all, have
#: inputs of a thousand times the energy of the others in some layers (SmolLM2-135M, the last but one down_proj: 65 % of
#: the sum), and the layer would be fitted to them alone.
_MOST_ENERGY = 16.0


@dataclass
class InputMoments:
    """Sums over the tokens of a linear's inputs: x in the quantised model, y in the original one, d = y - x.

    Attributes:
        square: float32 [k, k], sum of x x^T.
        drift: float32 [k, k], sum of d x^T.
        lost: float32 [k, k], sum of d d^T.
    """

    square: Tensor
    drift: Tensor
    lost: Tensor


class OutputError:
    """What storing a weight W as Q does to the layer's output, as a share of it: sum |W y - Q x|^2 / sum |W y|^2.

    Attributes:
        crossed: float32 [n, k], W (sum d x^T).
    """

    def __init__(self, weight: Tensor, moments: InputMoments) -> None:
        """`weight` is W, float32 [n, k]."""
        self.weight = weight
        self.square = moments.square
        self.crossed = weight @ moments.drift
        self.lost = _trace(weight @ moments.lost, weight)  # sum |W d|^2
        energy = _trace(weight @ moments.square, weight) + 2 * _trace(self.crossed, weight) + self.lost
        self.energy = energy if energy > 0 else 1.0  # a weight of zeros has no error

    def of(self, stored: Tensor) -> float:
        """The share for Q, float32 [n, k]."""
        difference = self.weight - stored
        error = _trace(difference @ self.square, difference) + 2 * _trace(self.crossed, difference)
        return (error + self.lost) / self.energy


def _trace(a: Tensor, b: Tensor) -> float:
    """tr A B^T."""
    return float((a * b).sum(dtype=torch.float64))


class _LinearReachedError(Exception):
    """Ends a forward pass that is run only for what one linear is given."""


@dataclass
class RecordedInputs:
    """The inputs of a decoder layer's linears over a text.

    Attributes:
        groups: names of the linears in the order in which they run, those given the same tensor together.
        of_group: of each group and window float32 [num_tokens, k], None where the window does not reach it; where the
            hidden states are.
    """

    groups: list[list[str]]
    of_group: list[list[Tensor | None]]


@torch.no_grad()
def record_linears(
    layer: nn.Module, names: list[str], hidden: list[Tensor], arguments: LayerArguments
) -> RecordedInputs:
    """Runs a decoder layer over each window, which is replaced by its output, and records what the linears get.

    Raises:
        ValueError: no token of the windows reaches one of them.
    """
    owners: dict[str, str] = {}
    inputs: dict[str, list[Tensor | None]] = {}
    window_idx = 0
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            x: Tensor = args[0] if args else kwargs["input"]
            if name not in owners:
                owners[name] = last[-1][1] if last and last[-1][0] is x else name
                inputs.setdefault(owners[name], [None] * len(hidden))
            last[:] = [(x, owners[name])]
            if owners[name] == name and inputs[name][window_idx] is None:
                flat = x.reshape(-1, x.shape[-1])
                inputs[name][window_idx] = kept_on(flat, hidden[window_idx].device)

        return note

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    device = next(layer.parameters()).device
    try:
        for window_idx, window in enumerate(hidden):
            last.clear()
            output = run_layer(layer, window.to(device, non_blocking=True), arguments)
            hidden[window_idx] = kept_on(output, window.device)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in owners]
    if missing:
        raise ValueError(
            f"qlora: {missing[0]}: expected inputs from the calibration text, got none: no token reaches this layer"
        )
    groups = [[name for name in owners if owners[name] == owner] for owner in inputs]
    return RecordedInputs(groups, list(inputs.values()))


@torch.no_grad()
def input_moments(
    name: str,
    original: list[Tensor | None],
    layer: nn.Module,
    hidden: list[Tensor],
    arguments: LayerArguments,
) -> InputMoments:
    """The sums for one linear.

    Args:
        original: y of each window, as `record_linears` gives them.
        layer, hidden: the decoder layer and its inputs in the quantised model, which give x.

    Raises:
        ValueError: x and y are not of the same number of tokens.
    """
    sums: InputMoments | None = None
    for recorded, window in zip(original, hidden, strict=True):
        x = _input_of(layer, name, window, arguments)
        if recorded is None and x is None:
            continue
        if recorded is None or x is None or recorded.shape != x.shape:
            shapes = [None if value is None else list(value.shape) for value in (recorded, x)]
            raise ValueError(
                f"qlora: {name}: expected the same tokens before and after quantisation, got {shapes[0]} and {shapes[1]}: "
                "a layer that chooses its tokens cannot be calibrated"
            )
        weights = _token_weights(x)[:, None]
        lost = recorded.to(x.device, non_blocking=True) - x
        if sums is None:
            sums = InputMoments(*torch.zeros(3, x.shape[1], x.shape[1], device=x.device).unbind())
        sums.square.addmm_((weights * x).T, x)
        sums.drift.addmm_((weights * lost).T, x)
        sums.lost.addmm_((weights * lost).T, lost)
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
            run_layer(layer, hidden.to(next(layer.parameters()).device, non_blocking=True), arguments)
    finally:
        handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]) if found else None


def _token_weights(x: Tensor) -> Tensor:
    """float32 [num_tokens], 1 but for tokens [num_tokens, k] above _MOST_ENERGY times the median energy."""
    energy = x.square().sum(dim=1)
    most = _MOST_ENERGY * energy.median()
    return torch.where((energy > most) & (most > 0), most / energy, 1.0)
