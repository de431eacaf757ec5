"""A model ready to train, as `qlora train` makes it, of which only shapes exist: built from its configuration alone.

Modules, adapters and the preparation are the real ones, on the meta device; then each parameter becomes a fake CPU
tensor, and what `quantize_` would quantise a Linear4bit whose packed bytes and scales are fake.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import QuantConfig
from ..format import QUANT_TYPES, nested_quant_map
from ..lazy_logits import LazyHead
from ..lora import add_lora
from ..memory_budget import MemoryBudget
from ..nn.convert import quantize_
from ..nn.group import unlink_groups
from ..nn.module import Module4bit
from ..nn.quant_state import code_tensor
from ..nn.tensor import quantize_tensor
from ..preparation import prepare, save_memory
from .layers import FakeCopies, TimelineMeter, no_line
from .terms import ADAPTERS, NOT_QUANTISED, SCALES, WEIGHTS


class FakeHead(LazyHead):
    """A LazyHead of a fake weight, which is no plain parameter."""

    def _is_plain(self) -> bool:
        return not self.weight.requires_grad and not self._forward_hooks


def read_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a local directory or hub name.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"qlora.estimate_memory: model: expected a directory with config.json or a hub name, got {model!r}: {text}"
        ) from error


def meta_model(
    config: Any, dtype: torch.dtype, quant_config: QuantConfig, *, trust_remote_code: bool = False
) -> Any:
    """The model on the meta device, its linear layers as Linear4bit, as from_pretrained leaves it but for the values.

    Raises:
        ValueError: the configuration is not of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # a checkpoint that is in 4 bits already
        del config.quantization_config
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ValueError(
            f"qlora.estimate_memory: model: expected a causal language model, got {type(config).__name__}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if quant_config.compute_dtype == "auto":
        quant_config = dataclasses.replace(quant_config, compute_dtype=dtype)
    return quantize_(model, quant_config)


def trainable(
    model: Any,
    *,
    r: int,
    targets: str | Sequence[str],
    gradient_checkpointing: bool | str,
    memory_budget: int | None = None,
    embedding_offload: bool = False,
    meter: TimelineMeter | None = None,
) -> nn.Module:
    """The model with a LoRA adapter, prepared and in training mode, as `qlora train` leaves it.

    `meter` is what a memory budget goes by.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        prepared = prepare(
            model, gradient_checkpointing=bool(gradient_checkpointing), embedding_offload=embedding_offload
        )
        save_memory(
            prepared,
            gradient_checkpointing,
            memory_budget,
            make_copies=lambda _: FakeCopies(),
            make_meter=lambda _: meter,
            tell=no_line,
        )
    with torch.device("meta"):
        adapted: nn.Module = add_lora(prepared, r=r, targets=targets)
    return adapted.train()


def materialise(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces every parameter and buffer by a fake CPU tensor, shared ones by shared ones; quantises the fakes."""
    unlink_groups(model)  # groups are for a few rows without gradients
    cpu = torch.device("cpu")
    nested_quant_map(cpu)  # made here, so that all layers share it
    for quant_type in QUANT_TYPES:
        code_tensor(quant_type, cpu)
    made: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Tensor:
        if id(value) not in made:
            with mode:
                made[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return made[id(value)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if type(module) is LazyHead:
            module.__class__ = FakeHead
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if isinstance(module, Module4bit) and name == "weight":
                _fill(module, mode)
                continue
            if id(parameter) not in parameters:
                with mode:
                    parameters[id(parameter)] = nn.Parameter(
                        fake(parameter), requires_grad=parameter.requires_grad
                    )
            module._parameters[name] = parameters[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _fill(module: Module4bit, mode: FakeTensorMode) -> None:
    old = module.weight
    with mode:
        packed, state = quantize_tensor(
            torch.empty(module.weight_shape(), dtype=old.dtype, device="cpu"),
            block_size=old.blocksize,
            quant_type=old.quant_type,
            double_quant=old.compress_statistics,
            quant_storage=old.quant_storage,
        )
        module.weight = nn.Parameter(packed, requires_grad=False)  # type: ignore[assignment]
    module.quant_state = state  # of the module: a Params4bit cannot hold a fake tensor


def budget_of(model: Any) -> MemoryBudget | None:
    """That which chooses among the model's layers."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    owners = (getattr(getattr(each, "func", None), "__self__", None) for each in functions)
    return next((owner for owner in owners if isinstance(owner, MemoryBudget)), None)


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Term and tensor of all that the model itself holds."""
    for module in model.modules():
        state = module.quant_state if isinstance(module, Module4bit) else None
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, Module4bit) and name == "weight":
                yield WEIGHTS, parameter
            else:
                yield ADAPTERS if parameter.requires_grad else NOT_QUANTISED, parameter
        for buffer in module._buffers.values():
            if buffer is not None:
                yield NOT_QUANTISED, buffer
        if state is not None:
            nested = state.state2
            scales = (
                state.absmax,
                state.code,
                state.offset,
                *(() if nested is None else (nested.absmax, nested.code)),
            )
            for value in scales:
                if value is not None:
                    yield SCALES, value
