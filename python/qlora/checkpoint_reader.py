"""Reads a model checkpoint of safetensors tensor by tensor, 16-bit or in bitsandbytes' 4-bit layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Methods whose checkpoints hold 4-bit weights as ours do.
_OUR_METHODS = ("bitsandbytes", "bitsandbytes_4bit", "qlora")


def model_directory(name: str | Path, patterns: tuple[str, ...], what: str) -> Path:
    """A local directory, or the snapshot of a hub model with the files that match.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's own errors are many; each means that there is nothing to read
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{what}: expected a directory or the name of a hub model, got {str(name)!r}: {reason[0]}"
        ) from error


class CheckpointReader:
    """The tensors of a checkpoint by name; nothing but headers is read before a tensor is asked for.

    Args:
        name: a directory or the name of a hub model.

    Raises:
        ValueError: it is no whole checkpoint of safetensors, or quantised by a method that is not ours.
    """

    def __init__(self, name: str | Path) -> None:
        patterns = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
        self.directory = model_directory(name, patterns, "base")
        self.config: dict[str, Any] = self._read_json("config.json")
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        if method is not None and method not in _OUR_METHODS:
            raise ValueError(
                f"{self.directory}: expected 16-bit or bitsandbytes 4-bit weights, got {method} ones"
            )
        self._file_of = self._weight_map()
        self._opened: dict[str, Any] = {}
        self._states: dict[str, list[str]] = {}
        for key in self._file_of:
            owner, found, _ = key.partition(".weight.")
            if found:
                self._states.setdefault(f"{owner}.weight", []).append(key)

    def names(self) -> list[str]:
        """Names of the tensors, as of an unquantised model, in the order of the files."""
        extra = {key for keys in self._states.values() for key in keys}
        return sorted(
            (name for name in self._file_of if name not in extra), key=lambda n: (self._file_of[n], n)
        )

    def is_4bit(self, name: str) -> bool:
        return name in self._states

    @property
    def has_4bit(self) -> bool:
        return bool(self._states)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor; a 4-bit one is dequantised to the dtype it was quantised from."""
        tensor = self._raw(name).to(device)
        if name not in self._states:
            return tensor
        from .nn import Params4bit

        stats = {key: self._raw(key) for key in self._states[name]}
        return Params4bit.from_prequantized(tensor, stats, device=device).dequantize()

    def _raw(self, name: str) -> Tensor:
        from safetensors import safe_open

        file = self._file_of[name]
        if file not in self._opened:
            self._opened[file] = safe_open(str(self.directory / file), framework="pt")
        tensor: Tensor = self._opened[file].get_tensor(name)
        return tensor

    def _read_json(self, file: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.directory / file).read_text())
        except OSError:
            raise ValueError(f"{self.directory}: expected a model checkpoint, got no {file}") from None
        except ValueError as error:
            raise ValueError(f"{self.directory / file}: expected JSON, got {error}") from error
        return content

    def _weight_map(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            listed: dict[str, str] = self._read_json(index.name)["weight_map"]
            files = sorted(set(listed.values()))
        else:
            listed, files = {}, ["model.safetensors"]
        found: dict[str, str] = {}
        for file in files:
            if not (self.directory / file).is_file():
                raise ValueError(f"{self.directory}: expected weights in {file}, which is missing")
            try:
                with safe_open(str(self.directory / file), framework="pt") as opened:
                    found.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise ValueError(f"{self.directory / file}: damaged or truncated: {error}") from error
        missing = sorted(listed.keys() - found.keys())
        if missing:
            raise ValueError(
                f"{self.directory}: {len(missing)} tensors of its index are missing, such as {missing[0]}"
            )
        return found
