"""QuantConfig(calibration=...): a model is calibrated as it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qlora
import tiny_run
from qlora import Calibration, QuantConfig
from qlora.nn import Linear4bit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib")

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
TOKENS = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def loaded(model: Path, calibration: Any, **options: Any) -> Any:
    config = QuantConfig(calibration=calibration, compute_dtype="bfloat16")
    kwargs = {"dtype": torch.bfloat16, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=config, **kwargs)


def linears(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


@pytest.mark.parametrize("budget", [None, 6.0])
def test_the_model_is_the_one_that_the_command_writes(
    budget: float | None, model: Path, text: Path, tmp_path: Path, device: str
) -> None:
    out = tmp_path / "out"
    options = [] if budget is None else ["--budget", str(budget)]
    arguments = ("--out", out, "--calibrate", text, "--calibrate-tokens", str(TOKENS), *options)
    assert tiny_run.run_in_process("quantize", model, *arguments) == 0
    calibration = Calibration(text, num_tokens=TOKENS, budget=budget)
    ours = loaded(model, calibration, device_map={"": "cuda" if torch.cuda.is_available() else "cpu"})
    ours.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(path / "model.safetensors") for path in (out, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    assert [key for key in stored if not torch.equal(stored[key], saved[key])] == []
    assert (out / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(
        out, quantization_config=QuantConfig(), device_map={"": device}
    )
    assert linears(again) == linears(ours)
    assert len(linears(ours)) == 14 if budget is None else 0 < len(linears(ours)) < 14


def test_it_is_the_calibrated_model_and_says_what_was_done(model: Path, text: Path) -> None:
    plain = loaded(model, None)
    ours = loaded(model, Calibration(text, num_tokens=TOKENS))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(ours.state_dict()[name], plain.state_dict()[name])
    done = getattr(ours, qlora.calibration.CALIBRATED_ATTRIBUTE)
    assert [error.name for error in done.errors] == linears(ours)
    assert all(error.calibrated <= error.absmax for error in done.errors)
    assert ours.is_quantized and ours.quantization_method == "bitsandbytes"
    assert not (model.parent / "model.calibration").exists()


def test_a_list_a_data_set_and_tokens_are_texts(model: Path) -> None:
    texts = [f"{number} plus {number} is {2 * number}" for number in range(60)]
    first = loaded(model, Calibration(texts, num_tokens=256))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = qlora.calibration.token_windows(Calibration(texts, num_tokens=256), tokenizer)
    others = [Calibration([{"text": text} for text in texts], num_tokens=256), tokens]
    datasets = pytest.importorskip("datasets")
    others.append(Calibration(datasets.Dataset.from_dict({"text": texts}), num_tokens=256))
    state = first.state_dict()
    for calibration in others:
        other = loaded(model, calibration).state_dict()
        assert [key for key in state if not torch.equal(state[key], other[key])] == []


def test_a_killed_load_goes_on_from_its_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.calibration import model as calibration

    fit, fitted = calibration.calibrate_weight, []

    def killed(weight: Any, output_error: Any, config: Any) -> Any:
        fitted.append(weight.shape)
        if len(fitted) == 10:
            raise KeyboardInterrupt
        return fit(weight, output_error, config)

    monkeypatch.setattr(calibration, "calibrate_weight", killed)
    options = Calibration(text, num_tokens=TOKENS, work=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        loaded(model, options)
    again = loaded(model, options).state_dict()
    assert len(fitted) == 10 + 7  # the second layer alone
    whole = loaded(model, Calibration(text, num_tokens=TOKENS)).state_dict()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


def test_bitsandbytes_reads_which_layers_stay_in_16_bits(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    arguments = ("--out", out, "--calibrate", text, "--calibrate-tokens", "256", "--budget", "8")
    assert tiny_run.run_in_process("quantize", model, *arguments) == 0
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
import bitsandbytes
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map={"": "cpu"})
four = [name for name, module in model.named_modules() if type(module) is bitsandbytes.nn.Linear4bit]
print(len(four), bool(torch.isfinite(model(torch.arange(20)[None]).logits).all()))
print(" ".join(four))
"""
    done = tiny_run.run_script(script, out)
    assert done.returncode == 0, done.stderr
    (count, finite), names = (line.split() for line in done.stdout.splitlines()[-2:])
    ours = linears(transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=QuantConfig()))
    assert names == ours and 0 < int(count) < 14 and finite == "True"


def test_what_cannot_be_calibrated_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quant_type: expected 'nf4' with a calibration, got 'fp4'"):
        QuantConfig(quant_type="fp4", calibration=text)
    with pytest.raises(ValueError, match="calibration: expected None, got a Calibration"):
        qlora.quantize_(torch.nn.Linear(64, 64), QuantConfig(calibration=text))
    with pytest.raises(ValueError, match="expected one device for a calibration, got "):
        loaded(model, text, device_map={"model": 0, "lm_head": 1})
    with pytest.raises(ValueError, match="expected at least 32768 tokens, got 1800"):
        loaded(model, text)
    loaded(model, None).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="expected a 16-bit checkpoint for a calibration, got a 4-bit one"):
        loaded(tmp_path / "four", text)
