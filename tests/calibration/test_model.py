"""Whole models, decoder layer by decoder layer; runs that were killed go on with the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import QuantConfig

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).parent.parent / "integrations"))

import tiny_models

from qlora.calibration import calibrate_
from qlora.calibration.layers import find_decoder_layers, record_inputs, run_layer
from qlora.calibration.moments import RecordedInputs, input_moments, record_linears
from qlora.calibration.work import Work
from qlora.nn import Linear4bit


def windows(seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(seed))


def calibrated(work: Path, name: str = "llama", **settings: Any) -> Any:
    model = tiny_models.make_model(name, **settings)
    calibrate_(model, windows(), work=work)
    return model


def assert_same_bytes(a: Any, b: Any) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_linear_of_the_decoder_loses_less_than_with_absmax(name: str, tmp_path: Path) -> None:
    model = tiny_models.make_model(name)
    errors = calibrate_(model, windows(), work=tmp_path).errors
    linears = [key for key, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert [error.name for error in errors] == linears
    assert all(error.calibrated < error.absmax for error in errors)


def test_the_layers_are_run_as_the_model_runs_them() -> None:
    """Layer after layer over the recorded inputs gives the hidden states of the whole model, bit for bit."""
    model = tiny_models.make_model()
    _, layers = find_decoder_layers(model)
    inputs = record_inputs(model, layers, windows())
    with torch.no_grad():
        wanted = model(input_ids=windows()[1:2], output_hidden_states=True, use_cache=False).hidden_states
    hidden = inputs.hidden[1]
    assert torch.equal(hidden, wanted[0])
    hidden = run_layer(layers[0], hidden, inputs.arguments[0])
    assert torch.equal(hidden, wanted[1])
    hidden = run_layer(layers[1], hidden, inputs.arguments[1])
    assert torch.equal(model.model.norm(hidden), wanted[2])


def test_what_others_put_around_a_layer_is_there_afterwards() -> None:
    model = tiny_models.make_model()
    _, layers = find_decoder_layers(model)
    plain = layers[0].forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    layers[0].forward = hooked
    record_inputs(model, layers, windows())
    assert layers[0].forward is hooked
    assert "forward" not in layers[1].__dict__


class Block(torch.nn.Module):
    """A decoder layer of three linears: two over the same input, one over their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = torch.nn.Linear(8, 8)
        self.a = torch.nn.Linear(8, 8)
        self.b = torch.nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c(self.a(hidden) + self.b(hidden))


def recorded(layer: torch.nn.Module, names: list[str], hidden: list[Tensor]) -> RecordedInputs:
    return record_linears(layer, names, hidden, ((), {}))


def test_linears_are_grouped_by_input_in_the_order_in_which_they_run() -> None:
    layer, hidden = Block(), list(torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)))
    before = list(hidden)
    found = recorded(layer, ["c", "a", "b"], hidden)
    assert found.groups == [["a", "b"], ["c"]]
    with torch.no_grad():
        for window in range(2):
            assert torch.equal(found.of_group[0][window], before[window][0])
            between = layer.a(before[window]) + layer.b(before[window])
            assert torch.equal(found.of_group[1][window], between[0])
            assert torch.equal(hidden[window], layer.c(between))  # the window after the layer


def test_a_linear_that_never_runs_is_named() -> None:
    layer = Block()
    layer.spare = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="spare: expected inputs from the calibration text, got none"):
        recorded(layer, ["a", "spare"], [torch.zeros(1, 5, 8)])


def test_a_layer_that_gets_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a: expected the same tokens .* got \[4, 8\] and \[5, 8\]"):
        input_moments("a", [torch.zeros(4, 8)], Block(), [torch.zeros(1, 5, 8)], ((), {}))


