"""quantize_, dequantize_ and report on ordinary modules."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
from layer_cases import make_linear, make_model, randn, state_tensors

from assertions import assert_bitwise_equal
from qlora import QuantConfig, dequantize_, quantize_, report
from qlora.nn import Embedding4bit, Linear4bit, NonFiniteWeightError, Params4bit
from qlora.nn.convert import matches


class TiedModel(torch.nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 64)
        self.up = torch.nn.Linear(64, 128)
        self.norm = torch.nn.LayerNorm(128)
        self.down = torch.nn.Linear(128, 64)
        self.lm_head = torch.nn.Linear(64, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embed(tokens)))))


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Parameter(torch.randn(4, 64, 32))


def test_replaces_linear_layers_in_place_and_returns_the_model(device: str) -> None:
    model = make_model()
    x = randn(5, 128, seed=0, device=device)
    expected = make_model().to(device)(x)
    result = quantize_(model, device=device)
    assert result is model
    assert [type(layer) for layer in model] == [Linear4bit, torch.nn.ReLU, Linear4bit]
    assert model[0].layer_name == "0"
    assert {param.device.type for param in model.parameters()} == {device}
    change = (model(x) - expected).norm() / expected.norm()
    assert 0.01 < change < 0.2  # NF4 changes Gaussian weights by 0.09


def test_without_a_device_every_layer_stays_where_it_is() -> None:
    model = make_model()
    model[2].to("meta")
    quantize_(model)
    assert model[0].weight.device.type == "cpu"
    assert model[0].weight.bnb_quantized
    assert model[2].weight.device.type == "meta"
    assert model[2].quant_state is None


def test_settings_reach_every_layer() -> None:
    config = QuantConfig("fp4", 128, False, "float16", "bfloat16")
    model = quantize_(make_model(), config)
    for layer in (model[0], model[2]):
        state = layer.quant_state
        assert (state.quant_type, state.blocksize, state.nested, state.dtype) == (
            "fp4",
            128,
            False,
            torch.float32,
        )
        assert (layer.compute_dtype, layer.weight.dtype) == (torch.float16, torch.bfloat16)


def test_a_single_layer_is_returned_as_a_4_bit_layer() -> None:
    layer = quantize_(make_linear())
    assert type(layer) is Linear4bit
    assert type(dequantize_(layer)) is torch.nn.Linear


def test_head_tied_weights_and_embeddings_stay_by_default() -> None:
    model = quantize_(TiedModel(tied=False))
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.embed) is torch.nn.Embedding
    assert type(model.up) is type(model.down) is Linear4bit
    model = quantize_(TiedModel(), QuantConfig(quantize_head=True, quantize_embeddings=True))
    assert model.lm_head.weight is model.embed.weight
    assert type(model.lm_head) is torch.nn.Linear
    reasons = {item.name: item.reason for item in report(model).kept}
    assert reasons == {"embed.weight": "tied to lm_head"}


def test_head_and_embeddings_are_quantised_on_request() -> None:
    model = quantize_(TiedModel(tied=False), QuantConfig(quantize_head=True, quantize_embeddings=True))
    assert type(model.lm_head) is Linear4bit
    assert type(model.embed) is Embedding4bit
    assert model(torch.arange(5)).shape == (5, 32)


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("up", "layers.0.up", True),
        ("up", "layers.0.up_proj", False),
        ("layers.1", "layers.1.up", True),
        ("layers.1", "layers.11.up", False),
        ("layers.1", "model.layers.1.up", False),
        ("layers.*.up", "layers.3.up", True),
        ("*.mlp.*", "model.mlp.up", True),
        ("layers.0.up", "layers.0.up", True),
    ],
)
def test_skip_patterns_match_whole_parts_of_names(pattern: str, name: str, is_match: bool) -> None:
    assert (matches(name, [pattern]) == pattern) is is_match


def test_skipped_modules_stay_and_are_reported_with_their_pattern() -> None:
    model = quantize_(TiedModel(), QuantConfig(skip_modules=["down"]))
    assert type(model.down) is torch.nn.Linear
    assert type(model.up) is Linear4bit
    assert {item.reason for item in report(model).kept if item.name == "down.weight"} == {
        "skip_modules (down)"
    }


def test_subclasses_of_linear_stay_and_are_reported() -> None:
    class Odd(torch.nn.Linear):
        pass

    model = quantize_(torch.nn.Sequential(Odd(64, 64), torch.nn.Linear(64, 64)))
    assert type(model[0]) is Odd
    assert "Odd is a subclass of nn.Linear" in str(report(model))


def test_a_layer_used_under_two_names_stays_one_layer() -> None:
    shared = make_linear(64, 64)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": make_linear(64, 64, seed=3)})
    # The same module twice is one weight; only weights shared by different modules count as tied.
    quantize_(model)
    assert model["a"] is model["b"]
    assert type(model["a"]) is Linear4bit


def test_no_more_than_one_dense_weight_is_alive_beside_the_4_bit_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [torch.nn.Linear(64, 64, bias=False) for _ in range(6)]
    model = torch.nn.Sequential(*sizes)
    alive = [weakref.ref(layer) for layer in sizes]
    del sizes
    counts = []
    original = Params4bit.quantize_on

    def counting(self: Params4bit, *args: Any, **kwargs: Any) -> Params4bit:
        counts.append(sum(reference() is not None for reference in alive))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Params4bit, "quantize_on", counting)
    quantize_(model)
    assert counts == [6, 5, 4, 3, 2, 1]


def test_a_nan_names_the_layer_and_leaves_it_alone() -> None:
    model = torch.nn.ModuleDict({"first": make_linear(), "second": make_linear()})
    model["first"].weight.data[1, 2] = float("nan")
    with pytest.raises(NonFiniteWeightError, match="the weight of first holds NaN or Inf"):
        quantize_(model)
    assert type(model["first"]) is torch.nn.Linear


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="config: expected a QuantConfig, got dict"):
        quantize_(make_model(), {"quant_type": "nf4"})  # type: ignore[arg-type]


def test_quantising_twice_changes_nothing() -> None:
    model = quantize_(make_model())
    before = state_tensors(model[0])
    quantize_(model, QuantConfig(quant_type="fp4"))
    for name, tensor in state_tensors(model[0]).items():
        assert_bitwise_equal(tensor.as_subclass(torch.Tensor), before[name].as_subclass(torch.Tensor))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_gives_ordinary_layers_with_the_same_values(
    dtype: torch.dtype | None, device: str
) -> None:
    model = quantize_(make_model(), device=device)
    values = model[0].dequantize(dtype)
    result = dequantize_(model, dtype)
    assert result is model
    assert [type(layer) for layer in model] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert_bitwise_equal(model[0].weight, values)
    assert model[0].weight.dtype == model[0].bias.dtype == (dtype or torch.float32)
    assert model[0].weight.device.type == device
    x = randn(2, 128, seed=0, device=device, dtype=dtype or torch.float32)
    assert model(x).shape == (2, 40)


def test_training_mode_and_bias_survive_both_ways() -> None:
    model = make_model().eval()
    bias = model[0].bias.detach().clone()
    quantize_(model)
    assert not model[0].training
    assert model[0].bias.requires_grad
    dequantize_(model)
    assert_bitwise_equal(model[0].bias.detach(), bias)


def test_report_counts_values_bytes_and_bits() -> None:
    model = quantize_(TiedModel())
    found = report(model)
    values = 64 * 128 * 2
    assert (found.num_layers, found.num_values) == (2, values)
    # Half a byte a weight, a byte a block, four bytes for each of the nested scales and offsets.
    assert found.num_bytes == values // 2 + values // 64 + 2 * (4 + 4)
    assert found.bits_per_weight == pytest.approx(8 * found.num_bytes / values)
    kept = 32 * 64 + 128 + 64 + 2 * 128
    assert (found.num_values_kept, found.num_bytes_kept) == (kept, 4 * kept)
    text = str(found)
    assert "2 layers, 16.38 k weights in NF4 block 64 double-quantised" in text
    assert (
        "not quantised: embed.weight (Embedding): 2.05 k values, torch.float32, 8.19 kB: tied to lm_head"
        in text
    )
    assert "nothing is in 4 bits" in report(TiedModel()).summary()


def test_experts_that_stay_in_16_bits_are_reported_loudly(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.ModuleDict({"experts": Experts(), "up": make_linear()})
    with caplog.at_level(logging.WARNING, logger="qlora"):
        quantize_(model)
    assert "32.77 kB of expert weights are NOT quantised" in caplog.text
    assert "experts.gate_up" in caplog.text
    assert [item.name for item in report(model).experts] == ["experts.gate_up"]


def test_quantize_says_in_one_line_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qlora"):
        quantize_(make_model())
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "qlora: 2 layers, 16.13 k weights in NF4 block 64 double-quantised, 4.1"
    )
