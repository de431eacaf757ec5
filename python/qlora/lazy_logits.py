"""Logits that are computed only if somebody looks at them.

A causal language model computes `logits = lm_head(hidden)` and hands them to its loss. While training, that is the
largest tensor of the step (8,192 tokens of a 128 k vocabulary: 2.1 GB in bfloat16) and nobody but the loss reads it.
`LazyHead` returns a `LazyLogits` in its place: shape, dtype and device without values. `qlora.loss.causal_lm_loss`
takes the hidden states and the head's weight out of it and works chunk by chunk; every other operation on it first
computes the ordinary logits, with their ordinary gradient, so models that scale or cap their logits and trainers that
read them stay correct and merely save nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

# What may be asked of the logits without computing them.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}


class LazyLogits(Tensor):
    """hidden @ head.weight^T + head.bias, not yet computed: [*hidden.shape[:-1], head.out_features]."""

    _hidden: Tensor
    _head: nn.Linear
    _compute: torch.dtype
    _result: Tensor | None

    @staticmethod
    def __new__(  # noqa: PYI034
        cls, hidden: Tensor, head: nn.Linear, compute: torch.dtype, dtype: torch.dtype
    ) -> LazyLogits:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (*hidden.shape[:-1], head.out_features),
            dtype=dtype,
            device=hidden.device,
            requires_grad=hidden.requires_grad,
        )
        self._hidden, self._head, self._compute, self._result = hidden, head, compute, None
        return self

    @property
    def is_computed(self) -> bool:
        return self._result is not None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias in the dtype of the product."""
        bias = self._head.bias
        return (
            self._hidden.to(self._compute),
            self._head.weight.to(self._compute),
            None if bias is None else bias.to(self._compute),
        )

    def compute(self) -> Tensor:
        """The logits as an ordinary tensor, computed on the first call."""
        if self._result is None:
            with torch.autocast(self._hidden.device.type, enabled=False):
                self._result = F.linear(*self.inputs()).to(self.dtype)
        return self._result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            if func is Tensor.float and not args[0].is_computed:  # accelerate casts a model's outputs
                source = args[0]
                return cls(source._hidden, source._head, source._compute, torch.float32)
        args, kwargs = pytree.tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Reached only below autograd, where computing the values would lose their gradient.
        raise RuntimeError(f"qlora.LazyLogits: {func} reached logits that were not computed")


class LazyHead(nn.Linear):
    """An output head that, while its model trains with gradients, returns LazyLogits."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            not self.training
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not self._is_plain()
        ):
            return super().forward(input)
        kind = input.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return LazyLogits(input, self, compute, compute)

    def _is_plain(self) -> bool:
        """Whether the weight can be read after forward: frozen, here, and nobody's shard."""
        weight, bias = self.weight, self.bias
        return (
            type(weight) is nn.Parameter
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not weight.is_meta
            and not hasattr(weight, "ds_id")  # DeepSpeed gathers it for the length of forward only
            and not hasattr(self, "_hf_hook")  # as accelerate does when it offloads
            and not self._forward_hooks
        )
