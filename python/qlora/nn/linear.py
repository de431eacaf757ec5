"""Linear4bit: a linear layer over a frozen 4-bit weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..format import DEFAULT_BLOCK_SIZE
from . import function
from .module import Module4bit
from .params import Params4bit
from .quant_state import QuantState

if TYPE_CHECKING:
    from .group import Group


class Linear4bit(Module4bit, torch.nn.Linear):  # type: ignore[misc]  # weight is a Params4bit
    """y = x W^T + b with W stored in 4 bits.

    Arguments and attributes are bitsandbytes'. The first `.to(device)` quantises the weight; its bytes and scales are
    never cast after that. `qlora.quantize_(model)` replaces the nn.Linear layers of a model by this one.

    Args:
        input_features, output_features: k and n; the weight is [n, k].
        bias: whether there is a bias, [n], kept as it is and trainable as in nn.Linear.
        compute_dtype: dtype of the product: the input is cast to it and the result cast back. None: the input's own
            dtype, and under autocast autocast's, in which the result then stays, as nn.Linear's would.
        compress_statistics: double quantisation of the scales.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype under which the packed bytes are kept.
        device: where the fresh, not yet quantised weight is made.
        block_size: values that share a scale.
        dtype: dtype of the fresh weight and the bias.

    Forward: x float32, float16 or bfloat16 [..., k] -> [..., n]. Raises ValueError for another last dimension and
    RuntimeError while the weight is not quantised.
    """

    #: The group of the layers that share this one's input, and its index there (group.py).
    _group: tuple[Group, int] | None = None

    has_result = True  # False while only the backward pass of a call counts (`qlora.lean_mlp`)

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device, dtype)
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            blocksize=block_size,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        compute_dtype, result_dtype = self.dtypes(input)
        x, state, bias = self._operands(input, compute_dtype)
        if self._group is not None and x is input and compute_dtype == result_dtype:
            group, index = self._group
            product = group.product(index, self, x, state, bias)
            if product is not None:
                return product
        result = function.linear(x, self.weight, state, bias, has_result=self.has_result)
        return result if compute_dtype == result_dtype else result.to(result_dtype)

    def forward_with_lora(
        self, input: Tensor, a: Tensor, b: Tensor, scaling: float, adapter_input: Tensor | None = None
    ) -> Tensor:
        """forward(input) + scaling (x' A^T) B^T, products in the compute dtype: a [r, k], b [n, r] of any float.

        x' is adapter_input, of the shape of input, or else input itself.
        """
        compute_dtype, result_dtype = self.dtypes(input)
        x, state, bias = self._operands(input, compute_dtype)
        if adapter_input is not None:
            adapter_input = adapter_input.to(compute_dtype)
        result = function.lora_linear(
            x, self.weight, state, bias, a, b, scaling, adapter_input, has_result=self.has_result
        )
        return result if compute_dtype == result_dtype else result.to(result_dtype)

    def dtypes(self, input: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes in which the product is computed and in which the result is returned."""
        kind = input.device.type
        result = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self.compute_dtype is None:
            return result, result
        return self.compute_dtype, input.dtype

    def _operands(self, input: Tensor, dtype: torch.dtype) -> tuple[Tensor, QuantState, Tensor | None]:
        """Input and bias in `dtype`, and the weight's state."""
        # Not self.quant_state, which says the same: torch.compile would look into the property at every call.
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is None:
            state = self.quantized_state()
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"qlora.Linear4bit: input: expected a last dimension of {self.in_features}, got {list(input.shape)}"
            )
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return input if input.dtype == dtype else input.to(dtype), state, bias

    def extra_repr(self) -> str:
        bias = self.bias is not None
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        return f"{size}, {self._format_repr()}, compute_dtype={self.compute_dtype}"


class LinearNF4(Linear4bit):
    """Linear4bit with the NF4 code book."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *(
                input_features,
                output_features,
                bias,
                compute_dtype,
                compress_statistics,
                "nf4",
                quant_storage,
                device,
            ),
            **kwargs,
        )


class LinearFP4(Linear4bit):
    """Linear4bit with the FP4 code book."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *(
                input_features,
                output_features,
                bias,
                compute_dtype,
                compress_statistics,
                "fp4",
                quant_storage,
                device,
            ),
            **kwargs,
        )
