"""What `qlora bench calibrate` measures, on a tiny model and the CPU."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from qlora.bench import calibration  # noqa: E402
from qlora.nn import Linear4bit  # noqa: E402

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}


def tiny_config(num_layers: int = 2) -> Any:
    return transformers.LlamaConfig(num_hidden_layers=num_layers, **SIZES)


@pytest.mark.parametrize("method", calibration.METHODS)
def test_each_method_leaves_the_layers_in_4_bits(method: str) -> None:
    model = calibration.make_model(tiny_config(), CPU)
    errors = calibration.quantize(method, model, calibration.make_windows(64, 96), CPU)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and type(model.lm_head) is torch.nn.Linear
    assert len(errors) == (14 if method == "calibrated" else 0)


def test_the_figures_of_both_are_printed_as_they_are_done_and_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "llama3_8b_config", tiny_config)
    monkeypatch.setattr(sys, "argv", ["", "--layers", "1", "--tokens", "2100", "--device", "cpu"])
    calibration.main()
    first, second, both = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["partial"] and second["partial"] and both == {"cases": first["cases"] + second["cases"]}
    plain, calibrated = both["cases"]
    assert (plain["method"], calibrated["method"]) == calibration.METHODS
    assert calibrated["tokens"] == 2 * calibration.WINDOW and "tokens" not in plain
    assert plain["seconds"] >= 0 and calibrated["s_per_layer"] > 0 and calibrated["error_ratio"] < 1


def test_memory_is_that_of_each_method_and_what_calibrating_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter((4.0, 7.5))
    monkeypatch.setattr(
        calibration, "measure", lambda run, device: ({"seconds": 1.0, "peak_gb": next(peaks)}, run())
    )
    cases = list(calibration.bench_calibration(tiny_config(1), 64, CPU))
    assert [case["extra_gb"] for case in cases] == [0.0, 3.5]


def test_a_text_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="--tokens: expected at least 1, got 0"):
        calibration.make_windows(0, 96)
    assert calibration.make_windows(7, 96).shape == (1, 7)
