"""Reads a saved LoRA adapter and says what it adds to each weight of its base model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_reader import model_directory

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.(?P<kind>weight|bias))?"
)
# Initialisations that take the adapter's first value off the weight: the adapter belongs to what was left of it.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Settings of a LoraConfig whose adapters are more than scaling * B A (and a magnitude).
_UNSUPPORTED = (
    *(
        "kasa_config",
        "use_bdlora",
        "arrow_config",
        "alora_invocation_tokens",
        "layer_replication",
        "target_parameters",
    ),
    *("trainable_token_indices", "use_qalora"),
)


@dataclass
class Update:
    """What the adapter has for one module; matrices as saved."""

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None
    magnitudes: Tensor | None = None
    embedding: bool = False
    scaling: float = 1.0
    transposed: bool = False

    def delta(self, device: torch.device | str) -> Tensor:
        """scaling * B A, as the weight lies in its checkpoint: float32."""
        assert self.a is not None and self.b is not None
        product: Tensor = (
            torch.mm(self.b.to(device, torch.float32), self.a.to(device, torch.float32)) * self.scaling
        )
        return product.transpose(0, 1) if self.embedding or self.transposed else product

    def apply(self, weight: Tensor) -> Tensor:
        """The merged weight, float32, for a float32 `weight`."""
        merged = weight + self.delta(weight.device)
        if self.magnitudes is None:
            return merged
        axis = 0 if self.transposed or self.embedding else 1
        magnitudes = self.magnitudes.to(weight.device, torch.float32).reshape(-1)
        norms: Tensor = torch.linalg.vector_norm(merged, dim=axis)
        return merged * (magnitudes / norms).unsqueeze(axis)


@dataclass
class Adapter:
    """A saved adapter.

    Attributes:
        updates: module path -> what is added to its weight and bias.
        replaced: tensor name -> the tensor that takes its place (modules_to_save, trained biases).
    """

    directory: Path
    config: dict[str, Any]
    updates: dict[str, Update] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @property
    def base_name(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def read_adapter(name: str | Path) -> Adapter:
    """Reads an adapter from a directory or the hub.

    Raises:
        ValueError: it is no LoRA adapter in safetensors, is incomplete, or holds what cannot be added to a weight.
    """
    directory = model_directory(name, ("adapter_*", "*.json", "*.jinja", "*.txt", "*.model"), "adapter")
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
    except OSError:
        raise ValueError(
            f"adapter: expected a saved adapter, got {directory} without adapter_config.json"
        ) from None
    _check_config(config, directory)
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"adapter: expected {file.name} in {directory}, got none")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"adapter: {file}: damaged or truncated: {error}") from error
    adapter = Adapter(directory, config)
    for key, tensor in tensors.items():
        _place(adapter, key.removeprefix(_PREFIX), tensor)
    for path, update in adapter.updates.items():
        _complete(adapter, path, update)
    return adapter


def _check_config(config: dict[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: expected peft_type LORA, got {config.get('peft_type')!r} in {directory}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"adapter: it was initialised by {init!r} and belongs to the weights that this left, not to the base "
            "model's: save it with path_initial_model_for_weight_conversion, or load it and use qlora.merge_and_unload"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(
                f"adapter: {name}={config[name]!r} cannot be merged into a checkpoint: expected plain LoRA"
            )


def _place(adapter: Adapter, key: str, tensor: Tensor) -> None:
    match = _LORA_KEY.fullmatch(key)
    if match is None:
        if "lora_" in key or "token_adapter" in key:
            raise ValueError(
                f"adapter: expected lora_A, lora_B or lora_magnitude_vector, got the tensor {key!r}"
            )
        adapter.replaced[key.replace(".base_layer.", ".")] = tensor
        return
    update = adapter.updates.setdefault(match["path"].replace(".base_layer", ""), Update())
    part = match["part"]
    if match["kind"] == "bias":
        update.bias = tensor
    elif part == "lora_magnitude_vector":
        update.magnitudes = tensor
    elif part.endswith("_A"):
        update.a, update.embedding = tensor, "embedding" in part
    else:
        update.b, update.embedding = tensor, "embedding" in part


def _complete(adapter: Adapter, path: str, update: Update) -> None:
    if update.a is None or update.b is None:
        raise ValueError(
            f"adapter: {path}: expected both matrices, got {'B' if update.a is None else 'A'} alone"
        )
    if update.a.shape[0] != update.b.shape[1]:
        got = f"A {list(update.a.shape)} and B {list(update.b.shape)}"
        raise ValueError(f"adapter: {path}: expected matrices of one rank, got {got}")
    config, rank = adapter.config, update.a.shape[0]
    alpha = _for_module(config.get("alpha_pattern"), path, config["lora_alpha"])
    update.scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    update.transposed = bool(config.get("fan_in_fan_out")) and not update.embedding


def _for_module(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The entry of rank_pattern or alpha_pattern for a module: PEFT matches its keys as endings of the path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
