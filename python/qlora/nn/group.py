"""Linear4bit layers that are given the same input, such as query, key and value: one operator call for all of them.

Generating a token reads a weight in less time than a kernel takes to start. Siblings by name (SIBLINGS) are linked by
`link_groups`; no code of a model changes. The first of them to be called computes the products of all and keeps them;
each of the others takes its own if it is given the same tensor, unchanged, and its weight and bias are what they were.
The first call that is not so switches the group off for good: the names promised what the model does not do.

Only where nothing needs a gradient, for up to MAX_ROWS rows on a GPU, in the dtype of the input. A layer under an
active LoRA adapter is not called but for `forward_with_lora`, which takes no part in this.

What is kept goes when the last sibling has taken its own or when the group switches itself off. Another thread that
comes meanwhile computes alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import function
from .params import Params4bit

if TYPE_CHECKING:
    from .linear import Linear4bit
    from .quant_state import QuantState

#: Children of one module, by name, that are given the same input.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
#: Of the input, for which a group is worth its bookkeeping.
DEVICE_TYPES = ("cuda",)
MAX_ROWS = 16


class Group:
    """Layers linked by `link_groups`. Held by its layers, as (group, index) in `Linear4bit._group`; holds them weakly.

    Attributes:
        members: references to the layers.
        is_off: whether the layers compute alone from now on.
        pending: None, or (context, input, its versions, for each layer its operands and product, or None once taken).
            Replaced whole, never written into.
    """

    def __init__(self, layers: list[Linear4bit]) -> None:
        self.members = tuple(weakref.ref(layer) for layer in layers)
        self.is_off = False
        self.pending: tuple[Any, ...] | None = None

    def product(
        self, index: int, layer: Linear4bit, x: Tensor, state: QuantState, bias: Tensor | None
    ) -> Tensor | None:
        """The layer's x W^T + bias, kept from a sibling's call or computed with the siblings'; None: compute it alone."""
        if self.is_off:
            return None
        pending = self.pending
        if pending is None:
            return self._begin(index, layer, x) if _is_small_and_plain(x) else None
        if pending[0][0] != _context(x)[0]:
            return None
        result = _take(pending, index, layer, x, state, bias)
        if result is None:
            self.is_off, self.pending = True, None
            return None
        parts = tuple(None if i == index else part for i, part in enumerate(pending[3]))
        self.pending = None if all(part is None for part in parts) else (*pending[:3], parts)
        return result

    def _begin(self, index: int, layer: Linear4bit, x: Tensor) -> Tensor | None:
        """Computes the products of all, keeps those of the others and returns the layer's own."""
        layers = [member() for member in self.members]
        if layers[index] is not layer:  # a copy that shares the attributes
            return None
        operands: list[tuple[Tensor, QuantState, Tensor | None]] = []
        for other in layers:
            if other is None or other.quant_state is None or not _is_alike(other, layer, x):
                return None
            operands.append((other.weight, other.quant_state, other.bias))
        if any(bias is not None and function.needs_gradient(bias) for _, _, bias in operands):
            return None
        products = function.group_linear(x, operands)
        parts = tuple(
            None if i == index else (*operands[i], _versions(operands[i][0], operands[i][2]), products[i])
            for i in range(len(layers))
        )
        self.pending = (_context(x), x, _versions(x), parts)
        return products[index]


def _take(
    pending: tuple[Any, ...],
    index: int,
    layer: Linear4bit,
    x: Tensor,
    state: QuantState,
    bias: Tensor | None,
) -> Tensor | None:
    """The product of the layer among what is pending, if it is that of these operands and nothing has changed."""
    context, kept_x, versions, parts = pending
    part = parts[index]
    if part is None or x is not kept_x or not _is_small_and_plain(x):
        return None
    kept_weight, kept_state, kept_bias, operand_versions, product = part
    if kept_weight is not layer.weight or kept_state is not state or kept_bias is not bias:
        return None
    if bias is not None and function.needs_gradient(bias):
        return None
    if (context, versions, operand_versions) != (_context(x), _versions(x), _versions(layer.weight, bias)):
        return None
    result: Tensor = product
    return result


def _is_small_and_plain(x: Tensor) -> bool:
    if type(x) is not Tensor or x.device.type not in DEVICE_TYPES or function.needs_gradient(x):
        return False
    if x.numel() > MAX_ROWS * x.shape[-1]:
        return False
    if torch.compiler.is_compiling():
        return True
    is_watched = torch._C._len_torch_function_stack() > 0 or torch._C._are_functorch_transforms_active()
    return not (is_watched or x.is_inference())


def _is_alike(other: Linear4bit, layer: Linear4bit, x: Tensor) -> bool:
    """Whether one operator call can serve both layers for x, as each by itself would compute it."""
    if type(other).forward is not type(layer).forward or other.compute_dtype is not layer.compute_dtype:
        return False
    weight, bias, state, other_state = other.weight, other.bias, layer.quant_state, other.quant_state
    # Sharded weights are of another type; weights that are elsewhere until their own call (offload), on another device.
    if type(weight) is not Params4bit or weight.device != x.device or state is None or other_state is None:
        return False
    if bias is not None and bias.dtype != x.dtype:
        return False
    if not torch.compiler.is_compiling() and (
        weight.is_inference() or (bias is not None and bias.is_inference())
    ):
        return False
    return (
        other.in_features == layer.in_features
        and other_state.blocksize == state.blocksize
        and other_state.quant_type == state.quant_type
        and other_state.nested == state.nested
    )


def _context(x: Tensor) -> tuple[int, int]:
    """The thread and the stream, between which nothing is handed over."""
    if torch.compiler.is_compiling():
        return 0, 0
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
    return threading.get_ident(), stream


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Numbers that change with every write. torch.compile has none: there a write to the input goes unseen."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(tensor._version for tensor in tensors if tensor is not None)


def _base_layer(module: torch.nn.Module | None) -> torch.nn.Module | None:
    """What PEFT's layers, if any, are wrapped around."""
    while module is not None and "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def link_groups(model: torch.nn.Module) -> None:
    """Lets the 4-bit layers of a model that share their input compute together: see the top of qlora.nn.group.

    `quantize_` and from_pretrained have done it. Again, it links copies (which are not linked) and what had switched
    itself off.
    """
    from .linear import Linear4bit

    unlink_groups(model)
    for parent in model.modules():
        for names in SIBLINGS:
            children = [_base_layer(parent._modules.get(name)) for name in names]
            layers = [
                child
                for child in children
                if isinstance(child, Linear4bit) and type(child).forward is Linear4bit.forward
            ]
            if len({id(layer) for layer in layers}) < max(2, len(layers)):
                continue
            if len({layer.in_features for layer in layers}) > 1 or any(layer._group for layer in layers):
                continue
            group = Group(layers)
            for index, layer in enumerate(layers):
                layer._group = (group, index)


def unlink_groups(model: torch.nn.Module) -> None:
    """Lets every 4-bit layer of a model compute alone."""
    from .linear import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module._group = None
