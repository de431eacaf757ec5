"""Which layers are recomputed in backward: as few as a memory budget allows.

The last layers are the ones that keep their activations: backward frees these before it recomputes the first layer. So
at any time of a step that keeps n layers, at most what keeping them costs is held beside what a step that recomputes all
layers holds then:

    peak <= held + max(rest_0, rest_n + sum of the kept layers' cost)

held is what is allocated when forward begins: weights, optimizer state, gradients of earlier batches. The others are
measured, as bytes of torch's allocator. A batch larger than any before is run with every layer recomputed, which gives
rest_0. What keeping a layer costs is guessed from the widths of its products, half as much again, until layers are kept and
measured; two or three steps later the plan stands. Costs grow in proportion to the tokens; rest is not taken to
shrink with them.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["MemoryBudget", "parse_bytes"]

MARGIN = 0.02  # of the budget, left free
_ROUNDS = 4  # of measuring a size, at most
_LEAST = 16  # least times a layer's input that keeping it is guessed to cost
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

logger = logging.getLogger("qlora")


def parse_bytes(size: float | str) -> int:
    """24e9, "24GB" or "22.5 GiB" in bytes.

    Raises:
        ValueError: it is no positive size.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].upper())
    try:
        value = 0 if found is None or unit is None else int(float(found[1]) * unit)
    except ValueError:
        value = 0
    if value <= 0 or isinstance(size, bool):
        raise ValueError(f"memory_budget: expected bytes or a size such as '24GB' or '22.5GiB', got {size!r}")
    return value


class Meter(Protocol):
    """What a device's allocator says, in bytes."""

    def held(self) -> int: ...

    def peak(self) -> int:
        """The most that was held since `restart`."""

    def restart(self) -> None: ...


