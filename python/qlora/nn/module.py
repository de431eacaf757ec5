"""What Linear4bit and Embedding4bit share: a 4-bit `weight`, its moves, and its place in state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .params import Params4bit, plain_tensor
from .quant_state import STATE_KEYS, QuantState
from .tensor import NonFiniteWeightError, dequantize_tensor


class Module4bit(torch.nn.Module):
    """A module whose parameter `weight` is a Params4bit. Mixed into a torch.nn class, before it."""

    weight: Params4bit
    #: Dotted name within the model, for error messages only.
    layer_name: str | None = None

    def describe(self) -> str:
        return f"the weight of {self.layer_name or repr(self)}"

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight before it was packed."""
        raise NotImplementedError

    # FSDP1 and the like replace `weight` by a view of the same bytes that has lost its state; the module keeps it too.
    @property
    def quant_state(self) -> QuantState | None:
        state = getattr(self.weight, "quant_state", None)
        return self.__dict__.get("_quant_state") if state is None else state

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["_quant_state"] = state
        if isinstance(self._parameters.get("weight"), Params4bit):
            self.weight.quant_state = state

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quant_state":  # torch.nn.Module would not find the property
            Module4bit.quant_state.fset(self, value)  # type: ignore[attr-defined]
            return
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Params4bit):
            self.__dict__["_quant_state"] = value.quant_state

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_quant_state", None)  # the weight carries it
        state.pop("_group", None)  # of other layers than a copy's siblings
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_quant_state"] = getattr(self._parameters.get("weight"), "quant_state", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module4bit:
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(self.describe()) from error
        # torch.nn.Module keeps the parameter object and swaps its data, so its state has to follow.
        state = self.quant_state
        if state is not None and self.weight.device.type != "meta" and state.device != self.weight.device:
            state.to(self.weight.device)
        self.__dict__["_quant_state"] = state
        return self

    # -----------------------------------------------------------------------------------------------------------------
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quant_state
        if state is not None and state.device.type != "meta":
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes 4-bit weights with their state, or 16- and 32-bit ones, which are quantised if this weight is."""
        key = f"{prefix}weight"
        state_keys = {f"{key}.{name}" for name in STATE_KEYS}
        stats = {name: state_dict[name] for name in state_keys if name in state_dict}
        value = state_dict.get(key)
        rest = {name: tensor for name, tensor in state_dict.items() if name not in state_keys}
        ours = value is not None and (stats or self._is_packed(value) or self.weight.bnb_quantized)
        if ours or stats:
            rest.pop(key, None)
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in missing if not (ours and name == key)]
        if ours and value is not None:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            try:
                self._load_weight(
                    value, {name[len(key) + 1 :]: tensor for name, tensor in stats.items()}, assign
                )
            except (ValueError, RuntimeError) as error:
                name = key if prefix or self.layer_name is None else f"{self.layer_name}.weight"
                error_msgs.append(f"qlora: {name}: {error}")

    def _is_packed(self, value: Tensor) -> bool:
        return not value.is_floating_point()

    def _load_weight(self, value: Tensor, stats: dict[str, Tensor], assign: bool) -> None:
        weight = self.weight
        device = value.device if assign or weight.device.type == "meta" else weight.device
        if stats:
            new = Params4bit.from_prequantized(value, stats, device=device)
            shape = tuple(new.quant_state.shape or ())  # type: ignore[union-attr]
            if shape != self.weight_shape():
                raise ValueError(f"expected a weight of shape {list(self.weight_shape())}, got {list(shape)}")
            if not assign and new.data_ptr() == value.data_ptr():
                new.data = new.data.clone()
        elif not value.is_floating_point():
            raise ValueError(
                f"got {value.dtype} {list(value.shape)} without {', '.join(STATE_KEYS)}: the checkpoint is truncated "
                "or not one of bitsandbytes' layout"
            )
        else:
            if tuple(value.shape) != self.weight_shape():
                raise ValueError(f"expected shape {list(self.weight_shape())}, got {list(value.shape)}")
            new = self._fresh_weight(value)
            new.quantize_on(device, name=self.describe(), check=True)
        if isinstance(weight, Params4bit) and weight.device.type == new.device.type:
            weight._become(new.data.as_subclass(Tensor), new.quant_state)  # type: ignore[arg-type]
            self.__dict__["_quant_state"] = weight.quant_state
        else:
            self.weight = new

    def _fresh_weight(self, value: Tensor) -> Params4bit:
        """`value` as a parameter to be quantised the way the present weight is or would be."""
        old = self.weight
        return Params4bit(
            value,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )

    # -----------------------------------------------------------------------------------------------------------------
    def quantized_state(self) -> QuantState:
        state = self.quant_state
        if state is None:
            raise RuntimeError(
                f"qlora.{type(self).__name__}: {self.describe()}: expected a 4-bit weight, got {self.weight.dtype} on "
                f"{self.weight.device}: move the layer to its device first (`.to(device)` quantises)"
            )
        return state

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values, in `dtype` or the dtype they were quantised from."""
        return dequantize_tensor(plain_tensor(self.weight), self.quantized_state(), dtype)

    def _format_repr(self) -> str:
        weight = self.weight
        if not isinstance(weight, Params4bit):
            return "4-bit"
        scales = "double-quantised scales" if weight.compress_statistics else "fp32 scales"
        return f"{weight.quant_type}, block_size={weight.blocksize}, {scales}"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody is to be told of the module's forward or backward passes, which who replaces them would not do."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
