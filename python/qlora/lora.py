"""`qlora.add_lora`: LoRA on a model in one line, with PEFT."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Named here by the short arguments; LoraConfig's own names work too.
_SHORT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    *,
    rslora: bool = False,
    dora: bool = False,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
    **lora_config: Any,
) -> PeftModel:
    """Adds a trainable LoRA adapter: y = W x + s B A x on every targeted linear layer.

    `dtype` is what the adapter is kept and optimised in. float32, the default, is what AdamW needs to make the small
    steps of the end of a schedule: near 0.01 bfloat16 steps by 4e-5. The products run in the dtype of the
    activations whatever `dtype` is (the masters are cast on use: two small kernels per layer and pass), so float32
    costs 8 bytes a parameter with its optimizer state doubled, and no more. TRL turns the adapters of models that
    say `is_loaded_in_4bit` into bfloat16 itself.

    Args:
        model: a transformers model, quantised or not.
        r: rank, at least 1.
        alpha: s is alpha / r, with rslora alpha / sqrt(r). None is r.
        targets: "all-linear" (all but the output head), names or name endings of modules (a list, or one name), or
            a regular expression that matches whole module paths.
        dropout: on the adapter's input, while training.
        rslora: rank-stabilised scaling.
        dora: weight-decomposed LoRA: directions by LoRA, the norm of each output's weights trained apart.
        adapter_name: the adapter's name in PEFT.
        dtype: float32, bfloat16 or float16 of the adapter's weights (DoRA's norms are float32 always).
        lora_config: any other field of peft.LoraConfig.

    Returns:
        A PeftModel around `model`, with only the adapter trainable.

    Raises:
        ValueError: r, dtype or a target is not as said; an unknown target's message has the nearest names.
        TypeError: an unknown field of LoraConfig, with the nearest names.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("qlora.add_lora: needs the package peft: pip install 'peft>=0.18'") from error
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"qlora.add_lora: r: expected an integer of at least 1, got {r!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"qlora.add_lora: dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    _check_fields(lora_config, {field.name for field in dataclasses.fields(LoraConfig)})
    if "target_parameters" not in lora_config:
        targets = _checked_targets(model, targets)
    settings: dict[str, Any] = {"task_type": _task_type(model), "target_modules": targets, **lora_config}
    settings |= {"r": r, "lora_alpha": r if alpha is None else alpha, "lora_dropout": dropout}
    settings |= {"use_rslora": rslora, "use_dora": dora}
    peft_model: PeftModel = get_peft_model(model, LoraConfig(**settings), adapter_name=adapter_name)
    if dtype is not torch.float32:
        _cast_adapter(peft_model, adapter_name, dtype)
    return peft_model


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASK_TYPES.items() if name.endswith(ending)), None)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(repr(word) for word in found)}?" if found else ""


def _check_fields(given: dict[str, Any], known: set[str]) -> None:
    for name, value in given.items():
        short = next((ours for ours, theirs in _SHORT_NAMES.items() if theirs == name), None)
        if short is not None or name == "target_modules":
            raise TypeError(
                f"qlora.add_lora: {name}: expected as {short or 'targets'}=, got {name}={value!r}"
            )
        if name not in known:
            raise TypeError(
                f"qlora.add_lora: {name}: expected a field of peft.LoraConfig, got {name}={value!r}"
                + _nearest(name, [*known, *_SHORT_NAMES])
            )


def _checked_targets(model: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """The targets as PEFT takes them, each known to match a module."""
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(targets, str):
        if targets == "all-linear":
            return targets
        if targets.isidentifier():
            targets = [targets]
        elif not any(re.fullmatch(targets, path) for path in paths):
            raise ValueError(
                f"qlora.add_lora: targets: expected a pattern of a whole module path, got {targets!r}, which matches "
                f"none of {len(paths)} modules, such as {paths[len(paths) // 2]!r}"
            )
        else:
            return targets
    endings = {
        path.rpartition(".")[2] for path, module in model.named_modules() if _has_weight_matrix(module)
    }
    names = list(targets)
    if not names:
        raise ValueError("qlora.add_lora: targets: expected at least one name, got none")
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise ValueError(
                f"qlora.add_lora: targets: expected names of modules of the model, got {name!r}"
                + (_nearest(name, endings) or f"; it has {', '.join(sorted(endings))}")
            )
    return names


def _has_weight_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _cast_adapter(model: nn.Module, adapter_name: str, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if (
            parameter.requires_grad
            and f".{adapter_name}." in f"{name}."
            and "lora_magnitude_vector" not in name
        ):
            parameter.data = parameter.data.to(dtype)


def merge_and_unload(
    model: PeftModel, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None
) -> nn.Module:
    """Merges the adapters of a model over 4-bit layers and returns the base model without them.

    Args:
        model: a PeftModel.
        dtype: None quantises the merged weights again, each once (PEFT's merge_and_unload does that). With float32,
            bfloat16 or float16 every 4-bit layer of the model becomes an ordinary one of this dtype, and what the
            adapters learned is not quantised: 2 to 4 times the memory, for saving and serving.
        adapter_names: which adapters; None is the active ones.

    Returns:
        The base model.
    """
    base: nn.Module
    if dtype is None:
        base = model.merge_and_unload(adapter_names=adapter_names)
        return base
    from .integrations.peft import unloading_dense
    from .nn import dequantize_

    with unloading_dense(dtype):
        base = model.merge_and_unload(adapter_names=adapter_names)
    return dequantize_(base, dtype)
