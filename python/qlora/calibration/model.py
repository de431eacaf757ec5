"""`calibrate_`: the linear layers of a language model to NF4 that is fitted to a text, decoder layer by decoder layer."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantConfig
from ..nn import convert
from ..nn.linear import Linear4bit
from ..nn.params import Params4bit
from ..nn.report import KEPT_ATTRIBUTE
from .budget import Harm, check_budget, choose_kept, measure_harm
from .layers import (
    LayerArguments,
    LayerInputs,
    find_decoder_layers,
    full_float32,
    kept_on,
    record_inputs,
    run_layer,
    to_float32,
)
from .moments import OutputError, RecordedInputs, input_moments, record_linears
from .weight import calibrate_weight, check_fit
from .work import LayerError, Work, digest

#: Goes up with every change that gives other bytes for the same input.
_METHOD = 5


@dataclass
class Calibrated:
    """What `calibrate_` did.

    Attributes:
        tokens_sha256: of the windows' int64 tokens.
        windows: [num_windows, length].
        errors: of every calibrated layer.
        budget: mean bits a weight that were asked for, or None.
        harms: of every layer that could have been quantised, where there was a budget.
        kept: names of those that stay as they are for it.
    """

    tokens_sha256: str
    windows: list[int]
    errors: list[LayerError] = field(default_factory=list)
    budget: float | None = None
    harms: list[Harm] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


@torch.no_grad()
@full_float32()
def calibrate_(
    model: nn.Module,
    windows: Tensor,
    config: QuantConfig | None = None,
    *,
    budget: float | None = None,
    work: Path | None = None,
    device: torch.device | str = "cpu",
) -> Calibrated:
    """Stores the linear layers of a causal language model in NF4, in place, so that what they compute changes least.

    The windows go through decoder layer i in float32 twice, as the original layers before it give them and as the
    quantised ones do, while moments of a linear's inputs are summed up. It gets the weight that makes of the second what
    it made of the first, then the next linear follows. In the end the windows go through the original layer and the
    quantised one, which gives the inputs of layer i + 1. On `device` are one layer in float32 and what fitting one
    weight takes: at most four [k, k] matrices of float32 and twelve times the weight. The model may stay on the CPU, in 16
    bits; where it is are, in float32, two hidden states of every token and what one layer's linears get of it.

    Linears outside the decoder layers, and embeddings if the configuration wants them, are quantised as
    `qlora.quantize_` does it. Where this raises, finished layers of the model are in 4 bits.

    Args:
        model: a causal language model of transformers, not quantised.
        windows: int64 [num_windows, length], the tokens of the calibration text.
        config: QuantConfig() if None; its `calibration` is not read.
        budget: mean bits a weight over the decoder's linears (see Calibration), or None.
        work: directory for what is finished. Where it holds some of the same model, text and configuration, that is
            taken and the rest is done. None: nothing is written.
        device: where to compute.

    Raises:
        ValueError: config.quant_type is not "nf4"; no choice of layers has the budget; the windows are empty or hold
            tokens that the model lacks; `work` belongs to another calibration; the model cannot be run layer by layer;
            or a weight is not finite.
    """
    config = QuantConfig() if config is None else dataclasses.replace(config, calibration=None)
    if config.quant_type != "nf4":
        raise ValueError(f"qlora.calibrate_: config: expected quant_type 'nf4', got {config.quant_type!r}")
    _check_windows(model, windows)
    prefix, layers = find_decoder_layers(model)
    targets = _all_targets(model, layers, prefix, config)
    stored_bits = 8 * next(layers.parameters()).element_size()
    if budget is not None:
        check_budget(budget, config, stored_bits)
    plan = _plan(model, windows, config, targets) | {"budget": budget}
    done = None if work is None else Work(work, plan)
    result = Calibrated(plan["tokens"], list(windows.shape), budget=budget)
    was_training = model.training
    model.eval()
    try:
        inputs = record_inputs(model, layers, windows)
        walk = _Walk(layers, prefix, inputs, done, torch.device(device))
        if budget is not None:
            result.harms = walk.measure(targets, config)
            result.kept = choose_kept(result.harms, budget, config, stored_bits)
            config = dataclasses.replace(config, skip_modules=[*(config.skip_modules or []), *result.kept])
            targets = _all_targets(model, layers, prefix, config)
        reasons = convert.keep_reasons(model, config)
        reasons |= dict.fromkeys(result.kept, f"budget of {budget} bits a weight")
        result.errors = walk.calibrate(targets, config)
        convert.quantize_(model, config)  # the rest, and the notes that hosts make
        setattr(model, KEPT_ATTRIBUTE, reasons)
    finally:
        model.train(was_training)
    return result


@dataclass
class _Walk:
    """What the two ways through the decoder layers share.

    Attributes:
        prefix: dotted name of `layers`.
        inputs: of the first layer.
        work: where finished steps are, or None.
        device: where to compute.
    """

    layers: nn.ModuleList
    prefix: str
    inputs: LayerInputs
    work: Work | None
    device: torch.device

    def calibrate(self, targets: list[list[str]], config: QuantConfig) -> list[LayerError]:
        """Quantises the linears `targets` of each decoder layer."""
        original, hidden = list(self.inputs.hidden), list(self.inputs.hidden)
        errors: list[LayerError] = []
        # Beside the GPU: a second for the 16-bit weights of a layer of an 8B Llama.
        with ThreadPoolExecutor(1) as hashing:
            for index in self._progress("calibrating"):
                layer, names, name = self.layers[index], targets[index], f"{self.prefix}.{index}"
                digests = hashing.submit(digest, [] if self.work is None else list(layer.parameters()))
                dense, arguments = self._start(index)
                weights: dict[str, Params4bit] = {}
                found: list[LayerError] = []
                if names and (self.work is None or not self.work.has(index)):
                    recorded = record_linears(dense, names, original, arguments)
                    weights, found = _fit_layer(layer, dense, recorded, name, hidden, arguments, config)
                    if self.work is not None:
                        self.work.save(index, digests.result(), weights, found)
                else:
                    _run(dense, original, arguments)
                if names and self.work is not None:
                    # From the file in any case: a run that was resumed computes with the same bytes.
                    weights, found = self.work.load(index, digests.result(), names)
                errors += found
                if index + 1 < len(self.layers):
                    for linear, weight in weights.items():
                        _set_values(dense, linear, weight)
                    _run(dense, hidden, arguments)
                for linear, weight in weights.items():
                    _put(layer, linear, weight, f"{name}.{linear}", config)
        return errors

    def measure(self, targets: list[list[str]], config: QuantConfig) -> list[Harm]:
        """The harm of every target, over the original hidden states."""
        source = "" if self.work is None else digest(self.layers.parameters())
        found = None if self.work is None else self.work.load_harms(source)
        if found is not None:
            return found
        harms: list[Harm] = []
        hidden = list(self.inputs.hidden)
        for index in self._progress("measuring"):
            dense, arguments = self._start(index)
            after = list(hidden)
            _run(dense, after, arguments)
            name = f"{self.prefix}.{index}"
            harms += measure_harm(dense, targets[index], name, hidden, after, arguments, config)
            hidden = after
        if self.work is not None:
            self.work.save_harms(source, harms)
        return harms

    def _progress(self, what: str) -> Any:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        return tqdm(range(len(self.layers)), desc=what, unit="layer")

    def _start(self, index: int) -> tuple[nn.Module, LayerArguments]:
        """A copy of a decoder layer in float32 on the device, and what it is called with."""
        dense = copy.deepcopy(self.layers[index]).to(self.device).float()
        return dense, to_float32(self.inputs.arguments[index], self.device)


def _check_windows(model: Any, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype is not torch.int64 or windows.numel() == 0:
        got = f"{windows.dtype} {list(windows.shape)}"
        raise ValueError(f"qlora.calibrate_: windows: expected torch.int64 [num_windows, length], got {got}")
    size = model.get_input_embeddings().weight.shape[0]
    if int(windows.min()) < 0 or int(windows.max()) >= size:
        got = f"{int(windows.min())} to {int(windows.max())}"
        raise ValueError(f"qlora.calibrate_: windows: expected tokens from 0 to {size - 1}, got {got}")


def _all_targets(
    model: nn.Module, layers: nn.ModuleList, prefix: str, config: QuantConfig
) -> list[list[str]]:
    """Of each decoder layer the names within it of the linears to quantise, in the order of the module tree."""
    reasons = convert.keep_reasons(model, config)
    targets = [
        [
            name
            for name, module in layer.named_modules()
            if (type(module) is nn.Linear or convert.is_conv1d(module))
            and f"{prefix}.{index}.{name}" not in reasons
        ]
        for index, layer in enumerate(layers)
    ]
    if not any(targets):
        raise ValueError(
            "qlora.calibrate_: model: expected linear layers to quantise, got none in the decoder layers"
        )
    return targets


def _plan(model: Any, windows: Tensor, config: QuantConfig, targets: list[list[str]]) -> dict[str, Any]:
    return {
        "method": _METHOD,
        "model": digest([model.get_input_embeddings().weight]),
        "dtype": str(model.dtype),
        "tokens": digest([windows]),
        "windows": list(windows.shape),
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "quant_storage": str(config.quant_storage),
        "layers": targets,
    }


def _run(working: nn.Module, hidden: list[Tensor], arguments: LayerArguments) -> None:
    """Replaces the hidden states of each window by what the decoder layer makes of them."""
    device = next(working.parameters()).device
    for window, value in enumerate(hidden):
        output = run_layer(working, value.to(device, non_blocking=True), arguments)
        hidden[window] = kept_on(output, value.device)


def _fit_layer(
    layer: nn.Module,
    dense: nn.Module,
    recorded: RecordedInputs,
    prefix: str,
    hidden: list[Tensor],
    arguments: LayerArguments,
    config: QuantConfig,
) -> tuple[dict[str, Params4bit], list[LayerError]]:
    """Quantises the linears in the order in which they run, so that each is fitted to what those before it give.

    `dense` is the layer in float32 on the device; its linears take the values of their 4-bit weights.
    """
    device = next(dense.parameters()).device
    weights: dict[str, Params4bit] = {}
    errors: dict[str, LayerError] = {}
    for group, original in zip(recorded.groups, recorded.of_group, strict=True):
        moments = input_moments(group[0], original, dense, hidden, arguments)
        original.clear()  # no longer needed
        sources = {name: _weight_of(layer, name).to(device) for name in group}
        output_errors: dict[str, OutputError] = {}
        for name, source in sources.items():
            check_fit(source, moments, config, f"{prefix}.{name}.weight")
            output_errors[name] = OutputError(source.float(), moments)
        del moments  # what is left of them are the sums of x x^T
        for name, source in sources.items():
            result = calibrate_weight(source, output_errors.pop(name), config)
            weights[name] = Params4bit._from_packed(result.packed, result.state)
            full_name = f"{prefix}.{name}"
            errors[name] = LayerError(full_name, result.error_absmax, result.error, result.is_calibrated)
        for name in group:
            _set_values(dense, name, weights[name])
    names = [name for name, _ in layer.named_modules() if name in weights]
    return {name: weights[name] for name in names}, [errors[name] for name in names]


def _weight_of(layer: nn.Module, name: str) -> Tensor:
    """The weight of a linear, [n, k]."""
    module: Any = layer.get_submodule(name)
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if convert.is_conv1d(module) else weight


def _set_values(layer: nn.Module, name: str, weight: Params4bit) -> None:
    """Gives a float32 linear the values of a 4-bit weight."""
    target: Any = layer.get_submodule(name)
    value = weight.dequantize(torch.float32).to(target.weight.device)
    target.weight.data = value.T.contiguous() if convert.is_conv1d(target) else value


def _put(layer: nn.Module, name: str, weight: Params4bit, full_name: str, config: QuantConfig) -> None:
    """Replaces a linear of the model by the 4-bit layer with this weight."""
    old: Any = layer.get_submodule(name)
    device = old.weight.device
    new = convert.empty_module_like(old, config, config.resolve_compute_dtype(device))
    assert isinstance(new, Linear4bit)
    new.layer_name = full_name
    new.weight = weight.to(device)
    layer.set_submodule(name, new)
