"""Params4bit: a frozen parameter that becomes 4-bit when it first moves to a device."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..format import DEFAULT_BLOCK_SIZE, num_packed_bytes
from . import function
from .quant_state import QuantState
from .tensor import NonFiniteWeightError, dequantize_tensor, is_finite, quantize_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_CHUNKING = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)
_ATTRIBUTES = (
    *(
        "blocksize",
        "compress_statistics",
        "quant_type",
        "quant_state",
        "quant_storage",
        "bnb_quantized",
        "module",
    ),
)


def _rebuild(
    cls: type[Params4bit], data: Tensor, requires_grad: bool, attributes: dict[str, Any]
) -> Params4bit:
    param = Tensor._make_subclass(cls, data, requires_grad)
    param.__dict__.update(attributes)
    return param


class Params4bit(torch.nn.Parameter):
    """A weight in 4 bits, or one waiting to become so.

    Fresh, it holds the 16- or 32-bit values [out, in]. `.to(device)`, `.cuda()` and `.cpu()` quantise it in place, also
    from CPU to CPU, and return it; the meta device does not count. From then on it holds packed bytes,
    `quant_storage` [bytes / itemsize, 1], with `quant_state` beside them. No cast ever touches packed bytes:
    `.to(dtype)`, `.half()`, `.float()` and the like return the parameter as it is. A move returns a new parameter and
    leaves this one and its state in place.

    The arguments and attributes are those of bitsandbytes' class of this name; hosts rebuild a parameter as
    `Params4bit(values, **old.__dict__)`, so unknown arguments are ignored.

    Args:
        data: the values, or packed bytes with `bnb_quantized` and `quant_state`.
        blocksize: values that share a scale, 64 if None.
        compress_statistics: store the scales themselves in 8 bits (double quantisation).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype under which the bytes are kept.
        module: a module whose `quant_state` attribute is kept up to date, if not None.

    Raises:
        NonFiniteWeightError (a ValueError): on quantising a weight with NaN or Inf.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: torch.nn.Module | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Self:
        if data is None:
            data = torch.empty(0)
        self = Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = DEFAULT_BLOCK_SIZE if blocksize is None else blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: torch.nn.Module | None = None,
        **kwargs: Any,  # noqa: ARG003  hosts pass more
    ) -> Params4bit:
        """From packed bytes and the state as a checkpoint holds it (`QuantState.from_dict`).

        Raises:
            ValueError: the state is incomplete or contradicts itself or the number of bytes.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        if state.shape is not None:
            expected = num_packed_bytes(math.prod(state.shape))
            got = data.numel() * data.element_size()
            if not expected <= got < expected + data.element_size():
                raise ValueError(f"expected {expected} packed bytes for shape {list(state.shape)}, got {got}")
        return cls._from_packed(data.to(device), state, requires_grad, module)

    @classmethod
    def _from_packed(
        cls,
        packed: Tensor,
        state: QuantState,
        requires_grad: bool = False,
        module: torch.nn.Module | None = None,
    ) -> Params4bit:
        param = cls(
            packed,
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "nf4",
            quant_storage=packed.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            _give_state(module, state)
        return param

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values in their original shape, in `dtype` or the dtype they were quantised from."""
        if self.quant_state is None:
            return self.data if dtype is None else self.data.to(dtype)
        return dequantize_tensor(plain_tensor(self), self.quant_state, dtype)

    # -----------------------------------------------------------------------------------------------------------------
    def quantize_on(
        self, device: torch.device | str | int, *, name: str = "the weight", check: bool = False
    ) -> Params4bit:
        """Quantises the fresh values on `device`, in place; returns self.

        `check` raises NonFiniteWeightError for NaN and Inf, at the price of waiting for the device. `name` is for it.
        """
        packed, state = quantize_tensor(
            plain_tensor(self).to(device),
            block_size=self.blocksize,
            quant_type=self.quant_type,
            double_quant=self.compress_statistics,
            quant_storage=self.quant_storage,
            name=name,
        )
        if check and not is_finite(state):
            raise NonFiniteWeightError(name)
        self._become(packed, state)
        return self

    def _become(self, packed: Tensor, state: QuantState) -> None:
        """Takes over packed bytes and state; the parameter stays the same object."""
        self.data = packed
        self.quant_state = state
        self.blocksize = state.blocksize or self.blocksize
        self.quant_type = state.quant_type or self.quant_type
        self.compress_statistics = state.nested
        self.quant_storage = packed.dtype
        self.bnb_quantized = True
        if self.module is not None:
            _give_state(self.module, state)

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        plain = plain_tensor(self)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta" and plain.device.type != "meta":
                return self.quantize_on(device, check=True)
            return self._like(
                plain.to(device=device, dtype=dtype, non_blocking=non_blocking), self.quant_state
            )
        state = self.quant_state
        if device is None or (
            _same_device(device, plain.device) and (state is None or state.device == plain.device)
        ):
            return self
        # A parameter sent to the meta device (offload) comes back by the same state, which therefore stays.
        if state is not None and device.type != "meta":
            state = state.copy_to(device, non_blocking)
        return self._like(plain.to(device=device, non_blocking=non_blocking), state)

    def _like(self, data: Tensor, state: QuantState | None) -> Params4bit:
        attributes = {name: getattr(self, name) for name in _ATTRIBUTES} | {"quant_state": state}
        return type(self)(data, requires_grad=self.requires_grad, **attributes)

    def cpu(self, *args: Any, **kwargs: Any) -> Params4bit:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Params4bit:
        if device is None:
            device = torch.cuda.current_device()
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device, non_blocking=non_blocking
        )

    def _cast(self, dtype: torch.dtype) -> Params4bit:
        return self if self.bnb_quantized else self.to(dtype)

    def half(self, *args: Any, **kwargs: Any) -> Params4bit:
        return self._cast(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Params4bit:
        return self._cast(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Params4bit:
        return self._cast(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Params4bit:
        return self._cast(torch.float64)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        return self if self.bnb_quantized and (args or kwargs) else super().type(*args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self), plain_tensor(self), self.requires_grad, self.__dict__.copy())

    def __copy__(self) -> Params4bit:
        return _rebuild(type(self), plain_tensor(self), self.requires_grad, self.__dict__.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        known: Params4bit | None = memo.get(id(self))
        if known is not None:
            return known
        # The module is followed only where it is itself being copied, not dragged along by its weight.
        attributes = {key: value for key, value in self.__dict__.items() if key != "module"}
        new = _rebuild(
            type(self), plain_tensor(self).clone(), self.requires_grad, copy.deepcopy(attributes, memo)
        )
        new.module = memo.get(id(self.module), self.module)
        memo[id(self)] = new
        return new

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear:
            product = _linear(*args, **(kwargs or {}))
            if product is not None:
                return product
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func in _CHUNKING and isinstance(args[0], Params4bit):
            source = args[0]
            return tuple(source._like(piece, source.quant_state) for piece in result)
        return result

    # Dotted checkpoint names ("weight.absmax") are resolved attribute by attribute; properties, since torch.compile
    # does not trace __getattr__ of a tensor.
    def _of_state(self, name: str) -> QuantState:
        state: QuantState | None = self.__dict__.get("quant_state")
        if state is None:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r} before it is quantised"
            )
        return state

    def _of_nested(self, name: str) -> QuantState:
        nested = self._of_state(name).state2
        if nested is None:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}: its scales are plain"
            )
        return nested

    @property
    def absmax(self) -> Tensor:
        return self._of_state("absmax").absmax

    @property
    def code(self) -> Tensor | None:
        return self._of_state("code").code

    @property
    def quant_map(self) -> Tensor | None:
        return self._of_state("quant_map").code

    @property
    def offset(self) -> Tensor | None:
        return self._of_state("offset").offset

    @property
    def state2(self) -> QuantState | None:
        return self._of_state("state2").state2

    @property
    def nested_absmax(self) -> Tensor:
        return self._of_nested("nested_absmax").absmax

    @property
    def nested_blocksize(self) -> int | None:
        return self._of_nested("nested_blocksize").blocksize

    @property
    def nested_quant_map(self) -> Tensor | None:
        return self._of_nested("nested_quant_map").code

    @property
    def nested_dtype(self) -> torch.dtype | None:
        return self._of_nested("nested_dtype").dtype

    @property
    def nested_offset(self) -> Tensor | None:
        return self._of_state("nested_offset").offset


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """F.linear in models that multiply by a layer's `weight` themselves; None where that is not in 4 bits."""
    state = weight.quant_state if isinstance(weight, Params4bit) else None
    if state is None:
        return None
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    return function.linear(input.to(dtype), weight, state, None if bias is None else bias.to(dtype))


def _give_state(module: torch.nn.Module, state: QuantState) -> None:
    """Sets the attribute `quant_state`, of a module that is not ours too as an attribute and not as a child."""
    if hasattr(type(module), "quant_state"):
        module.quant_state = state
    else:
        object.__setattr__(module, "quant_state", state)


def plain_tensor(param: Tensor) -> Tensor:
    """The same memory as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return param.detach().as_subclass(Tensor)


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a == b or (a.type == b.type and a.index is None and b.index in (None, torch.cuda.current_device()))
