"""Linear4bit layers that are given the same input, such as query, key and value: one operator call for all of them.

Generating a token reads a weight in less time than a kernel takes to start. Siblings by name (SIBLINGS) are linked by
`link_groups`; no code of a model changes. The first of them to be called computes the products of all and keeps them;
each of the others takes its own if it is given the same tensor, unchanged, and its weight and bias are what they were.
The first call that is not so switches the group off for good: the names promised what the model does not do.

Only where nothing needs a gradient, for up to MAX_ROWS rows on a GPU, in the dtype of the input. A layer under an
active LoRA adapter is not called but for `forward_with_lora`, which takes no part in this: the first call of a sibling
without one switches their group off. torch.compile sees no write to the input between two siblings; so there only
models take part whose code is known to make none: `from_pretrained` links them with in_compiled=True.

What is kept goes when the last sibling has taken its own or when the group switches itself off. Another thread that
comes meanwhile computes alone; after MAX_FOREIGN_CALLS of them it is dropped, for its thread may be gone.
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
MAX_FOREIGN_CALLS = 64


class Group:
    """Layers linked by `link_groups`. Held by its layers, as (group, index) in `Linear4bit._group`; holds them weakly.

    Attributes:
        members: references to the layers.
        in_compiled: whether it takes part under torch.compile.
        is_off: whether the layers compute alone from now on.
        num_foreign: calls by other threads since one took its product.
        pending: None, or (context, input, its version, how many products are left, for each layer its operands, their
            versions and its product, or None once taken). Replaced whole, never written into.
    """

    def __init__(self, layers: list[Linear4bit], in_compiled: bool) -> None:
        self.in_compiled = in_compiled
        self.num_foreign = 0
        self.members = tuple(weakref.ref(layer) for layer in layers)
        self.is_off = False
        self.pending: tuple[Any, ...] | None = None

    # In eager mode this runs for every layer and token, so it is short of function calls.
    def product(
        self, index: int, layer: Linear4bit, x: Tensor, state: QuantState, bias: Tensor | None
    ) -> Tensor | None:
        """The layer's x W^T + bias, kept from a sibling's call or computed with the siblings'; None: compute it alone."""
        if self.is_off or (not self.in_compiled and torch.compiler.is_compiling()):
            return None
        pending = self.pending
        if pending is None:
            return self._begin(index, layer, x, state)
        context, kept_x, version, num_left, parts = pending
        if context[0] != _context(x)[0]:
            self.num_foreign += 1
            if self.num_foreign > MAX_FOREIGN_CALLS:
                self.num_foreign, self.pending = 0, None
            return None
        part = parts[index]
        is_same = part is not None and x is kept_x and not _is_watched(x)
        if (
            not is_same
            or not _is_unchanged(part, layer, state, bias)
            or (context, version)
            != (
                _context(x),
                _versions(x),
            )
        ):
            self.is_off, self.pending = True, None
            return None
        rest = (*parts[:index], None, *parts[index + 1 :])
        if not torch.compiler.is_compiling():  # which would write it at every call
            self.num_foreign = 0
        self.pending = (context, kept_x, version, num_left - 1, rest) if num_left > 1 else None
        result: Tensor = part[-1]
        return result

    def _begin(self, index: int, layer: Linear4bit, x: Tensor, state: QuantState) -> Tensor | None:
        """Computes the products of all, keeps those of the others and returns the layer's own."""
        if not _is_worth_it(x) or self.members[index]() is not layer:  # not a copy that shares the attributes
            return None
        operands: list[tuple[Tensor, QuantState, Tensor | None]] = []
        with torch._C.DisableTorchFunctionSubclass():  # or a Params4bit takes 5 µs to name its device
            for member in self.members:
                operand = _operand(member(), layer, x, state)
                if operand is None:
                    return None
                operands.append(operand)
            versions = [_versions(weight, bias) for weight, _, bias in operands]
        products = function.group_linear(x, operands)
        parts = [
            (*operands[i], versions[i], products[i]) if i != index else None for i in range(len(operands))
        ]
        self.pending = (_context(x), x, _versions(x), len(parts) - 1, tuple(parts))
        return products[index]


