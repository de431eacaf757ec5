"""`qlora.merge`: an adapter into its base model's weights, as a 16-bit checkpoint, tensor by tensor, with a report.

Two bases can be meant. "original" adds the update to the 16-bit weights: what every other tool expects, but the
adapter was trained on W after quantisation, and W differs from that by the quantisation error. "dequantized" adds it
to dequantise(quantise(W)): exactly the model that was trained, at the price of keeping that error. The report says
for each layer how large the error is beside the update, so that the choice need not be guessed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .adapter_reader import Adapter, Update, read_adapter
from .checkpoint_reader import CheckpointReader
from .checkpoint_writer import copy_files, write_config, write_shards
from .config import QuantConfig

Mode = Literal["original", "dequantized"]
REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class MergedLayer:
    """Frobenius norms of one merged layer.

    Attributes:
        name: the weight's name.
        update: |update| / |W|.
        quantization_error: |dequantise(quantise(W)) - W| / |W|, or None where W is known in 4 bits only.
        rounding_error: what rounding the merged weight to the output dtype loses, as a part of |update|.
    """

    name: str
    update: float
    quantization_error: float | None
    rounding_error: float

    @property
    def error_to_update(self) -> float | None:
        """How many times larger than the update the quantisation error is."""
        if self.quantization_error is None:
            return None
        return self.quantization_error / self.update if self.update else float("inf")


@dataclass
class MergeReport:
    """What was merged, where it is, and what that cost."""

    adapter: str
    base: str
    out: str
    mode: str
    dtype: str
    layers: list[MergedLayer] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_bytes: int = 0

    def summary(self) -> str:
        """A few lines for people."""
        changed = f"merged {len(self.layers)} layers and replaced {len(self.replaced)} tensors"
        size = f"{self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB of {self.dtype} in {self.out}"
        lines = [f"{changed}: {size}"]
        if self.layers:
            updates = [layer.update for layer in self.layers]
            lines.append(f"update / weight: median {_median(updates):.2e}, largest {max(updates):.2e}")
            lines.append(
                f"lost to {self.dtype} rounding: median {_median([x.rounding_error for x in self.layers]):.1%} of the update"
            )
            ratios = [ratio for layer in self.layers if (ratio := layer.error_to_update) is not None]
            if ratios:
                meaning = (
                    "the weights merged into differ by it from those the adapter was trained on"
                    if self.mode == "original"
                    else "it stays in the merged weights"
                )
                errors = [layer.quantization_error or 0.0 for layer in self.layers]
                lines.append(
                    f"quantisation error / weight: median {_median(errors):.2e}, {_median(ratios):.1f} times the update; "
                    f"{meaning} (mode {self.mode})"
                )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def merge(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    out: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "original",
    check: bool = True,
    quant_config: QuantConfig | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Writes base + adapter as an ordinary checkpoint that `from_pretrained` loads.

    One shard of the output is in memory at a time. `out` appears whole or not at all. The tokenizer comes from the
    adapter's directory where it has one, other files from the base's; `merge_report.json` holds the report.

    Args:
        adapter: directory or hub name of a LoRA adapter (LoRA, rsLoRA, DoRA, biases, modules_to_save).
        base: directory or hub name of the base model, 16-bit or 4-bit in bitsandbytes' layout; None is the one that
            the adapter names.
        out: directory to write.
        dtype: bfloat16, float16 or float32 of every floating tensor.
        mode: "original" merges into the weights as they are, "dequantized" into quantised and dequantised ones. A
            4-bit base is "dequantized" already.
        check: measure the quantisation error of each merged layer for the report (the layer is quantised once).
        quant_config: how the model was quantised for training; None is QuantConfig().
        device: where to compute; None is the GPU where there is one.
        overwrite: replace `out` if it is there.

    Raises:
        ValueError: an argument, the adapter or the base is not as said, they do not fit each other, or the merged
            weights would not be finite. `out` is as it was.
        FileExistsError: out exists and overwrite is False.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"qlora.merge: dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    if mode not in ("original", "dequantized"):
        raise ValueError(f"qlora.merge: mode: expected 'original' or 'dequantized', got {mode!r}")
    target = Path(out)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"qlora.merge: out: expected a new directory, got {target}, which exists")
    loaded = read_adapter(adapter)
    base = base if base is not None else loaded.base_name
    if base is None:
        raise ValueError("qlora.merge: base: expected a base model, got None and an adapter that names none")
    source = CheckpointReader(base)
    if mode == "original" and source.has_4bit:
        raise ValueError(
            f"qlora.merge: mode: expected 'dequantized' for {base}, which holds 4-bit weights only, got 'original'"
        )
    job = _Merge(loaded, source, dtype, mode, check, quant_config or QuantConfig(), _device(device))
    from .files import whole_directory

    report = MergeReport(str(adapter), str(base), str(target), mode, str(dtype).removeprefix("torch."))
    with whole_directory(target) as staging:
        report.num_tensors, report.num_bytes = write_shards(job.tensors(report), staging)
        copy_files(source.directory, loaded.directory, staging)
        write_config(source.config, staging, dtype, tied=None if not job.unties else False)
        (staging / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class _Merge:
    adapter: Adapter
    source: CheckpointReader
    dtype: torch.dtype
    mode: str
    check: bool
    quant_config: QuantConfig
    device: torch.device
    unties: bool = False

    def __post_init__(self) -> None:
        names = self.source.names()
        known = set(names)
        self._updates = {
            _find(path, "weight", known): update for path, update in self.adapter.updates.items()
        }
        self._biases = {
            _find(path, "bias", known): (update.scaling, update.bias)
            for path, update in self.adapter.updates.items()
            if update.bias is not None
        }
        self._replaced = {_find(*_split(name), known): value for name, value in self.adapter.replaced.items()}
        self._sources = {name: name for name in names}
        self._untie(known)
        # Name -> whether it is a Conv1D's, [in, out], which is quantised as the linear layer it stands for.
        self._requantised = (
            self._quantised_weights() if self.mode == "dequantized" and not self.source.has_4bit else {}
        )

    def _untie(self, known: set[str]) -> None:
        """Gives a head that shares the embeddings' weight one of its own where the adapter changes either of them."""
        embeddings = [name for name in known if name.endswith(("embed_tokens.weight", "wte.weight"))]
        touched = {*self._updates, *self._replaced}
        tied = self.source.config.get("tie_word_embeddings", False) and len(embeddings) == 1
        if tied and "lm_head.weight" not in known and touched & {embeddings[0], "lm_head.weight"}:
            self._sources["lm_head.weight"] = embeddings[0]
            self.unties = True
        missing = sorted(name for name in touched | self._biases.keys() if name not in self._sources)
        if missing:
            raise ValueError(
                f"qlora.merge: base: {len(missing)} of {len(touched)} weights that the adapter changes are not in "
                f"{self.source.directory}, such as {missing[0]!r}: expected the model it was trained on"
            )

    def tensors(self, report: MergeReport) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the output, on the CPU."""
        for name, source_name in self._sources.items():
            tensor = self.source.read(source_name, self.device)
            if tensor.is_floating_point():
                tensor = self._merged(name, tensor, report)
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"qlora.merge: {name}: expected finite values in {self.dtype}, got NaN or Inf"
                    )
            yield name, tensor.cpu().contiguous()

    def _merged(self, name: str, tensor: Tensor, report: MergeReport) -> Tensor:
        if name in self._replaced:
            new = self._replaced[name]
            _check_shape(name, tensor.shape, new.shape)
            report.replaced.append(name)
            if name not in self._updates:
                return new.to(self.device, self.dtype)
            tensor = new.to(self.device)  # PEFT saves an adapted embedding's own weight beside its adapter
        if name in self._biases:
            scaling, bias = self._biases[name]
            return (tensor.float() + scaling * bias.to(self.device).float()).to(self.dtype)
        update = self._updates.get(name)
        original = tensor
        if name in self._requantised:
            tensor = self._quantised(name, tensor)
        if update is None:
            return tensor.to(self.dtype)
        _check_shape(name, tensor.shape, update.delta(self.device).shape)
        exact = update.apply(tensor.float())
        merged = exact.to(self.dtype)
        report.layers.append(self._measured(name, original, tensor, exact, merged, update))
        return merged

    def _measured(
        self, name: str, original: Tensor, tensor: Tensor, exact: Tensor, merged: Tensor, update: Update
    ) -> MergedLayer:
        size, change = _norm(original), _norm(exact - tensor.float())
        error = None
        if self.check and not self.source.is_4bit(name) and not update.embedding:
            quantised = tensor if name in self._requantised else self._quantised(name, original)
            error = _norm(quantised.float() - original.float()) / size if size else 0.0
        lost = _norm(merged.float() - exact)
        return MergedLayer(
            name, change / size if size else float("inf"), error, lost / change if change else 0.0
        )

    def _quantised(self, name: str, weight: Tensor) -> Tensor:
        from .nn.tensor import dequantize_tensor, quantize_tensor

        config = self.quant_config
        update = self._updates.get(name)
        transposed = self._requantised.get(name, update is not None and update.transposed)
        packed, state = quantize_tensor(
            weight.t() if transposed else weight,
            block_size=config.block_size,
            quant_type=config.quant_type,
            double_quant=config.double_quant,
            name=name,
        )
        values = dequantize_tensor(packed, state)
        return values.t() if transposed else values

    def _quantised_weights(self) -> dict[str, bool]:
        """The weights that `from_pretrained` with quant_config stores in 4 bits."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from .nn.convert import is_conv1d, is_convertible, keep_reasons

        config = AutoConfig.from_pretrained(self.source.directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        kept = keep_reasons(model, self.quant_config)
        known = set(self.source.names())
        found = {
            _find(name, "weight", known): is_conv1d(module)
            for name, module in model.named_modules()
            if name not in kept and is_convertible(module, self.quant_config)
        }
        unknown = sorted(found.keys() - known)
        if unknown:
            raise ValueError(
                f"qlora.merge: mode: expected the weight {unknown[0]!r} in {self.source.directory}, got none: its names "
                "are not the model's, so what training quantised is unknown; use mode='original'"
            )
        return found


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _check_shape(name: str, expected: torch.Size, got: torch.Size) -> None:
    if expected != got:
        raise ValueError(
            f"qlora.merge: {name}: expected an adapter for shape {list(expected)}, got {list(got)}"
        )


def _split(name: str) -> tuple[str, str]:
    path, _, last = name.rpartition(".")
    return path, last


def _find(path: str, last: str, known: set[str]) -> str:
    """The checkpoint's name of a tensor of a module: the same, or the only one that ends in it or that it ends in."""
    name = f"{path}.{last}"
    if name in known:
        return name
    endings = [other for other in known if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return endings[0] if len(endings) == 1 else name
