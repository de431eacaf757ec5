"""report(model): what is stored in 4 bits, what is not, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from .module import Module4bit
from .params import Params4bit

# Parameters of 16 or 32 bits below this share of the model are summed up, not listed: norms, biases, routers.
_LISTED_SHARE = 0.001

#: Why a module was left as it is, name -> reason: an attribute of the model that quantize_ and the quantizer set.
KEPT_ATTRIBUTE = "_qlora_kept"


@dataclass
class Kept:
    """Parameters that stay in 16 or 32 bits."""

    name: str
    kind: str
    num_values: int
    num_bytes: int
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        size = format_bytes(self.num_bytes)
        return f"{self.name} ({self.kind}): {_count(self.num_values)} values, {self.dtype}, {size}: {self.reason}"


@dataclass
class Report:
    """What `report` found.

    Attributes:
        num_layers: modules with a 4-bit weight.
        num_values: values stored in 4 bits.
        num_bytes: bytes that these take, scales included.
        num_values_kept, num_bytes_kept: the same of all other parameters (those shared by modules counted once).
        kept: the larger ones of these, each with its reason.
        experts: those of `kept` that are three-dimensional expert weights, the bulk of a mixture-of-experts model.
    """

    formats: dict[str, int] = field(default_factory=dict)
    num_layers: int = 0
    num_values: int = 0
    num_bytes: int = 0
    num_values_kept: int = 0
    num_bytes_kept: int = 0
    kept: list[Kept] = field(default_factory=list)

    @property
    def experts(self) -> list[Kept]:
        return [item for item in self.kept if item.reason.startswith(EXPERTS_REASON)]

    @property
    def bits_per_weight(self) -> float:
        """Of the 4-bit weights, scales included."""
        return 8 * self.num_bytes / self.num_values if self.num_values else float("nan")

    @property
    def total_bits_per_weight(self) -> float:
        """Of the whole model."""
        total = self.num_values + self.num_values_kept
        return 8 * (self.num_bytes + self.num_bytes_kept) / total if total else float("nan")

    def summary(self) -> str:
        """One line."""
        if not self.num_layers:
            return f"qlora: nothing is in 4 bits; {_count(self.num_values_kept)} values, {format_bytes(self.num_bytes_kept)}"
        formats = ", ".join(
            f"{count} x {name}" if len(self.formats) > 1 else name for name, count in self.formats.items()
        )
        total = self.num_bytes + self.num_bytes_kept
        groups: dict[str, int] = defaultdict(int)
        for item in self.kept:
            groups[item.reason] += item.num_bytes
        listed = sum(groups.values())
        parts = [
            f"{reason} {format_bytes(size)}"
            for reason, size in sorted(groups.items(), key=lambda pair: -pair[1])
        ]
        if self.num_bytes_kept > listed:
            parts.append(f"norms, biases and other small ones {format_bytes(self.num_bytes_kept - listed)}")
        rest = f"; not quantised: {'; '.join(parts)}" if parts else ""
        return (
            f"qlora: {self.num_layers} layers, {_count(self.num_values)} weights in {formats}, "
            f"{self.bits_per_weight:.2f} bits a weight; model {format_bytes(total)}{rest}"
        )

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  not quantised: {item}" for item in self.kept)])


EXPERTS_REASON = "experts (3-D parameter, no 4-bit kernel for it)"


def report(model: torch.nn.Module) -> Report:
    """Counts values and bytes of a model; `print(report(model))` shows them with every larger weight not in 4 bits."""
    result = Report()
    reasons: dict[str, str] = getattr(model, KEPT_ATTRIBUTE, {})
    kept: list[Kept] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None or id(param) in seen:
                continue
            seen.add(id(param))
            if isinstance(module, Module4bit) and name == "weight":
                _count_quantized(result, module)
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            num_bytes = param.numel() * param.element_size()
            result.num_values_kept += param.numel()
            result.num_bytes_kept += num_bytes
            reason = _reason(module_name, module, param, reasons)
            kept.append(Kept(full_name, type(module).__name__, param.numel(), num_bytes, param.dtype, reason))
    total = result.num_values + result.num_values_kept
    result.kept = [
        item
        for item in kept
        if item.num_values > _LISTED_SHARE * total
        and (item.reason != "small" or item.num_values > 0.01 * total)
    ]
    return result


def _count_quantized(result: Report, module: Module4bit) -> None:
    weight, state = module.weight, module.quant_state
    rows, cols = module.weight_shape()
    result.num_layers += 1
    result.num_values += rows * cols
    result.num_bytes += weight.numel() * weight.element_size()
    if state is not None:
        result.num_bytes += state.num_bytes()
        name = f"{str(state.quant_type).upper()} block {state.blocksize}{' double-quantised' if state.nested else ''}"
    elif isinstance(weight, Params4bit):
        name = f"{weight.quant_type.upper()} (not quantised yet)"
    else:
        name = "4 bits"
    result.formats[name] = result.formats.get(name, 0) + 1


def is_experts(param: torch.Tensor) -> bool:
    """Whether a parameter is a stack of expert matrices [experts, rows, cols]."""
    return param.dim() == 3 and param.is_floating_point() and min(param.shape[1:]) > 1


def _reason(module_name: str, module: torch.nn.Module, param: torch.Tensor, reasons: dict[str, str]) -> str:
    if not param.is_floating_point():
        return "not a float"
    if param.requires_grad and "lora_" in module_name:
        return "adapter"
    if module_name in reasons:
        return reasons[module_name]
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if is_experts(param) and not isinstance(module, (torch.nn.modules.conv._ConvNd,)):
        return EXPERTS_REASON
    if param.dim() < 2:
        return "small"
    return (
        f"{type(module).__name__} is not a linear layer"
        if type(module) is not torch.nn.Linear
        else "linear layer"
    )


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def format_bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
