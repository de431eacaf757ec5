"""Layers that stay in 16 bits for a budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import QuantConfig

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).parent.parent / "integrations"))

import tiny_models

from qlora.calibration import calibrate_
from qlora.calibration.budget import Harm, bits_per_weight, choose_kept
from qlora.calibration.layers import find_decoder_layers, record_inputs, run_layer
from qlora.nn import Linear4bit, quantize_


def windows() -> torch.Tensor:
    return torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))


def test_bits_are_those_that_are_stored() -> None:
    weight = torch.nn.Linear(1024, 256, bias=False)  # 4,096 blocks of 64, 16 nested blocks
    for double_quant in (True, False):
        config = QuantConfig(double_quant=double_quant)
        state = quantize_(torch.nn.Sequential(weight), config)[0].weight.quant_state.as_dict()
        scales = [state[key] for key in ("absmax", "nested_absmax") if key in state]
        stored = 4 + 8 * sum(value.numel() * value.element_size() for value in scales) / (1024 * 256)
        assert bits_per_weight(config) == stored


def test_the_most_harm_a_weight_is_kept_first_and_what_does_not_fit_is_passed_over() -> None:
    harms = [Harm("a", 100, 1.0), Harm("b", 1000, 20.0), Harm("c", 100, 1.5), Harm("d", 100, 0.1)]
    config = QuantConfig(double_quant=False)  # 4.5 bits

    def kept(values: int) -> list[str]:
        """Where there is room for so many values of the 1,300 in 16 bits."""
        return choose_kept(harms, 4.5 + 11.5 * values / 1300, config, 16)

    assert kept(99) == []
    assert kept(150) == ["c"]  # b comes first but does not fit
    assert kept(250) == ["a", "c"]
    assert kept(1150) == ["b", "c"]


def test_harm_is_what_the_layer_hands_on_otherwise(tmp_path: Path) -> None:
    """Quantising one linear of the second decoder layer by hand changes the states after it by as much."""
    model = tiny_models.make_model()
    result = calibrate_(tiny_models.make_model(), windows(), budget=8.0, work=tmp_path)
    _, layers = find_decoder_layers(model)
    inputs = record_inputs(model, layers, windows())
    before = [run_layer(layers[0], window, inputs.arguments[0]) for window in inputs.hidden]
    with torch.no_grad():
        wanted = torch.cat([run_layer(layers[1], window, inputs.arguments[1]) for window in before])
        down = layers[1].mlp.down_proj
        down.weight.data = quantize_(torch.nn.Sequential(down))[0].dequantize()
        found = torch.cat([run_layer(layers[1], window, inputs.arguments[1]) for window in before])
    harm = ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    noted = next(item for item in result.harms if item.name == "model.layers.1.mlp.down_proj")
    assert noted.num_values == 64 * 128
    # Means of float32 shares, each of two sums of 64 squares.
    assert abs(noted.harm - float(harm)) <= 130 * 2.0**-24 * float(harm)


@pytest.mark.parametrize("budget", [5.0, 8.0])
def test_the_mean_is_within_the_budget_and_near_it(budget: float, tmp_path: Path) -> None:
    model = tiny_models.make_model().to(torch.bfloat16)
    result = calibrate_(model, windows(), budget=budget, work=tmp_path)
    sizes = {item.name: item.num_values for item in result.harms}
    four = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert four == sizes.keys() - set(result.kept) and result.kept
    least = bits_per_weight(QuantConfig())
    bits = sum(size * (least if name in four else 16) for name, size in sizes.items()) / sum(sizes.values())
    smallest = min(sizes[name] for name in four)
    assert budget - (16 - least) * smallest / sum(sizes.values()) < bits <= budget


def test_a_killed_run_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.calibration import model as calibration

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    whole = tiny_models.make_model()
    expected = calibrate_(whole, windows(), budget=8.0, work=tmp_path / "whole")
    monkeypatch.setattr(calibration, "record_linears", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_(tiny_models.make_model(), windows(), budget=8.0, work=tmp_path / "work")
    monkeypatch.undo()
    monkeypatch.setattr(calibration, "measure_harm", killed)
    again = tiny_models.make_model()
    result = calibrate_(again, windows(), budget=8.0, work=tmp_path / "work")
    assert (result.kept, result.harms) == (expected.kept, expected.harms)
    left, right = again.state_dict(), whole.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("budget", [4.0, 32.0])
def test_a_budget_that_cannot_be_met_is_named(budget: float, tmp_path: Path) -> None:
    message = rf"expected mean bits a weight from 4.127 .* to below 32 \(none\), got {budget:g}"
    with pytest.raises(ValueError, match=message):
        calibrate_(tiny_models.make_model(), windows(), budget=budget, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