class CudaMeter:
    """torch's allocator of a GPU. Measuring a step restarts torch.cuda.max_memory_allocated()."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


def cuda_meter(device: torch.device) -> Meter | None:
    return CudaMeter(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Size:
    """Of a batch: what memory grows with."""

    tokens: int
    pairs: int  # of tokens of a sequence, as in a mask

    @classmethod
    def of(cls, hidden: Tensor) -> Size:
        tokens = hidden.shape[:-1].numel()
        return cls(tokens, tokens * hidden.shape[-2] if hidden.dim() > 1 else tokens)

    def covers(self, other: Size) -> bool:
        return self.tokens >= other.tokens and self.pairs >= other.pairs


@dataclass
class Profile:
    """What batches of a size take, in bytes: `cost` of keeping each layer, and the rest of the peak."""

    size: Size
    cost: list[int]
    rest: int
    rest_kept: int
    rounds: int = 0

    def peak(self, held: int, kept: int, tokens: int) -> float:
        """The bound of a step that keeps the last `kept` layers."""
        costs = sum(self.cost[len(self.cost) - kept :]) * tokens / self.size.tokens
        return held + max(self.rest, (self.rest_kept if kept else self.rest) + costs)

    def most(self, held: int, room: float, tokens: int) -> int:
        """How many layers fit."""
        kept = 0
        while kept < len(self.cost) and self.peak(held, kept + 1, tokens) <= room:
            kept += 1
        return kept

    def refine(self, measured: dict[int, int], rest: int) -> None:
        """Takes what a step measured: the cost of the layers that it kept, and the rest of its peak with them in it."""
        self.rounds += 1
        if not measured:
            self.rest = max(self.rest, rest)
            return
        ratio = sum(measured.values()) / max(1, sum(self.cost[index] for index in measured))
        self.cost = [measured.get(index, int(cost * ratio)) for index, cost in enumerate(self.cost)]
        self.rest_kept = rest - sum(measured.values())


@dataclass(eq=False)
class _Pass:
    """One forward pass. Its graph holds it; `is_over` when its backward pass has been."""

    size: Size
    input_bytes: int
    value_bytes: int
    kept: int = 0
    held: int = 0
    profile: Profile | None = None
    is_measured: bool = False
    is_over: bool = False
    cost: dict[int, int] = field(default_factory=dict)


class MemoryBudget:
    """Chooses for each layer of each forward pass whether it is recomputed.

    Args:
        num_bytes: what the allocator may hold at most.
        layers: the layers, which are called in this order.
        checkpoint: calls a layer that is recomputed: (function, *args).
        moves_inputs: it moves the layer's input to the host, so that keeping the layer keeps that as well.
        make_meter: of a device; None keeps nothing, for lack of a meter.
        tell: is given a line for each plan.
    """

    def __init__(
        self,
        num_bytes: int,
        layers: list[nn.Module],
        checkpoint: Callable[..., Any],
        *,
        moves_inputs: bool = False,
        make_meter: Callable[[torch.device], Meter | None] = cuda_meter,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.num_bytes, self.num_layers = num_bytes, len(layers)
        self._widths = [_width(layer) for layer in layers]
        self._checkpoint, self._moves_inputs = checkpoint, moves_inputs
        self._make_meter, self._tell = make_meter, tell or _tell
        self._start()

    def _start(self) -> None:
        self._meters: dict[torch.device, Meter | None] = {}
        self._meter: Meter | None = None
        self._profiles: list[Profile] = []
        self._pass: _Pass | None = None
        self._begun: weakref.WeakSet[_Pass] = weakref.WeakSet()
        self._last_index = self.num_layers
        self._is_nested = False
        self._told: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBudget:
        """A copy of a model measures for itself."""
        copied = copy.copy(self)
        copied._checkpoint = copy.deepcopy(self._checkpoint, memo)
        copied._start()
        return copied

    @property
    def num_kept(self) -> int:
        """Layers that the last forward pass kept."""
        return 0 if self._pass is None else self._pass.kept

    def forget(self) -> None:
        """Starts as before the first batch."""
        self._profiles.clear()

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) of a layer, kept or to be recomputed."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._checkpoint(function, *args)
        # The index before again: a layer that could not be compiled is called once more.
        if self._pass is None or index == 0 or index < self._last_index:
            self._pass = None  # lets go of the one before
            self._pass = self._begin(args[0])
        self._last_index = index
        current = self._pass
        if index < self.num_layers - current.kept:
            result = self._checkpoint(function, *args)
        else:
            result = self._keep(current, index, function, *args)
        if index == self.num_layers - 1:
            self._last_index = self.num_layers
            self._watch(current, result)
        return result

    def _begin(self, hidden: Tensor) -> _Pass:
        if hidden.device not in self._meters:
            self._meters[hidden.device] = self._make_meter(hidden.device)
        self._meter = self._meters[hidden.device]
        if not self._is_nested and any(not each.is_over for each in self._begun):
            self._is_nested = True
            self._say("all layers recomputed, for there are several forward passes before a backward pass")
        current = _Pass(Size.of(hidden), _first_bytes(hidden), hidden.element_size())
        if self._meter is not None and not self._is_nested:
            self._plan(current, self._meter)
        self._begun.add(current)
        return current

    def _plan(self, current: _Pass, meter: Meter) -> None:
        current.held = meter.held()
        covering = [profile for profile in self._profiles if profile.size.covers(current.size)]
        if not covering:
            current.is_measured = True
        else:
            profile = min(covering, key=lambda each: each.size.tokens)
            current.profile = profile
            current.kept = profile.most(current.held, self._room, current.size.tokens)
            if profile.size == current.size:
                self._say_plan(current, profile)
                current.is_measured = profile.rounds < _ROUNDS
        if current.is_measured:
            meter.restart()

    @property
    def _room(self) -> float:
        return (1 - MARGIN) * self.num_bytes

    def _keep(self, current: _Pass, index: int, function: Callable[..., Any], *args: Any) -> Any:
        if not current.is_measured or self._meter is None:
            return function(*args)
        before = self._meter.held()
        result = function(*args)
        cost = self._meter.held() - before - _first_bytes(result)  # a recomputed layer has its result too
        current.cost[index] = cost + (current.input_bytes if self._moves_inputs else 0)
        return result

    def _watch(self, current: _Pass, result: Any) -> None:
        """Has `_finish` called when the backward pass is over."""
        hidden = result[0] if isinstance(result, tuple) else result
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            hidden.register_hook(lambda _: queue(lambda: self._finish(current)))  # type: ignore[no-untyped-call]

    def _finish(self, current: _Pass) -> None:
        current.is_over = True
        if not current.is_measured or self._meter is None:
            return
        current.is_measured = False
        rest = self._meter.peak() - current.held
        profile = current.profile
        if profile is None:
            values = [3 * each * current.size.tokens // 2 for each in self._widths]
            cost = [max(_LEAST * current.input_bytes, each * current.value_bytes) for each in values]
            smaller = [each for each in self._profiles if current.size.covers(each.size)]
            self._profiles = [each for each in self._profiles if each not in smaller]
            self._profiles.append(Profile(current.size, cost, rest, rest))
            return
        profile.refine(current.cost, rest)
        if profile.most(current.held, self._room, current.size.tokens) == current.kept:
            profile.rounds = _ROUNDS

    def _say_plan(self, current: _Pass, profile: Profile) -> None:
        peak = profile.peak(current.held, current.kept, current.size.tokens)
        self._say(
            f"{self.num_layers - current.kept} of {self.num_layers} layers recomputed for {current.size.tokens} "
            f"tokens: estimated {peak / 1e9:.1f} GB of {self.num_bytes / 1e9:.1f}"
        )

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(f"memory budget: {text}")


def _width(layer: nn.Module) -> int:
    """Values a token in a layer's products, operands and results."""
    products = [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    return sum(module.in_features + module.out_features for module in products)


def _first_bytes(values: Any) -> int:
    """Of the first tensor among arguments or results of a layer, its hidden states."""
    value = values[0] if isinstance(values, tuple) else values
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _tell(line: str) -> None:
    """To the logger or, where nobody listens, to stderr."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        sys.stderr.write(f"{line}\n")
