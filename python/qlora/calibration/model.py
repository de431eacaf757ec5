"""`calibrate_`: the linear layers of a language model to NF4 that is fitted to a text, decoder layer by decoder layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantConfig
from ..nn import convert
from ..nn.linear import Linear4bit
from ..nn.params import Params4bit
from ..nn.report import KEPT_ATTRIBUTE
from .layers import (
    find_decoder_layers,
    input_groups,
    input_moments,
    record_inputs,
    run_layer,
    to_float32,
)
from .weight import calibrate_weight
from .work import LayerError, Work, digest

#: Goes up with every change that gives other bytes for the same input.
_METHOD = 3


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    windows: Tensor,
    config: QuantConfig | None = None,
    *,
    work: Path,
    device: torch.device | str = "cpu",
) -> list[LayerError]:
    """Stores the linear layers of a causal language model in NF4, in place, so that what they compute changes least.

    The windows go through decoder layer i in float32 twice, as the original layers before it give them and as the
    quantised ones do, while moments of a linear's inputs are summed up. It gets the weight that makes of the second what
    it made of the first, then the next linear follows. In the end the windows go through the original layer and the
    quantised one, which gives the inputs of layer i + 1. On `device` are one layer in float32, twice, and its moments. The model may stay on the CPU, in 16 bits.

    Linears outside the decoder layers, and embeddings if the configuration wants them, are quantised as
    `qlora.quantize_` does it.

    Args:
        model: a causal language model of transformers, not quantised.
        windows: int64 [num_windows, length], the tokens of the calibration text.
        config: QuantConfig() if None.
        work: directory for the finished layers. Where it holds some of the same model, text and configuration, these
            are taken and the rest is done.
        device: where to compute.

    Returns:
        The output error of every calibrated layer, before and after.

    Raises:
        ValueError: config.quant_type is not "nf4"; the windows are empty or hold tokens that the model lacks; `work`
            belongs to another calibration; the model cannot be run layer by layer; or a weight is not finite.
    """
    config = QuantConfig() if config is None else config
    if config.quant_type != "nf4":
        raise ValueError(f"qlora.calibrate_: config: expected quant_type 'nf4', got {config.quant_type!r}")
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    _check_windows(model, windows)
    device = torch.device(device)
    prefix, layers = find_decoder_layers(model)
    reasons = convert.keep_reasons(model, config)
    targets = [_targets(layer, f"{prefix}.{index}", reasons, config) for index, layer in enumerate(layers)]
    if not any(targets):
        raise ValueError(
            "qlora.calibrate_: model: expected linear layers to quantise, got none in the decoder layers"
        )
    state = Work(work, _plan(model, windows, config, targets))
    was_training = model.training
    model.eval()
    inputs = record_inputs(model, layers, windows)
    original = list(inputs.hidden)
    errors: list[LayerError] = []
    for index in tqdm(range(len(layers)), desc="calibrating", unit="layer"):
        layer = layers[index]
        names = targets[index]
        arguments = to_float32(inputs.arguments[index], device)
        dense = copy.deepcopy(layer).float().to(device)
        source = digest(layer.parameters())
        if not state.has(index):
            weights, found = _calibrate_layer(
                layer, dense, names, f"{prefix}.{index}", original, inputs.hidden, arguments, config
            )
            state.save(index, source, weights, found)
        # From the file in any case: a run that was resumed computes with the same bytes.
        weights, found = state.load(index, source, names)
        errors += found
        if index + 1 < len(layers):
            _run(dense, original, arguments)
            for name, weight in weights.items():
                _set_values(dense, name, weight)
            _run(dense, inputs.hidden, arguments)
        for name, weight in weights.items():
            _put(layer, name, weight, f"{prefix}.{index}.{name}", config)
    convert.quantize_(model, config)  # the rest, and the notes that hosts make
    setattr(model, KEPT_ATTRIBUTE, reasons)
    model.train(was_training)
    return errors


def _check_windows(model: Any, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype is not torch.int64 or windows.numel() == 0:
        got = f"{windows.dtype} {list(windows.shape)}"
        raise ValueError(f"qlora.calibrate_: windows: expected torch.int64 [num_windows, length], got {got}")
    size = model.get_input_embeddings().weight.shape[0]
    if int(windows.min()) < 0 or int(windows.max()) >= size:
        got = f"{int(windows.min())} to {int(windows.max())}"
        raise ValueError(f"qlora.calibrate_: windows: expected tokens from 0 to {size - 1}, got {got}")


def _targets(layer: nn.Module, prefix: str, reasons: dict[str, str], config: QuantConfig) -> list[str]:
    """Names within a decoder layer of the linears to quantise, in the order of the module tree."""
    return [
        name
        for name, module in layer.named_modules()
        if (type(module) is nn.Linear or convert.is_conv1d(module))
        and f"{prefix}.{name}" not in reasons
        and convert.is_convertible(module, config)
    ]


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


def _run(working: nn.Module, hidden: list[Tensor], arguments: Any) -> None:
    """Replaces the hidden states of each window by what the decoder layer makes of them."""
    device = next(working.parameters()).device
    for window, value in enumerate(hidden):
        hidden[window] = run_layer(working, value.to(device), arguments).to(value.device)


def _calibrate_layer(
    layer: nn.Module,
    dense: nn.Module,
    names: list[str],
    prefix: str,
    original: list[Tensor],
    hidden: list[Tensor],
    arguments: Any,
    config: QuantConfig,
) -> tuple[dict[str, Params4bit], list[LayerError]]:
    """Quantises the linears in the order in which they run, so that each is fitted to what those before it give.

    `dense` is the layer in float32 on the device; it is left as it is.
    """
    device = next(dense.parameters()).device
    working = copy.deepcopy(dense)
    weights: dict[str, Params4bit] = {}
    errors: dict[str, LayerError] = {}
    for group in input_groups(dense, names, hidden, arguments):
        moments = input_moments(group[0], (dense, original), (working, hidden), arguments)
        for name in group:
            full_name = f"{prefix}.{name}"
            module: Any = layer.get_submodule(name)
            weight = module.weight.detach().to(device)
            weight = weight.T.contiguous() if convert.is_conv1d(module) else weight
            result = calibrate_weight(
                weight, moments.square, config, f"{full_name}.weight", drift=moments.drift
            )
            weights[name] = Params4bit._from_packed(result.packed, result.state)
            errors[name] = LayerError(full_name, result.error_absmax, result.error, result.is_calibrated)
            _set_values(working, name, weights[name])
    return {name: weights[name] for name in names}, [errors[name] for name in names]


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
