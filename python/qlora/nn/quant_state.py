"""QuantState: everything but the packed bytes that a 4-bit tensor consists of, with bitsandbytes' attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..format import (
    BLOCK_SIZES,
    CODES,
    NESTED_BLOCK_SIZE,
    QUANT_TYPES,
    num_blocks,
    num_nested_blocks,
)

_PACKED_PREFIX = "bitsandbytes__"
#: Names, below "weight.", of the tensors that go with the packed bytes in a checkpoint.
TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE_KEYS = (*TENSOR_KEYS, *(f"quant_state.{_PACKED_PREFIX}{name}" for name in QUANT_TYPES))

_FIELDS = ("absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2", "nested")

_code_of_device: dict[tuple[str, torch.device], Tensor] = {}


def code_tensor(quant_type: str, device: torch.device) -> Tensor:
    """The code book, float32 [16], one shared tensor per device."""
    key = (quant_type, device)
    code = _code_of_device.get(key)
    if code is None:
        with torch.inference_mode(False):
            # 0.0 + turns the -0.0 of FP4 into the 0.0 that checkpoints hold.
            code = torch.tensor(
                [0.0 + value for value in CODES[quant_type]], dtype=torch.float32, device=device
            )
        if type(code) is Tensor:
            _code_of_device[key] = code
    return code


class QuantState(torch.nn.Module):
    """Scales and shape of a 4-bit tensor.

    Attributes:
        absmax: float32 [num_blocks], or uint8 [num_blocks] where the scales are double-quantised (`nested`).
        shape: shape of the tensor that was quantised.
        code: float32 [16], the code book (float32 [256] in the `state2` of double-quantised scales).
        blocksize: values that share a scale.
        quant_type: "nf4" or "fp4" (None in a `state2`).
        dtype: dtype that the tensor was quantised from, and in which it is dequantised.
        offset: float32 [], the mean that was taken off the scales, or None.
        state2: QuantState of the scales (absmax float32 [ceil(num_blocks / 256)]), or None.
        nested: whether the scales are double-quantised.

    A torch.nn.Module without parameters or children, since torch.compile (where it watches dictionaries: torch 2.11 on
    Python 3.12) looks into an nn.Module again only after it was written to, but into any other object at every call: a
    compiled model of 32 layers has 448 states. What a compiled layer reads of it is therefore a tensor, a number, a text
    or another state; a tuple is looked into every time.
    """

    # No attribute is a parameter or a child.
    __setattr__ = object.__setattr__  # type: ignore[assignment]
    __delattr__ = object.__delattr__

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = tuple(f"{_PACKED_PREFIX}{name}" for name in QUANT_TYPES)
    valid_qs_keys = (
        *TENSOR_KEYS,
        *("quant_state", "quant_type", "blocksize", "dtype", "shape"),
        *("nested_blocksize", "nested_dtype", "nested_offset"),
    )

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        super().__init__()
        self.absmax = absmax
        self._set_shape(shape)  # torch.compile (torch 2.11) would not call the setter
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        # Old checkpoints hold a 16-bit offset; the kernels add it in float32.
        self.offset = offset if offset is None or offset.dtype is torch.float32 else offset.to(torch.float32)
        self.state2 = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # Hosts that walk dotted checkpoint names (FSDP) ask for "weight.quant_state.bitsandbytes__nf4" attribute by
        # attribute.
        if name.startswith(_PACKED_PREFIX):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def shape(self) -> torch.Size | tuple[int, ...] | None:
        return self._shape

    @shape.setter
    def shape(self, shape: torch.Size | tuple[int, ...] | None) -> None:
        self._set_shape(shape)

    def _set_shape(self, shape: torch.Size | tuple[int, ...] | None) -> None:
        self._shape = shape
        is_matrix = shape is not None and len(shape) == 2
        self.num_rows: int | None = shape[0] if shape is not None and is_matrix else None
        self.num_columns: int | None = shape[1] if shape is not None and is_matrix else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle from before this was a torch.nn.Module."""
        super().__init__()
        self.__dict__.update(state)
        if "shape" in state:
            self.shape = self.__dict__.pop("shape")

    def __getitem__(self, index: Any) -> Any:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _FIELDS)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shape = None if self.shape is None else list(self.shape)
        return (
            f"QuantState({self.quant_type}, shape={shape}, blocksize={self.blocksize}, dtype={self.dtype}, "
            f"nested={self.nested}, device={self.device})"
        )

    @property
    def device(self) -> torch.device:
        return self.absmax.device

    def to(  # type: ignore[override]
        self, device: torch.device | str | int | None, non_blocking: bool = False
    ) -> QuantState:
        """Moves the tensors in place; their dtypes never change. Returns self."""
        if device is None:
            return self
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device, non_blocking=non_blocking))
        if self.state2 is not None:
            self.state2.to(device, non_blocking)
        return self

    def cuda(self, device: torch.device | int | None = None) -> QuantState:  # type: ignore[override]
        return self.to("cuda" if device is None else device)

    def cpu(self) -> QuantState:
        return self.to("cpu")

    def copy_to(self, device: torch.device | str | int | None, non_blocking: bool = False) -> QuantState:
        """A new state on `device`; tensors that are there already are shared."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        if new.state2 is not None:
            new.state2 = new.state2.copy_to(None)
        return new.to(device, non_blocking)

    def num_bytes(self) -> int:
        """Bytes of the scales (the code books, shared by all layers of a device, are left out)."""
        size = self.absmax.numel() * self.absmax.element_size()
        if self.state2 is not None:
            size += self.state2.absmax.numel() * self.state2.absmax.element_size() + 4
        return size

    # -----------------------------------------------------------------------------------------------------------------
    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as checkpoints hold it, keys without prefix.

        With `packed` every value is a tensor: what is not goes into one uint8 tensor of JSON text.
        """
        values: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested and self.state2 is not None and self.offset is not None:
            values["nested_absmax"] = self.state2.absmax
            values["nested_blocksize"] = self.state2.blocksize
            # One map serves all layers of a device; writers of checkpoints drop tensors that share memory.
            values["nested_quant_map"] = None if self.state2.code is None else self.state2.code.clone()
            values["nested_dtype"] = str(self.state2.dtype).removeprefix("torch.")
            values["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return values
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        tensors["quant_map"] = tensors["quant_map"].clone()
        text = json.dumps({key: value for key, value in values.items() if key not in tensors})
        tensors[f"quant_state.{_PACKED_PREFIX}{self.quant_type}"] = torch.tensor(
            list(text.encode()), dtype=torch.uint8, device=self.device
        )
        return tensors

    @classmethod
    def from_dict(
        cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None = None
    ) -> QuantState:
        """From what `as_dict` gave, packed or not, with or without prefixes before the keys. `qs_dict` is not changed.

        Raises:
            ValueError: something is missing, unknown, or does not fit the rest.
        """
        values: dict[str, Any] = {}
        texts: dict[str, Tensor] = {}
        for key, value in qs_dict.items():
            name = key.rpartition(".")[2]
            if name.startswith(_PACKED_PREFIX):
                texts[name] = value
            elif name in cls.valid_qs_keys:
                values[name] = value
            else:
                raise ValueError(f"unknown key {key!r}: expected one of {', '.join(cls.valid_qs_keys)}")
        if texts:
            values.update(_read_text(texts))
        elif "quant_type" not in values:
            names = " or ".join(f"quant_state.{name}" for name in cls.valid_qs_type_keys)
            raise ValueError(f"{names} is missing: have {_names(qs_dict)}")
        _check_keys(values)
        offset = state2 = None
        if "nested_absmax" in values:
            # float32 whatever torch.get_default_dtype() is.
            offset = torch.tensor(float(values["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=values["nested_absmax"].to(device),
                blocksize=int(values["nested_blocksize"]),
                code=values["nested_quant_map"].to(device),
                dtype=_dtype(values["nested_dtype"], "nested_dtype"),
            )
        shape = values["shape"]
        state = cls(
            absmax=values["absmax"].to(device),
            shape=None if shape is None else torch.Size(shape),
            code=values["quant_map"].to(device),
            blocksize=int(values["blocksize"]),
            quant_type=values["quant_type"],
            dtype=_dtype(values["dtype"], "dtype"),
            offset=offset,
            state2=state2,
        )
        state.check()
        return state

    def check(self) -> None:
        """Raises ValueError where sizes or dtypes contradict each other, or the code book is not the format's."""
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {self.quant_type!r}")
        if self.blocksize not in BLOCK_SIZES:
            raise ValueError(f"blocksize: expected one of {BLOCK_SIZES}, got {self.blocksize!r}")
        if self.shape is not None:
            expected = num_blocks(math.prod(self.shape), self.blocksize)
            if self.absmax.numel() != expected:
                what = f"{expected} scales for shape {list(self.shape)} and blocksize {self.blocksize}"
                raise ValueError(f"absmax: expected {what}, got {self.absmax.numel()}")
        dtype = torch.uint8 if self.nested else torch.float32
        if self.absmax.dtype is not dtype:
            kind = "double-quantised" if self.nested else "plain"
            raise ValueError(f"absmax: expected {dtype} for {kind} scales, got {self.absmax.dtype}")
        if self.code is not None and self.code.device.type != "meta":
            expected_code = code_tensor(self.quant_type, self.code.device)
            if self.code.shape != expected_code.shape or not torch.equal(self.code, expected_code):
                raise ValueError(
                    f"quant_map: expected the {self.quant_type} code book, got {self.code.tolist()}"
                )
        if self.state2 is not None:
            if self.state2.blocksize != NESTED_BLOCK_SIZE:
                raise ValueError(
                    f"nested_blocksize: expected {NESTED_BLOCK_SIZE}, got {self.state2.blocksize}"
                )
            expected = num_nested_blocks(self.absmax.numel())
            if self.state2.absmax.numel() != expected or self.state2.absmax.dtype is not torch.float32:
                got = f"{self.state2.absmax.numel()} of {self.state2.absmax.dtype}"
                raise ValueError(f"nested_absmax: expected {expected} of torch.float32, got {got}")
            map_size = 0 if self.state2.code is None else self.state2.code.numel()
            if map_size != 256:
                raise ValueError(f"nested_quant_map: expected 256 values, got {map_size}")


def scale_operands(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """absmax, nested_absmax, nested_quant_map and nested_offset, as the operators take them.

    Also of a QuantState of bitsandbytes, which has the same attributes.
    """
    nested = state.state2
    if nested is None:
        return state.absmax, None, None, None
    return state.absmax, nested.absmax, nested.code, state.offset


def matrix_shape(state: QuantState) -> tuple[int, int]:
    """Rows and columns, read in a way that torch.compile need not repeat at every call.

    Also of a QuantState of bitsandbytes.
    """
    if not isinstance(state, QuantState):
        rows, columns = state.shape
        return rows, columns
    if state.num_rows is None or state.num_columns is None:
        raise RuntimeError(f"expected the state of a matrix, got one of shape {state.shape}")
    return state.num_rows, state.num_columns


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=1e-6)
    return type(a) is type(b) and a == b


def _names(keys: Mapping[str, Any]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


def _dtype(name: Any, key: str) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key}: expected the name of a torch dtype, got {name!r}")  # noqa: TRY004
    return dtype


def _read_text(texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the one packed tensor says."""
    if len(texts) != 1:
        raise ValueError(
            f"expected exactly one of {', '.join(QuantState.valid_qs_type_keys)}, got {_names(texts)}"
        )
    ((name, tensor),) = texts.items()
    try:
        values: dict[str, Any] = json.loads(bytes(tensor.cpu().to(torch.uint8).tolist()).decode())
    except ValueError as error:
        raise ValueError(
            f"quant_state.{name}: expected JSON text, got {tensor.numel()} damaged bytes"
        ) from error
    if f"{_PACKED_PREFIX}{dict(values).get('quant_type')}" != name:
        raise ValueError(f"quant_state.{name}: expected a quant_type of the same name, got {values!r}")
    return values


def _check_keys(values: Mapping[str, Any]) -> None:
    required = ["quant_type", "absmax", "quant_map", "blocksize", "dtype", "shape"]
    nested = [key for key in QuantState.valid_qs_keys if key.startswith("nested_")]
    if any(key in values for key in nested):
        required += nested
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing: have {_names(values)}")
