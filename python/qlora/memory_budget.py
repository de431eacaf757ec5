"""Which layers are recomputed in backward: as few as a memory budget allows.

The last layers are the ones that keep their activations: backward frees these before it recomputes the first layer. So
at any time of a step that keeps n layers, at most what keeping them costs is held beside what a step that recomputes all
layers holds then:

    peak <= held + max(rest_0, rest_n + sum of the kept layers' cost)

held is what is allocated when forward begins: weights, optimizer state, gradients of earlier batches. The others are
measured. A batch larger than any before is run with every layer recomputed, and each layer's cost is what its
recomputation leaves allocated; rest_0 is the peak less held. The next batch of up to that size keeps what fits, and is
measured again (rest_n). Costs grow in proportion to the tokens; rest is not taken to shrink with them.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["MemoryBudget", "parse_bytes"]

MARGIN = 0.02  # of the budget, left free
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
    is_final: bool = False

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

    def refine(self, cost: list[int], rest: int, kept: int) -> None:
        """Takes what a step that kept `kept` layers measured; of these, `cost` is exact."""
        first = len(cost) - kept
        if kept:
            ratio = sum(cost[first:]) / max(1, sum(self.cost[first:]))
            self.cost = [int(each * ratio) for each in self.cost[:first]] + cost[first:]
            self.rest_kept = rest - sum(cost[first:])
        else:
            self.rest = self.rest_kept = max(self.rest, rest)


@dataclass(eq=False)
class _Pass:
    """One forward pass. What is recomputed of it holds it, so that it is gone when its backward pass is over."""

    size: Size
    kept: int
    held: int = 0
    input_bytes: int = 0
    profile: Profile | None = None
    is_measured: bool = False
    cost: dict[int, int] = field(default_factory=dict)
    recomputed: set[int] = field(default_factory=set)


class _Recomputation(AbstractContextManager[None]):
    """Surrounds the recomputation of a layer, as often as that happens, and measures what it leaves allocated."""

    def __init__(self, budget: MemoryBudget, of: _Pass, index: int) -> None:
        self._budget, self._pass, self._index = budget, of, index
        self._before = 0

    def __enter__(self) -> None:
        if self._pass.is_measured:
            self._before = self._budget.held()

    def __exit__(self, *args: object) -> None:
        if self._pass.is_measured:
            self._budget.recomputed(self._pass, self._index, self._budget.held() - self._before)


class MemoryBudget:
    """Chooses for each layer of each forward pass whether it is recomputed.

    Args:
        num_bytes: what the allocator may hold at most.
        num_layers: layers, which are called in the order of their indices.
        checkpoint: of a layer that is recomputed: (function, *args, context_fn=...) as torch's.
        moves_inputs: it moves the layer's input to the host, so that keeping the layer keeps that as well.
        make_meter: of a device; None keeps nothing, for lack of a meter.
        tell: is given a line for each plan.
    """

    def __init__(
        self,
        num_bytes: int,
        num_layers: int,
        checkpoint: Callable[..., Any],
        *,
        moves_inputs: bool = False,
        make_meter: Callable[[torch.device], Meter | None] = cuda_meter,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.num_bytes, self.num_layers = num_bytes, num_layers
        self._checkpoint, self._moves_inputs = checkpoint, moves_inputs
        self._make_meter, self._tell = make_meter, tell or _tell
        self._meters: dict[torch.device, Meter | None] = {}
        self._meter: Meter | None = None
        self._profiles: list[Profile] = []
        self._pass: _Pass | None = None
        self._open: weakref.WeakSet[_Pass] = weakref.WeakSet()
        self._last_index = num_layers
        self._is_nested = False
        self._told: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBudget:
        """A copy of a model measures for itself."""
        return MemoryBudget(
            self.num_bytes,
            self.num_layers,
            copy.deepcopy(self._checkpoint, memo),
            moves_inputs=self._moves_inputs,
            make_meter=self._make_meter,
            tell=self._tell,
        )

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) of a layer, kept or to be recomputed."""
        if torch.compiler.is_compiling():
            return self._checkpoint(function, *args)
        if self._pass is None or index <= self._last_index:
            self._pass = None  # lets go of the one before
            self._pass = self._begin(args[0])
        self._last_index = index
        current = self._pass
        if index >= self.num_layers - current.kept:
            return self._keep(current, index, function, *args)
        context = _Recomputation(self, current, index)
        return self._checkpoint(function, *args, context_fn=lambda: (nullcontext(), context))

    @property
    def num_kept(self) -> int:
        """Layers that the last forward pass kept."""
        return 0 if self._pass is None else self._pass.kept

    def forget(self) -> None:
        """Starts as before the first batch."""
        self._profiles.clear()

    def held(self) -> int:
        return 0 if self._meter is None else self._meter.held()

    def _begin(self, hidden: Tensor) -> _Pass:
        if hidden.device not in self._meters:
            self._meters[hidden.device] = self._make_meter(hidden.device)
        self._meter = self._meters[hidden.device]
        size = Size.of(hidden)
        if len(self._open) and not self._is_nested:
            self._is_nested = True
            self._say("all layers recomputed, for there are several forward passes before a backward pass")
        current = _Pass(size, 0, input_bytes=_first_bytes(hidden))
        if self._meter is not None and not self._is_nested:
            self._plan(current, self._meter)
        self._open.add(current)
        return current

    def _plan(self, current: _Pass, meter: Meter) -> None:
        current.held = meter.held()
        covering = [profile for profile in self._profiles if profile.size.covers(current.size)]
        if covering:
            profile = min(covering, key=lambda each: each.size.tokens)
            room = (1 - MARGIN) * self.num_bytes
            current.profile = profile
            current.kept = profile.most(current.held, room, current.size.tokens)
            if profile.size == current.size:
                self._say_plan(current, profile)
        profile_is_final = current.profile is not None and (
            current.profile.is_final or current.profile.size != current.size
        )
        current.is_measured = not profile_is_final and current.kept < self.num_layers
        if current.is_measured:
            meter.restart()

    def _keep(self, current: _Pass, index: int, function: Callable[..., Any], *args: Any) -> Any:
        if not current.is_measured:
            return function(*args)
        before = self.held()
        result = function(*args)
        cost = self.held() - before - _first_bytes(result)  # a recomputed layer has its result too
        current.cost[index] = cost + (_first_bytes(args) if self._moves_inputs else 0)
        return result

    def recomputed(self, current: _Pass, index: int, left: int) -> None:
        """A layer of a measured pass was recomputed, which left so many bytes allocated."""
        if not current.recomputed:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(current))
        if index not in current.recomputed:
            current.recomputed.add(index)
            moved = current.input_bytes if self._moves_inputs else 0
            current.cost[index] = left + moved

    def _finish(self, current: _Pass) -> None:
        """A measured backward pass is over."""
        if len(current.cost) < self.num_layers or self._meter is None or not current.is_measured:
            return  # not all layers were in it
        current.is_measured = False
        rest = self._meter.peak() - current.held
        cost = [current.cost[index] for index in range(self.num_layers)]
        profile = current.profile
        if profile is None:
            kept = [each for each in self._profiles if not current.size.covers(each.size)]
            self._profiles = [*kept, Profile(current.size, cost, rest, rest)]
            return
        profile.refine(cost, rest, current.kept)
        room = (1 - MARGIN) * self.num_bytes
        profile.is_final = profile.most(current.held, room, current.size.tokens) == current.kept

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
