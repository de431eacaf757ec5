"""The operations that transformers runs on tensors as it loads them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..nn.convert import is_conv1d_class
from ..nn.module import Module4bit
from ..nn.params import Params4bit
from ..nn.quant_state import STATE_KEYS

if TYPE_CHECKING:
    from .transformers_quantizer import QloraHfQuantizer


def is_ours(conversion: Any) -> bool:
    """Whether a weight conversion is one of these."""
    return isinstance(conversion, WeightConverter) and any(
        isinstance(op, _Op) for op in conversion.operations
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _module_of(model: Any, param_name: str) -> torch.nn.Module:
    return model.get_submodule(param_name.rpartition(".")[0])


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: QloraHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Op:
        # transformers copies a conversion for every tensor it matches; the quantizer is not to be copied with it.
        return type(self)(self.hf_quantizer)


class _Pending(Params4bit):
    """A weight on the host that transformers is about to send to its device, which quantises it on the way."""

    pending: tuple[QloraHfQuantizer, str]

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        quantizer: QloraHfQuantizer
        quantizer, layer = self.__dict__.pop("pending")
        self.__class__ = Params4bit  # type: ignore[assignment]
        return quantizer.quantize_weight(self, device, layer)


class Defer(_Op):
    """16- or 32-bit weights on the host -> parameters that quantise when they move; any other weight passes through.

    transformers moves what this conversion returns to the device that its device map says, since the conversion is
    marked `force_cpu`. Without it each weight would be copied whole, from pageable memory, before the next is read.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        ((key, value),) = input_dict.items()
        tensor: Tensor = _first(value)
        module = _module_of(model, full_layer_name)
        if not isinstance(module, Module4bit) or not full_layer_name.endswith(".weight"):
            return {key: tensor}
        if is_conv1d_class(getattr(module, "source_cls", None)):
            tensor = tensor.T
        layer = full_layer_name.removesuffix(".weight")
        if tuple(tensor.shape) != module.weight_shape():
            expected = list(module.weight_shape())
            self.hf_quantizer.failures[layer] = (
                f"expected a weight of shape {expected}, got {list(tensor.shape)}"
            )
            return {key: Params4bit(torch.empty(0), bnb_quantized=True)}
        param = _Pending(tensor, **module.weight.__dict__)
        param.pending = (self.hf_quantizer, layer)
        return {key: param}


class Quantize(_Op):
    """16- or 32-bit weights that another conversion made, already on their device -> Params4bit."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            tensor: Tensor = _first(value)
            module = _module_of(model, name)
            if not isinstance(module, Module4bit) or isinstance(tensor, Params4bit):
                result[name] = tensor
                continue
            if is_conv1d_class(getattr(module, "source_cls", None)):
                tensor = tensor.T
            layer = name.removesuffix(".weight")
            try:
                if tuple(tensor.shape) != module.weight_shape():
                    expected = list(module.weight_shape())
                    raise ValueError(f"expected a weight of shape {expected}, got {list(tensor.shape)}")
                param = self.hf_quantizer.quantize_weight(module._fresh_weight(tensor), tensor.device, layer)
            except (TypeError, ValueError) as error:
                self.hf_quantizer.failures[layer] = str(error)
                param = Params4bit(torch.empty(0), bnb_quantized=True)
            result[name] = param
        return result


class Deserialize(_Op):
    """Packed bytes and the tensors beside them -> Params4bit; any other weight passes through."""

    @staticmethod
    def source_patterns() -> list[str]:
        # "weight" last: up to transformers 5.18 the first pattern that a name contains wins.
        return [*(f"weight.{key}" for key in STATE_KEYS), "weight"]

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        module = _module_of(model, full_layer_name)
        values = {key: _first(value) for key, value in input_dict.items()}
        if not isinstance(module, Module4bit):
            if set(values) != {"weight"}:
                raise ValueError(
                    f"qlora: {full_layer_name}: expected an unquantised weight for a {type(module).__name__}, got "
                    f"{', '.join(sorted(values))}"
                )
            return {"weight": self._in_model_dtype(model, full_layer_name, values["weight"])}
        try:
            param = self._packed(module, values)
        except ValueError as error:
            self.hf_quantizer.failures[full_layer_name.removesuffix(".weight")] = str(error)
            param = Params4bit(torch.empty(0), bnb_quantized=True)
        return {"weight": param}

    @staticmethod
    def _packed(module: Module4bit, values: dict[str, Tensor]) -> Params4bit:
        weight = values.pop("weight", None)
        if weight is None:
            raise ValueError(f"weight is missing: have {', '.join(sorted(values))}")
        if not values:
            raise ValueError(
                f"got {weight.dtype} {list(weight.shape)} without the tensors of a 4-bit weight beside it"
            )
        stats = {key.removeprefix("weight."): value for key, value in values.items()}
        param = Params4bit.from_prequantized(weight, stats, device=weight.device)
        shape = param.quant_state.shape  # type: ignore[union-attr]
        if shape is None or tuple(shape) != module.weight_shape():
            got = None if shape is None else list(shape)
            raise ValueError(f"expected a weight of shape {list(module.weight_shape())}, got {got}")
        return param

    @staticmethod
    def _in_model_dtype(model: Any, name: str, value: Tensor) -> Tensor:
        # transformers 5.23 leaves the dtype of whatever passes through a quantizer's conversion to the quantizer.
        if not value.is_floating_point():
            return value
        dtype = model.get_parameter_or_buffer(name).dtype
        for pattern, kept in model._get_dtype_plan(dtype).items():
            if re.search(pattern.replace("*", ".*"), name):
                dtype = kept
        return value.to(dtype)
