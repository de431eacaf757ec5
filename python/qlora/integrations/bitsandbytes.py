"""Accelerator mode: an installed bitsandbytes computes its 4-bit part with our kernels.

Three things are replaced, nothing is subclassed, and models need no change:

- the kernels of the operators `torch.ops.bitsandbytes.*` that concern 4 bits, for CPU and CUDA (`bitsandbytes_ops.py`);
- `matmul_4bit` and `MatMul4Bit`, whose backward pass would write the dense weight: theirs is the fused gradient;
- the copy that PEFT's layers make of the base layer's result (`peft_clone.py`).

Kernels are registered through a torch.library.Library that is destroyed to switch off; the dispatcher then finds
bitsandbytes' kernels again, which it kept.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from .. import _library
from . import is_installed, peft_clone

__all__ = ["accelerate_bitsandbytes"]

OLDEST, NEWEST = (0, 46), (0, 50)
_RANGE = "bitsandbytes 0.46 to 0.50"

_undo: list[Callable[[], None]] = []
_description = ""


def accelerate_bitsandbytes(on: bool = True) -> str:
    """Puts qlora's kernels under bitsandbytes' 4-bit quantise, dequantise, forward and backward; or takes them out.

    Layers, models, quant states and checkpoints stay bitsandbytes'. Works before or after models are made; a second
    call does nothing.

    Args:
        on: False gives bitsandbytes its own kernels back.

    Returns:
        One line that says what is taken over.

    Raises:
        ImportError: bitsandbytes is not installed.
        RuntimeError: its version is not one of 0.46 to 0.50, or its operators are not as in these.
    """
    global _description  # noqa: PLW0603
    if not on:
        return _switch_off()
    if not _undo:
        version = _supported_version()
        importlib.import_module("bitsandbytes")
        # That import may have come back here, through the entry point.
        if not _undo:
            try:
                _description = f"qlora: bitsandbytes {version}: {_switch_on()}"
            except BaseException:
                _switch_off()
                raise
    return _description


def _switch_off() -> str:
    if not _undo:
        return "qlora: bitsandbytes runs its own kernels, as before"
    while _undo:
        _undo.pop()()
    return "qlora: bitsandbytes runs its own kernels again"


def _supported_version() -> str:
    if not is_installed("bitsandbytes"):
        raise ImportError(
            f"qlora.accelerate_bitsandbytes: expected {_RANGE}, got none: pip install bitsandbytes",
            name="bitsandbytes",
        )
    # While its entry points run, the module has no __version__ yet.
    version = importlib.metadata.version("bitsandbytes")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        raise RuntimeError(f"qlora.accelerate_bitsandbytes: expected {_RANGE}, got {version}")
    return version


def _cuda_is_served() -> tuple[bool, str]:
    """Whether our kernels run on every GPU that torch sees; if not, why."""
    if not torch.cuda.is_available():
        return False, ""
    if torch.version.cuda is None:
        return False, "; its GPU kernels stay: qlora has none for ROCm"
    from qlora import _qlora_ext

    if not _qlora_ext.build_info()["cuda_architectures"]:
        return False, "; its CUDA kernels stay: this qlora was built for the CPU only"
    for device in _qlora_ext.devices():
        if not device["has_kernels"]:
            return False, f"; its CUDA kernels stay: this qlora has none for {device['name']}"
    return True, ""


def _switch_on() -> str:
    _library.load()
    from . import bitsandbytes_ops

    functional = importlib.import_module("bitsandbytes.functional")
    functions = importlib.import_module("bitsandbytes.autograd._functions")
    modules = importlib.import_module("bitsandbytes.nn.modules")
    kernels = {
        name: kernel
        for name, kernel in bitsandbytes_ops.KERNELS.items()
        if name not in bitsandbytes_ops.OPTIONAL_KERNELS or _operator(name) is not None
    }
    for name, kernel in kernels.items():
        _check_schema(name, kernel)
    is_served, reason = _cuda_is_served()
    # On these CPUs gemv_4bit also takes weights in an order of bitsandbytes' own, and cannot tell.
    has_repacking = bool(getattr(functional, "has_avx512bf16", bool)())

    library = torch.library.Library("bitsandbytes", "IMPL")
    _undo.append(library._destroy)
    for key in ("CPU", "CUDA") if is_served else ("CPU",):
        for name, kernel in kernels.items():
            if not (key == "CPU" and has_repacking and name.startswith("gemv_4bit")):
                library.impl(name, kernel, key, allow_override=True)

    devices = frozenset(("cpu", "cuda") if is_served else ("cpu",))
    matmul_4bit, node = bitsandbytes_ops.products(
        functions, devices, weight_is_transposed="gemm_4bit" not in kernels
    )
    original = functions.matmul_4bit
    for module in (functions, importlib.import_module("bitsandbytes")):
        if getattr(module, "matmul_4bit", None) is original:
            _set(module, "matmul_4bit", matmul_4bit)
    _set(functions, "MatMul4Bit", node)
    if hasattr(modules, "_convert_weight_packed_for_cpu"):
        _set(modules, "_convert_weight_packed_for_cpu", _keep_weight)

    peft_clone.switch_on()
    _undo.append(peft_clone.switch_off)
    where = " and ".join(device.upper() for device in sorted(devices))
    return f"4-bit quantise, dequantise, forward and backward run on qlora's {where} kernels{reason}"


def _keep_weight(qweight: Any, quant_state: Any, block_n: int = 32) -> tuple[Any, Any]:  # noqa: ARG001
    """For the function with which a layer in eval mode on CPU brings its weight into bitsandbytes' kernel's order."""
    return qweight, quant_state


def _set(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, original))


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, packet, None), overload or "default", None)


def _check_schema(name: str, kernel: Callable[..., Any]) -> None:
    operator = _operator(name)
    found = None if operator is None else [argument.name for argument in operator._schema.arguments]
    expected = list(inspect.signature(kernel).parameters)
    if found != expected:
        got = "no such operator" if found is None else f"({', '.join(found)})"
        raise RuntimeError(
            f"qlora.accelerate_bitsandbytes: expected the operator bitsandbytes::{name}({', '.join(expected)}) "
            f"of {_RANGE}, got {got}"
        )
