"""Linear4bit: a linear layer over a frozen 4-bit weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops  # noqa: F401  registers the operators
from ..format import DEFAULT_BLOCK_SIZE
from .module import Module4bit
from .params import Params4bit

_linear_4bit = torch.ops.qlora.linear_4bit.default


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
        weight = self.weight
        state = self.quant_state
        if state is None:
            state = self.quantized_state()
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"qlora.Linear4bit: input: expected a last dimension of {self.in_features}, got {list(input.shape)}"
            )
        compute_dtype = self.compute_dtype
        result_dtype = input.dtype
        if compute_dtype is None:
            if torch.is_autocast_enabled(input.device.type):
                result_dtype = torch.get_autocast_dtype(input.device.type)
            compute_dtype = result_dtype
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != compute_dtype:
            bias = bias.to(compute_dtype)
        nested = state.state2
        with torch._C.DisableTorchFunctionSubclass():
            result: Tensor = _linear_4bit(
                input if input.dtype == compute_dtype else input.to(compute_dtype),
                weight,
                state.absmax,
                None if nested is None else nested.absmax,
                None if nested is None else nested.code,
                state.offset,
                bias,
                state.shape,
                state.blocksize,
                state.quant_type,
            )
        return result if compute_dtype == result_dtype else result.to(result_dtype)

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
