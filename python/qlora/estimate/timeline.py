"""What memory a training step holds when: every storage's birth, death and phase, and the peak by term.

The mode watches real and fake tensors alike. A block is one storage, its size rounded up as torch's CUDA allocator
rounds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .terms import GRADIENTS, KEPT, LOSS, OPTIMIZER, WORKING, WORKSPACE

ALLOCATION_UNIT = 512  # bytes, of torch's CUDA caching allocator

#: In the order in which a step passes through them.
PHASES = ("forward", "loss", "backward of the loss", "backward", "optimizer")


@dataclass
class Block:
    """One storage. `label` is its term, where that is known at its birth; `died` is None while it lives."""

    size: int
    born: str
    label: str | None
    died: str | None = None

    def term(self) -> str:
        if self.label is not None:
            return self.label
        if self.born in ("loss", "backward of the loss"):
            return LOSS
        outlives_forward = self.died is None or PHASES.index(self.died) > PHASES.index("loss")
        return KEPT if self.born == "forward" and outlives_forward else WORKING


@dataclass
class Peak:
    """The most that was held at one time: bytes by term, and in which phase that was."""

    terms: dict[str, int] = field(default_factory=dict)
    phase: str = PHASES[0]

    @property
    def num_bytes(self) -> int:
        return sum(self.terms.values())


class Timeline(TorchDispatchMode):
    """While active, records the storages that operators return, and those given to `hold`.

    Args:
        workspace: bytes that an operator allocates and frees beside its outputs, of (operator, arguments).
    """

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...]], int] | None = None) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self._workspace = workspace
        self._known: dict[int, tuple[weakref.ref[Any], Block]] = {}
        self._events: list[tuple[int, Block, str]] = []
        self.held = 0  # now
        self.highest = 0  # since it was last set

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold(pytree.tree_leaves(result))
        size = 0 if self._workspace is None else self._workspace(func, args)
        if size:
            block = Block(_rounded(size), self.phase, WORKSPACE)
            self._record(block.size, block)
            self._record(-block.size, block)
        return result

    def hold(self, values: Iterable[Any], label: str | None = None) -> None:
        """Records the storages of the tensors among `values` that are new, and labels all of them, if given a label."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            known = self._known.get(id(storage))
            if known is None:
                known = self._add(storage, label)
            if label is not None and known is not None:
                known[1].label = label

    def _add(self, storage: Any, label: str | None) -> tuple[weakref.ref[Any], Block] | None:
        size = _rounded(storage.nbytes())
        if size == 0:
            return None
        block = Block(size, self.phase, label)
        key = id(storage)

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            block.died = self.phase
            self._record(-size, block)

        self._known[key] = entry = (weakref.ref(storage, forget), block)
        self._record(size, block)
        return entry

    def _record(self, change: int, block: Block) -> None:
        self._events.append((change, block, self.phase))
        self.held += change
        self.highest = max(self.highest, self.held)

    def peak(self) -> Peak:
        """The highest point since the beginning."""
        held = highest = at = 0
        for index, (change, _, _) in enumerate(self._events):
            held += change
            if held > highest:
                highest, at = held, index
        live: dict[int, Block] = {}
        for change, block, _ in self._events[: at + 1]:
            if change > 0:
                live[id(block)] = block
            else:
                live.pop(id(block), None)
        peak = Peak(phase=self._events[at][2] if self._events else PHASES[0])
        for block in live.values():
            term = block.term()
            peak.terms[term] = peak.terms.get(term, 0) + block.size
        return peak


def _rounded(size: int) -> int:
    return -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT


class Step:
    """Training steps of a model, each under a Timeline in which its phases are marked.

    Args:
        model: with adapters, ready to train; parameters that require a gradient are what is trained.
        held: term and tensor of what the model holds.
    """

    def __init__(self, model: Any, held: Iterable[tuple[str, Tensor]]) -> None:
        self._model, self._held = model, list(held)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, fused=True)
        self._timeline = Timeline()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._reach_head)
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)

    def run(
        self,
        inputs: dict[str, Tensor],
        timeline: Timeline,
        *,
        keeps_gradients: bool,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Forward, backward and optimizer step, watched by `timeline`.

        keeps_gradients: whether those of the run before are there, to be added to.
        """
        if not keeps_gradients:
            self._optimizer.zero_grad(set_to_none=True)
        self._timeline = timeline
        for term, tensor in self._held:
            timeline.hold([tensor], term)
        timeline.hold((parameter.grad for parameter in self._trained), GRADIENTS)
        self._hold_optimizer()
        timeline.hold(inputs.values(), LOSS)
        kind = next(iter(inputs.values())).device.type
        with timeline:
            with torch.autocast(kind, autocast, enabled=autocast is not None):
                loss = self._model(**inputs).loss
            timeline.phase = "backward of the loss"
            loss.backward()
            timeline.phase = "optimizer"
            self._optimizer.step()
            self._hold_optimizer()

    def _hold_optimizer(self) -> None:
        for state in self._optimizer.state.values():
            self._timeline.hold(state.values(), OPTIMIZER)

    def _reach_head(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self._timeline.phase = "loss"
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._leave_loss)

    def _leave_loss(self, gradient: Tensor) -> None:
        self._timeline.phase = "backward"

    def _label_gradient(self, parameter: Tensor) -> None:
        self._timeline.hold([parameter.grad], GRADIENTS)
