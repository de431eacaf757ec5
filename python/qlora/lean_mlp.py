"""The feed-forward part of a recomputed layer: in tiles of tokens, and without the product that nobody reads.

Gradient checkpointing recomputes a layer to get what its backward pass reads. Of y = down(act(gate(x)) * up(x)) that is
all but y itself, a quarter of the layer's arithmetic; and the widest tensors of a layer, all of which one tile of tokens
after another can use:

    backward of a layer   its recomputation stops at x
                          for each tile of x: gate, up, the input of down; gradients; gone

x is saved by a node of its own (`_Saved`) ahead of the computation, so that torch's checkpoint, which stops once it has
all that was saved, stops there. Models whose layers save something after it (Gemma 2's norms) compute it once more
than others would, which is noticed, and their layers are recomputed in the ordinary way from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .nn.linear import Linear4bit

__all__ = ["TILE", "LeanMlps", "give_back"]

TILE = 4096  # tokens; a guess: products over fewer rows are slower, more rows take more memory

_PARTS = {"gate_proj", "up_proj", "down_proj"}
_current: ContextVar[_Run | None] = ContextVar("qlora_lean_mlp", default=None)


class _Run:
    """A layer under a checkpoint: called once in forward, and again for each recomputation."""

    def __init__(self, of: LeanMlps, function: Callable[..., Any]) -> None:
        self.of, self._function = of, function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        token = _current.set(self)
        try:
            return self._function(*args, **kwargs)
        finally:
            _current.reset(token)


class LeanMlps:
    """Makes the feed-forward modules of a model lean where their layer goes through `within`.

    Args:
        tile: most tokens of a tile.
    """

    def __init__(self, tile: int = TILE) -> None:
        self.tile = tile
        self.is_useful = True

    def take(self, layers: list[nn.Module]) -> None:
        """Those among the layers' parts that have gate_proj, up_proj, down_proj and an activation, and no more.

        Not those whose `forward` somebody has replaced, nor those of compiled layers (`give_back`).
        """
        for layer in layers:
            if hasattr(type(layer), "_qlora_region"):
                continue
            for part in layer.children():
                if _is_gated(part):
                    part.forward = partial(_forward, part)

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's function as the checkpoint is to call it."""
        return _Run(self, function) if self.is_useful else function


def give_back(model: nn.Module) -> None:
    """The parts of a model that were taken have their own `forward` again.

    torch.compile would compile a layer with a `forward` of its own apart from all others.
    """
    for module in model.modules():
        if _is_taken(module):
            del module.forward


def _is_taken(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward


def _is_gated(module: nn.Module) -> bool:
    if "forward" in vars(module) and not _is_taken(module):
        return False
    names = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    return names == _PARTS and not any(True for _ in module.parameters(recurse=False))


def _forward(mlp: Any, x: Tensor) -> Tensor:
    plain = type(mlp).forward
    run = None if torch.compiler.is_compiling() else _current.get()
    if run is None or not x.requires_grad or not torch.is_grad_enabled() or not _is_served(mlp):
        result: Tensor = plain(mlp, x)
        return result
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    x = _Saved.apply(x)
    if run.calls > 1:  # a recomputation that did not stop there
        run.of.is_useful = False
    token = _current.set(None)
    try:
        lean: Tensor = _LeanMlp.apply(x, x.grad_fn, mlp, run.of.tile, *trained)
    finally:
        _current.reset(token)
    return lean


def _is_served(mlp: nn.Module) -> bool:
    """Whether all that it computes is known to draw no random numbers, and its products to be read by nobody."""
    products = [module for name, module in mlp.named_children() if name in _PARTS]
    return not _drops(mlp) and all(_is_known(product) for product in products)


def _drops(mlp: Any) -> bool:
    if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in mlp.modules()):
        return True
    return mlp.training and any("dropout" in name and value for name, value in vars(mlp).items())


def _is_known(product: Any) -> bool:
    """A linear layer or plain LoRA over one. Other adapters, some of which are linear layers by class, may draw, or have
    gradients that depend on the result: DoRA, IA3, BOFT, PVeRA."""
    if "forward" in vars(product):
        return False
    if isinstance(product, nn.Linear) and not hasattr(product, "base_layer"):
        return True
    variants = getattr(product, "lora_variant", None)
    return (
        variants is not None
        and isinstance(product.base_layer, nn.Linear)
        and not any(name in variants for name in product.active_adapters)
    )


class _Saved(torch.autograd.Function):
    """x; its node holds it for the one behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _LeanMlp(torch.autograd.Function):
    """mlp(x); saves nothing itself: `saved` is the node of `_Saved`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Any, mlp: Any, tile: int, *trained: Tensor) -> Tensor:
        ctx.saved, ctx.mlp, ctx.tile, ctx.trained = saved, mlp, tile, trained
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        parts = [type(mlp).forward(mlp, rows) for rows in _tiles(x, tile)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved.saved_tensors
        kind, dtype, is_enabled = ctx.autocast
        sums: list[Tensor] = []  # of the trained parameters that are used: merged adapters are not
        is_used: list[bool] = []
        towards_x: list[Tensor] = []
        for part, grad_rows in zip(_tiles(x, ctx.tile), _tiles(grad, ctx.tile), strict=True):
            rows = part.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(kind, dtype, is_enabled), _no_result(ctx.mlp.down_proj):
                result = type(ctx.mlp).forward(ctx.mlp, rows)
            towards, *found = torch.autograd.grad(result, [rows, *ctx.trained], grad_rows, allow_unused=True)
            towards_x.append(towards)
            used = [each for each in found if each is not None]
            if not sums:
                sums, is_used = used, [each is not None for each in found]
            else:
                torch._foreach_add_(sums, used)
        dx = (towards_x[0] if len(towards_x) == 1 else torch.cat(towards_x)).view(x.shape)
        gradients = iter(sums)
        return dx, None, None, None, *(next(gradients) if each else None for each in is_used)


def _tiles(x: Tensor, tile: int) -> tuple[Tensor, ...]:
    """Rows [tokens, width] in as few parts of at most `tile` tokens as there can be, of one size."""
    rows = x.reshape(-1, x.shape[-1])
    count = -(-len(rows) // tile)
    return torch.split(rows, -(-len(rows) // count)) if count > 1 else (rows,)


@contextmanager
def _no_result(module: Any) -> Iterator[None]:
    """Meanwhile a 4-bit layer computes what its backward pass reads, but its result is arbitrary.

    Not where a hook may look at it.
    """
    layer = getattr(module, "base_layer", module)
    if not isinstance(layer, Linear4bit) or module._forward_hooks or layer._forward_hooks:
        yield
        return
    layer.has_result = False
    try:
        yield
    finally:
        layer.has_result = True
