"""State dicts of 4-bit layers: bitsandbytes' layout, 16-bit values taken in, and damaged ones refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import assert_same_state, make_linear, make_model, quantized_linear, randn, state_tensors

from assertions import assert_bitwise_equal
from qlora import QuantConfig, quantize_
from qlora.nn import Linear4bit

NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_keys_are_exactly_the_layouts(double_quant: bool, quant_type: str, device: str) -> None:
    layer = quantized_linear(device, double_quant=double_quant, quant_type=quant_type)
    keys = [
        "weight",
        "bias",
        "weight.absmax",
        "weight.quant_map",
        f"weight.quant_state.bitsandbytes__{quant_type}",
    ]
    state = layer.state_dict(prefix="x.")
    assert set(state) == {f"x.{key}" for key in (*keys, *(NESTED if double_quant else ()))}
    assert {value.device.type for value in state.values()} == {device}
    assert not any(value.requires_grad for value in state.values())


def test_saved_maps_share_no_memory_with_each_other() -> None:
    state = quantize_(make_model()).state_dict()
    pointers = [state[key].data_ptr() for key in state if "quant_map" in key]
    assert len(set(pointers)) == len(pointers) == 4


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("start", ["fresh", "quantised", "meta"])
@pytest.mark.parametrize("quant_storage", ["uint8", "bfloat16"])
def test_loading_restores_every_bit(assign: bool, start: str, quant_storage: str) -> None:
    layer = quantized_linear(quant_storage=quant_storage, block_size=128, quant_type="fp4")
    state = layer.state_dict()
    other = Linear4bit(128, 96, device="meta" if start == "meta" else None)
    if start == "quantised":
        other.to("cpu")
    if start == "meta":
        other.bias = torch.nn.Parameter(torch.zeros(96))
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(state_tensors(other), state_tensors(layer))
    assert (other.weight.blocksize, other.weight.quant_type, other.weight.quant_storage) == (
        *(128, "fp4"),
        getattr(torch, quant_storage),
    )
    x = randn(3, 128, seed=1)
    assert_bitwise_equal(other(x), layer(x))


def test_loading_copies_unless_told_to_assign() -> None:
    layer = quantized_linear()
    other = Linear4bit(128, 96)
    other.load_state_dict(layer.state_dict())
    before = state_tensors(layer)
    other.weight.data.fill_(0)
    assert_same_state(state_tensors(layer), before)


@pytest.mark.gpu
def test_loading_leaves_the_layer_on_its_device() -> None:
    layer, other = quantized_linear(), quantized_linear("cuda")
    other.load_state_dict(layer.state_dict())
    assert other.weight.device.type == "cuda"
    assert_same_state(state_tensors(other), state_tensors(layer))


def test_a_whole_model_goes_through_torch_save() -> None:
    import io

    model = quantize_(make_model())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.device("meta"):
        other = make_model_on_meta()
    quantize_(other)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    x = randn(3, 128, seed=1)
    assert_bitwise_equal(other(x), model(x))


def make_model_on_meta() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 40, bias=False))


def test_16_bit_values_are_quantised_into_a_4_bit_layer() -> None:
    layer = quantized_linear(block_size=128)
    dense = make_linear(seed=7)
    layer.load_state_dict(dense.state_dict())
    expected = quantized_linear(linear=dense, block_size=128)
    assert_same_state(state_tensors(layer), state_tensors(expected))
    assert_bitwise_equal(layer.bias, dense.bias)


def test_16_bit_values_stay_as_they_are_in_a_fresh_layer() -> None:
    layer = Linear4bit(128, 96)
    dense = make_linear(seed=7)
    layer.load_state_dict(dense.state_dict())
    assert not layer.weight.bnb_quantized
    assert_bitwise_equal(layer.weight.detach().as_subclass(torch.Tensor), dense.weight)


def damaged(change: str) -> dict[str, Any]:
    state = quantized_linear().state_dict()
    if change == "truncated":
        state["weight"] = state["weight"][:-10]
    elif change == "no scales":
        del state["weight.absmax"]
    elif change == "no state":
        state = {key: value for key, value in state.items() if key in ("weight", "bias")}
    elif change == "another shape":
        state = quantized_linear(linear=make_linear(64, 96)).state_dict()
    elif change == "16-bit of another shape":
        state["weight"] = randn(96, 64, seed=0)
        state = {key: value for key, value in state.items() if key in ("weight", "bias")}
    elif change == "nan":
        state = make_linear().state_dict()
        state["weight"][0, 0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", r"qlora: 0.weight: expected 6144 packed bytes for shape \[96, 128\], got 6134"),
        ("no scales", "qlora: 0.weight: absmax is missing: have"),
        (
            "no state",
            r"qlora: 0.weight: got torch.uint8 \[6144, 1\] without absmax, .*: the checkpoint is truncated",
        ),
        ("another shape", r"qlora: 0.weight: expected a weight of shape \[96, 128\], got \[96, 64\]"),
        ("16-bit of another shape", r"qlora: 0.weight: expected shape \[96, 128\], got \[96, 64\]"),
        ("nan", "qlora: 0.weight: .*holds NaN or Inf"),
    ],
)
def test_a_damaged_state_dict_is_one_clear_error_and_changes_nothing(change: str, message: str) -> None:
    model = torch.nn.Sequential(quantized_linear(linear=make_linear(seed=5)))
    before = state_tensors(model[0])
    state = {f"0.{key}": value for key, value in damaged(change).items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert_same_state(state_tensors(model[0]), before)


def test_missing_and_foreign_keys_are_reported_as_usual() -> None:
    layer = quantized_linear()
    result = layer.load_state_dict({"bias": torch.zeros(96), "foo": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert result.unexpected_keys == ["foo"]
    state = {**quantized_linear().state_dict(), "weight.scale": torch.zeros(1)}
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["weight.scale"]


def test_scales_without_packed_bytes_are_a_missing_weight() -> None:
    state = quantized_linear().state_dict()
    del state["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        quantized_linear().load_state_dict(state)


def test_config_of_the_saved_weight_wins_over_that_of_the_layer() -> None:
    layer = quantized_linear(linear=make_linear(), block_size=32, quant_type="fp4", double_quant=False)
    other = quantize_(make_linear(), QuantConfig())
    other.load_state_dict(layer.state_dict())
    assert other.quant_state is not None
    assert (other.quant_state.blocksize, other.quant_state.quant_type, other.quant_state.nested) == (
        32,
        "fp4",
        False,
    )
