"""Writes a checkpoint as transformers has it: shards of safetensors, their index, the config, the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHARD_BYTES = 4 << 30
_WEIGHT_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".index.json",
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)


def write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> tuple[int, int]:
    """Writes named CPU tensors as model.safetensors, or as shards of 4 GiB with their index, one shard in memory.

    Returns:
        How many tensors and bytes.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = num_tensors = num_bytes = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, str(directory / f"part-{len(shards)}"), metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        added = tensor.numel() * tensor.element_size()
        if pending and size + added > _SHARD_BYTES:
            flush()
        pending[name] = tensor
        size += added
        num_tensors += 1
        num_bytes += added
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return num_tensors, num_bytes
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{index}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return num_tensors, num_bytes


def copy_files(base: Path, adapter: Path, target: Path) -> None:
    """Everything of the base model that is not weights, with the tokenizer of the adapter where it has one."""
    for path in sorted(base.iterdir()):
        if (
            path.is_file()
            and not path.name.startswith(("adapter_", "."))
            and not path.name.endswith(_WEIGHT_FILES)
        ):
            shutil.copyfile(path, target / path.name)
    for pattern in _TOKENIZER_FILES:
        for path in adapter.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def write_config(config: dict[str, Any], target: Path, dtype: torch.dtype, tied: bool | None = None) -> None:
    """config.json of an unquantised checkpoint of `dtype`; `tied`, if not None, says whether the head is the embeddings."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = name
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
