"""QuantState: the layout of a checkpoint, and what a damaged one says."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from layer_cases import randn

from assertions import assert_bitwise_equal
from qlora.nn import QuantState
from qlora.nn.tensor import dequantize_tensor, quantize_tensor

TEXT_KEY = "quant_state.bitsandbytes__nf4"


def make_state(*, double_quant: bool = True, quant_type: str = "nf4", device: str = "cpu") -> QuantState:
    weight = randn(96, 200, seed=0, dtype=torch.bfloat16, device=device)
    _, state = quantize_tensor(weight, block_size=64, quant_type=quant_type, double_quant=double_quant)
    return state


def text_of(packed: dict[str, Any]) -> str:
    (key,) = [key for key in packed if "bitsandbytes__" in key]
    return bytes(packed[key].tolist()).decode()


def test_packed_keys_and_dtypes_are_the_layouts() -> None:
    packed = make_state().as_dict(packed=True)
    kinds = {key: (value.dtype, tuple(value.shape)) for key, value in packed.items() if key != TEXT_KEY}
    assert kinds == {
        "absmax": (torch.uint8, (300,)),
        "quant_map": (torch.float32, (16,)),
        "nested_absmax": (torch.float32, (2,)),
        "nested_quant_map": (torch.float32, (256,)),
    }
    assert packed[TEXT_KEY].dtype == torch.uint8
    assert set(make_state(double_quant=False).as_dict(packed=True)) == {"absmax", "quant_map", TEXT_KEY}
    assert make_state(double_quant=False).as_dict(packed=True)["absmax"].dtype == torch.float32


def test_packed_text_is_exactly_the_layouts_json() -> None:
    state = make_state()
    assert state.offset is not None
    assert text_of(state.as_dict(packed=True)) == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 200], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {state.offset.item()}}}'
    )
    assert text_of(make_state(double_quant=False, quant_type="fp4").as_dict(packed=True)) == (
        '{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 200]}'
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_from_dict_inverts_as_dict_to_the_bit(packed: bool, double_quant: bool, quant_type: str) -> None:
    state = make_state(double_quant=double_quant, quant_type=quant_type)
    values = state.as_dict(packed=packed)
    before = dict(values)
    again = QuantState.from_dict({f"weight.{key}": value for key, value in values.items()}, "cpu")
    assert again == state
    assert_bitwise_equal(again.absmax, state.absmax)
    assert (again.shape, again.dtype, again.nested) == (state.shape, state.dtype, state.nested)
    if double_quant:
        assert again.offset is not None
        assert state.offset is not None
        assert again.state2 is not None
        assert_bitwise_equal(again.offset, state.offset)
    assert values == before or values.keys() == before.keys()


def test_offset_stays_float32_under_a_16_bit_default_dtype() -> None:
    state = make_state()
    packed = state.as_dict(packed=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = QuantState.from_dict(packed, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.offset is not None
    assert state.offset is not None
    assert_bitwise_equal(again.offset, state.offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_offset_of_an_old_checkpoint_is_read_as_float32(dtype: torch.dtype) -> None:
    state = make_state()
    assert state.offset is not None
    old = QuantState(
        state.absmax, state.shape, state.code, 64, "nf4", torch.bfloat16, state.offset.to(dtype), state.state2
    )
    assert old.offset is not None
    assert_bitwise_equal(old.offset, state.offset.to(dtype).float())
    again = QuantState.from_dict(old.as_dict(packed=True), "cpu")
    assert again.offset is not None
    assert_bitwise_equal(again.offset, old.offset)


def test_attributes_by_dotted_name_and_index_answer_as_bitsandbytes_do() -> None:
    state = make_state()
    assert_bitwise_equal(getattr(state, "bitsandbytes__nf4"), state.as_dict(packed=True)[TEXT_KEY])  # noqa: B009
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        getattr(state, "bitsandbytes__fp4")  # noqa: B009
    assert state[0] is state.absmax
    assert state[3] == 64
    assert state[4] == [state.offset, state.state2]
    assert state[5] == "nf4"


def test_a_pickle_from_before_states_were_modules_is_read() -> None:
    state = make_state()
    old = copy.deepcopy(state)
    own = vars(torch.nn.Module()).keys() | {"_shape", "num_rows", "num_columns"}
    attributes = {name: value for name, value in vars(old).items() if name not in own}
    old.__dict__.clear()
    old.__setstate__({**attributes, "shape": state.shape})
    assert old == state and old.shape == state.shape and (old.num_rows, old.num_columns) == (96, 200)
    assert not list(old.children()) and pickle.loads(pickle.dumps(old)) == state


def test_rows_and_columns_follow_the_shape() -> None:
    state = make_state()
    state.shape = torch.Size((200, 96))
    assert (state.num_rows, state.num_columns) == (200, 96)
    state.shape = (19200,)
    assert (state.num_rows, state.num_columns) == (None, None)


def test_what_modules_do_to_their_tensors_leaves_a_state_as_it_is() -> None:
    state, before = make_state(), make_state()
    assert state.half().float().cpu().eval().requires_grad_(False) == before
    assert state.cpu().absmax.dtype is torch.uint8 and not state.state_dict()


def test_copies_are_equal_and_independent() -> None:
    state = make_state()
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert other == state
        other.absmax.fill_(0)
        assert other != state


def test_to_moves_in_place_and_copy_to_does_not(device: str) -> None:
    state = make_state()
    moved = state.copy_to(device)
    assert state.device.type == "cpu"
    assert moved.device.type == device
    assert moved.state2 is not state.state2
    assert state.to(device) is state
    assert state.device.type == device
    assert state.state2 is not None
    assert state.offset is not None
    assert {state.state2.device.type, state.offset.device.type} == {device}


def damage(**changes: Any) -> dict[str, Any]:
    values = make_state().as_dict(packed=True)
    text = json.loads(text_of(values))
    for key, value in changes.items():
        target = values if key in values else text
        if value is None:
            del target[key]
        else:
            target[key] = value
    values[TEXT_KEY] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absmax": None}, "absmax is missing: have"),
        ({"nested_absmax": None}, "nested_absmax is missing"),
        ({"nested_offset": None}, "nested_offset is missing"),
        ({"blocksize": None}, "blocksize is missing"),
        (
            {"absmax": torch.zeros(299, dtype=torch.uint8)},
            r"absmax: expected 300 scales for shape \[96, 200\].*got 299",
        ),
        (
            {"absmax": torch.zeros(300)},
            "absmax: expected torch.uint8 for double-quantised scales, got torch.float32",
        ),
        ({"nested_absmax": torch.zeros(3)}, "nested_absmax: expected 2 of torch.float32, got 3"),
        ({"nested_quant_map": torch.zeros(255)}, "nested_quant_map: expected 256 values, got 255"),
        ({"quant_map": torch.zeros(16)}, "quant_map: expected the nf4 code book, got"),
        ({"blocksize": 48}, "blocksize: expected one of .* got 48"),
        ({"nested_blocksize": 128}, "nested_blocksize: expected 256, got 128"),
        ({"dtype": "float13"}, "dtype: expected the name of a torch dtype, got 'float13'"),
        ({"quant_type": "fp4"}, "expected a quant_type of the same name"),
    ],
)
def test_a_damaged_state_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(damage(**changes), "cpu")


def test_missing_ambiguous_and_unreadable_text_are_errors() -> None:
    values = make_state().as_dict(packed=True)
    text = values.pop(TEXT_KEY)
    with pytest.raises(ValueError, match="quant_state.bitsandbytes__nf4 or .* is missing: have absmax"):
        QuantState.from_dict(values, "cpu")
    with pytest.raises(ValueError, match="expected exactly one of"):
        QuantState.from_dict({**values, TEXT_KEY: text, "quant_state.bitsandbytes__fp4": text}, "cpu")
    with pytest.raises(ValueError, match="expected JSON text, got 10 damaged bytes"):
        QuantState.from_dict({**values, TEXT_KEY: text[:10]}, "cpu")
    with pytest.raises(ValueError, match="unknown key 'weight.abmax'"):
        QuantState.from_dict({**values, TEXT_KEY: text, "weight.abmax": text}, "cpu")


@pytest.mark.parametrize("shape", [(5, 48), (7, 33), (1,), (0,), (3, 4, 64)])
def test_quantize_tensor_keeps_the_shape_of_any_tensor(shape: tuple[int, ...]) -> None:
    weight = randn(*shape, seed=1)
    packed, state = quantize_tensor(weight, block_size=32, quant_type="nf4", double_quant=True)
    values = dequantize_tensor(packed, state)
    assert values.shape == weight.shape
    assert values.dtype == weight.dtype


def test_quant_storage_that_the_bytes_do_not_fill_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"expected a multiple of 8 values for quant_storage torch.float32, got 30"
    ):
        quantize_tensor(
            randn(30, seed=0),
            block_size=64,
            quant_type="nf4",
            double_quant=False,
            quant_storage=torch.float32,
        )
