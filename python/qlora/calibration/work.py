"""The work directory of a calibration: a file for each finished step, so that a killed run goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..nn.params import Params4bit
from .budget import Harm

_PLAN = "plan.json"
_HARMS = "harms.json"


@dataclass
class LayerError:
    """Share of a linear layer's output that is lost: sum |W y - Q x|^2 / sum |W y|^2 over the text.

    W is the original weight, y its inputs in the original model, x those that the quantised layers before give.

    Attributes:
        name: dotted name in the model.
        absmax: with Q at the scales max |w|, over the same x.
        calibrated: with Q as it was stored.
        is_calibrated: False where the scales max |w| did better and were kept.
    """

    name: str
    absmax: float
    calibrated: float
    is_calibrated: bool


class Work:
    """A directory with `plan.json`, which says what is being calibrated how, and what is finished.

    Raises:
        ValueError: the directory belongs to another plan, or is no such directory.
    """

    def __init__(self, directory: Path, plan: dict[str, Any]) -> None:
        self.directory = directory
        path = directory / _PLAN
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found != plan:
                keys = sorted(key for key in {*plan, *found} if plan.get(key) != found.get(key))
                raise ValueError(
                    f"qlora: {directory}: expected the work of this calibration, got one with another {', '.join(keys)}: "
                    "delete it to start anew"
                )
        elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise ValueError(
                f"qlora: {directory}: expected an empty or absent work directory, got files without {_PLAN}"
            )
        else:
            files.write_json(path, plan)

    def save_harms(self, source: str, harms: list[Harm]) -> None:
        """Writes what `budget.measure_harm` found; `source` is the digest of the weights that it was found for."""
        files.write_json(
            self.directory / _HARMS, {"source": source, "harms": [asdict(item) for item in harms]}
        )

    def load_harms(self, source: str) -> list[Harm] | None:
        """What `save_harms` wrote, or None where nothing is written yet.

        Raises:
            ValueError: it was found for other weights.
        """
        path = self.directory / _HARMS
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["source"] != source:
            raise ValueError(f"qlora: {path}: expected harms of this model's weights, got those of others")
        return [Harm(**values) for values in content["harms"]]

    def _path(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self._path(index).is_file()

    def save(self, index: int, source: str, weights: dict[str, Params4bit], errors: list[LayerError]) -> None:
        """Writes layer `index`, whole or not at all. `source` is the digest of the weights that it was made of."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            assert weight.quant_state is not None
            tensors[name] = weight.detach().as_subclass(Tensor).cpu()
            for key, value in weight.quant_state.as_dict(packed=True).items():
                tensors[f"{name}.{key}"] = value.cpu().clone()
        about = {"source": source, "errors": json.dumps([asdict(error) for error in errors])}
        files.write_bytes(self._path(index), save(tensors, metadata=about))

    def load(
        self, index: int, source: str, names: Iterable[str]
    ) -> tuple[dict[str, Params4bit], list[LayerError]]:
        """What `save` wrote.

        Raises:
            ValueError: the file is damaged, or was made of other weights.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as opened:
                about = opened.metadata()
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"qlora: {path}: expected a finished layer, got a damaged file: {error}"
            ) from error
        if about["source"] != source:
            raise ValueError(
                f"qlora: {path}: expected a layer made of this model's weights, got one of others"
            )
        weights = {}
        for name in names:
            stats = {
                key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")
            }
            weights[name] = Params4bit.from_prequantized(tensors[name], stats, device="cpu")
        return weights, [LayerError(**values) for values in json.loads(about["errors"])]


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