def test_moments_are_those_of_the_inputs() -> None:
    original, quantised = torch.randn(2, 2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    moments = input_moments("a", list(original[:, 0]), Block(), list(quantised), ((), {}))
    x, y = quantised.reshape(-1, 8).double(), original.reshape(-1, 8).double()
    # float32 sums of 10 products each, of two roundings a term.
    bound = 12 * 2.0**-24 * ((x.abs() + y.abs()).T @ x.abs())
    assert ((moments.square.double() - x.T @ x).abs() <= bound).all()
    assert ((moments.drift.double() - (y - x).T @ x).abs() <= bound).all()
    bound = 12 * 2.0**-24 * (x.abs() + y.abs()).T @ (x.abs() + y.abs())
    assert ((moments.lost.double() - (y - x).T @ (y - x)).abs() <= bound).all()


def test_no_token_outweighs_the_others() -> None:
    hidden = torch.ones(1, 101, 8)
    hidden[0, 0] = 1000.0
    moments = input_moments("a", [hidden[0]], Block(), [hidden], ((), {}))
    # A hundred tokens, and one that counts as 16 of them; float32 sums of 101 terms.
    assert ((moments.square - 116.0).abs() <= 102 * 2.0**-24 * 116.0).all()
    assert torch.equal(moments.drift, torch.zeros(8, 8))


def test_products_are_in_full_float32_whatever_the_process_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    save = Work.save
    monkeypatch.setattr(
        Work,
        "save",
        lambda *args: (found.append(torch.backends.cuda.matmul.fp32_precision), save(*args)),
    )
    torch.backends.cuda.matmul.allow_tf32 = True  # set back after the test: see conftest.py
    calibrated(tmp_path)
    assert found == ["ieee", "ieee"]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.backends.cuda.matmul.allow_tf32


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    assert_same_bytes(calibrated(tmp_path / "a"), calibrated(tmp_path / "b"))


def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated(tmp_path / "whole")
    save, saved = Work.save, []

    def killed(self: Work, index: int, *rest: Any) -> None:
        saved.append(index)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(Work, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        "layer-00000.safetensors",
        "plan.json",
    ]
    assert_same_bytes(calibrated(tmp_path / "work"), whole)
    assert saved == [0, 1, 1]  # the first layer was not done again


def test_the_state_dict_loads_bit_equal(tmp_path: Path) -> None:
    import qlora

    model = calibrated(tmp_path)
    fresh = qlora.quantize_(tiny_models.make_model(), QuantConfig())
    fresh.load_state_dict(model.state_dict())
    assert_same_bytes(fresh, model)
    assert torch.equal(tiny_models.logits(fresh), tiny_models.logits(model))


def test_without_a_work_directory_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = tiny_models.make_model()
    calibrate_(model, windows())
    assert_same_bytes(model, calibrated(tmp_path))


def test_work_of_another_text_is_refused(tmp_path: Path) -> None:
    calibrated(tmp_path)
    with pytest.raises(ValueError, match="got one with another tokens: delete it to start anew"):
        calibrate_(tiny_models.make_model(), windows(seed=2), work=tmp_path)


def test_work_of_other_weights_is_refused(tmp_path: Path) -> None:
    calibrated(tmp_path)
    model = tiny_models.make_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(
        ValueError, match="layer-00001.safetensors: expected a layer made of this model's weights"
    ):
        calibrate_(model, windows(), work=tmp_path)


def test_a_damaged_layer_file_is_named(tmp_path: Path) -> None:
    calibrated(tmp_path)
    path = tmp_path / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ValueError, match="layer-00001.safetensors: expected a finished layer, got a damaged file"
    ):
        calibrated(tmp_path)


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty or absent work directory"):
        calibrated(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.zeros(0, 8, dtype=torch.int64),
            r"expected torch.int64 \[num_windows, length\], got torch.int64 \[0, 8\]",
        ),
        (torch.zeros(2, 8), "got torch.float32"),
        (torch.full((2, 8), 256), "expected tokens from 0 to 255, got 256 to 256"),
    ],
)
def test_bad_windows_are_named(tokens: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_(tiny_models.make_model(), tokens, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_fp4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected quant_type 'nf4', got 'fp4'"):
        calibrate_(tiny_models.make_model(), windows(), QuantConfig(quant_type="fp4"), work=tmp_path)