def _is_worth_it(x: Tensor) -> bool:
    # Its dynamic sizes MAX_ROWS would bound. The flag itself: the function is True in every graph of torch 2.10.
    if torch.compiler._is_exporting_flag:
        return False
    if x.device.type not in DEVICE_TYPES or type(x) is not Tensor or x.numel() > MAX_ROWS * x.shape[-1]:
        return False
    if torch.compiler.is_compiling():
        return not _is_watched(x)
    # Products made in inference mode could not be saved for backward by a sibling outside it.
    return not (_is_watched(x) or x.is_inference() or torch.is_inference_mode_enabled())


def _is_watched(x: Tensor) -> bool:
    """Whether somebody wants to see each layer's operator by itself."""
    if function.needs_gradient(x):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_function_stack() > 0 or torch._C._are_functorch_transforms_active()


def _operand(
    other: Linear4bit | None, layer: Linear4bit, x: Tensor, state: QuantState
) -> tuple[Tensor, QuantState, Tensor | None] | None:
    """Weight, state and bias of a layer, if one call can serve it and `layer` for x, as each by itself would compute."""
    if other is None:
        return None
    weight: Any = other._parameters["weight"]
    bias = other._parameters["bias"]
    # Sharded weights are of another type; weights that are elsewhere until their own call (offload), on another device.
    if type(weight) is not Params4bit or weight.device != x.device:
        return None
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and weight.is_inference():
        return None
    if bias is not None and (
        bias.dtype != x.dtype or function.needs_gradient(bias) or (not is_compiling and bias.is_inference())
    ):
        return None
    other_state = weight.quant_state
    if other_state is None:
        return None
    if other is not layer and (
        other.in_features != layer.in_features
        or other.compute_dtype is not layer.compute_dtype
        or type(other).forward is not type(layer).forward
        or other_state.blocksize != state.blocksize
        or other_state.quant_type != state.quant_type
        or other_state.nested != state.nested
    ):
        return None
    return weight, other_state, bias


def _is_unchanged(part: tuple[Any, ...], layer: Linear4bit, state: QuantState, bias: Tensor | None) -> bool:
    """Whether a product is what the layer would compute."""
    weight: Any = layer._parameters["weight"]
    kept_weight, kept_state, kept_bias, versions, _ = part
    if kept_weight is not weight or kept_state is not state or kept_bias is not bias:
        return False
    if bias is not None and function.needs_gradient(bias):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(versions == _versions(weight, bias))


def _context(x: Tensor) -> tuple[int, int]:
    """The thread and the stream, between which nothing is handed over."""
    if torch.compiler.is_compiling():
        return 0, 0
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
    return threading.get_ident(), stream


def _versions(tensor: Tensor, other: Tensor | None = None) -> tuple[int, int]:
    """Numbers that change with every write. torch.compile has none: there a write to the input goes unseen."""
    if torch.compiler.is_compiling():
        return 0, 0
    return tensor._version, 0 if other is None else other._version


def _base_layer(module: torch.nn.Module | None) -> torch.nn.Module | None:
    """What PEFT's layers, if any, are wrapped around."""
    while module is not None and "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def link_groups(model: torch.nn.Module, *, in_compiled: bool = False) -> None:
    """Lets the 4-bit layers of a model that share their input compute together: see the top of qlora.nn.group.

    `quantize_` and from_pretrained have done it. Again, it links copies (which are not linked) and what had switched
    itself off.

    Args:
        model: whose modules' children are linked.
        in_compiled: also under torch.compile, where a write to the input between two of the layers is not seen. As
            transformers' models do no such thing, from_pretrained says True.
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
            group = Group(layers, in_compiled)
            for index, layer in enumerate(layers):
                layer._group = (group, index)


def unlink_groups(model: torch.nn.Module) -> None:
    """Lets every 4-bit layer of a model compute alone."""
    from .linear import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module._group = None
