"""Params4bit: when it quantises, and that nothing else ever changes its bytes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layer_cases import assert_same_state, randn, state_tensors

from assertions import assert_bitwise_equal, assert_within
from qlora import reference
from qlora.nn import NonFiniteWeightError, Params4bit
from qlora.nn.params import plain_tensor


def make_param(*, device: str = "cpu", quantized: bool = True, **kwargs: Any) -> Params4bit:
    kwargs = {"quant_type": "nf4", **kwargs}
    param = Params4bit(randn(96, 128, seed=0), **kwargs)
    return param.to(device) if quantized else param


def tensors(param: Params4bit) -> dict[str, torch.Tensor]:
    holder = torch.nn.Module()
    holder.weight = param
    return state_tensors(holder)


def test_the_first_move_quantises_in_place_also_from_cpu_to_cpu(device: str) -> None:
    param = make_param(quantized=False)
    assert not param.bnb_quantized
    assert param.shape == (96, 128)
    moved = param.to(device)
    assert moved is param
    assert param.bnb_quantized
    assert (param.dtype, tuple(param.shape), param.device.type) == (torch.uint8, (96 * 128 // 2, 1), device)
    assert param.quant_state is not None
    assert param.quant_state.device.type == device
    values = randn(96, 128, seed=0)
    packed, absmax = reference.quantize_4bit(values)
    if device == "cpu":
        assert_bitwise_equal(plain_tensor(param), packed)
    # Half the widest gap between NF4 codes, and half a step of the 8-bit scales.
    tolerance = absmax.repeat_interleave(64).view(96, 128) * (0.152 + 0.01)
    assert_within(param.dequantize(), values, tolerance)


@pytest.mark.parametrize(
    "move", [lambda p: p.cpu(), lambda p: p.to("cpu", torch.bfloat16), lambda p: p.to(torch.empty(0))]
)
def test_every_spelling_of_a_move_quantises(move: Any) -> None:
    param = make_param(quantized=False)
    assert move(param) is param
    assert param.bnb_quantized


def test_the_meta_device_and_casts_do_not_quantise() -> None:
    param = make_param(quantized=False)
    assert not param.to("meta").bnb_quantized
    cast = param.to(torch.bfloat16)
    assert (cast.bnb_quantized, cast.dtype, cast.shape) == (False, torch.bfloat16, (96, 128))
    assert param.half().dtype == torch.float16


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "cast",
    [
        lambda p: p.to(torch.float16),
        lambda p: p.to("cpu", torch.float32),
        lambda p: p.half(),
        lambda p: p.bfloat16(),
        lambda p: p.float(),
        lambda p: p.double(),
        lambda p: p.type(torch.float16),
    ],
)
def test_no_cast_touches_packed_bytes(quant_storage: torch.dtype, cast: Any) -> None:
    param = make_param(quant_storage=quant_storage)
    assert param.dtype == quant_storage
    before = tensors(param)
    after = cast(param)
    assert after.dtype == quant_storage
    assert_same_state(
        {
            name: value.view(torch.uint8) if name == "packed" else value
            for name, value in tensors(after).items()
        },
        {name: value.view(torch.uint8) if name == "packed" else value for name, value in before.items()},
    )


@pytest.mark.gpu
def test_a_move_of_packed_bytes_returns_a_new_parameter_and_leaves_the_old_one() -> None:
    param = make_param()
    before = tensors(param)
    moved = param.to("cuda")
    assert moved is not param
    assert param.quant_state is not None
    assert (param.device.type, param.quant_state.device.type, moved.device.type) == ("cpu", "cpu", "cuda")
    assert_same_state(tensors(param), before)
    assert_same_state(tensors(moved), before)
    assert_same_state(tensors(moved.cpu()), before)


def test_from_meta_and_back_keeps_the_state() -> None:
    param = make_param()
    away = param.to("meta")
    assert away.device.type == "meta"
    back = type(param)(plain_tensor(param), **away.__dict__).to("cpu")
    assert_same_state(tensors(back), tensors(param))


def test_dict_round_trip_rebuilds_and_unknown_arguments_are_ignored() -> None:
    fresh = make_param(quantized=False, blocksize=128, quant_type="fp4", compress_statistics=False)
    keys = {
        "blocksize",
        "bnb_quantized",
        "compress_statistics",
        "module",
        "quant_state",
        "quant_storage",
        "quant_type",
    }
    assert set(fresh.__dict__) == keys
    again = Params4bit(
        randn(96, 128, seed=5), requires_grad=False, **fresh.__dict__, _is_hf_initialized=True
    ).to("cpu")
    assert (again.blocksize, again.quant_type, again.compress_statistics) == (128, "fp4", False)
    assert again.quant_state is not None
    assert again.quant_state.blocksize == 128


def test_module_argument_is_kept_up_to_date() -> None:
    module = torch.nn.Module()
    param = make_param(module=module)
    assert module.quant_state is param.quant_state


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("quantized", [True, False])
def test_copies_keep_class_attributes_and_bits(duplicate: Any, quantized: bool, device: str) -> None:
    param = make_param(quantized=quantized, device=device)
    param.quant_storage = torch.uint8
    other = duplicate(param)
    assert type(other) is Params4bit
    assert other.requires_grad == param.requires_grad
    assert {name: value for name, value in other.__dict__.items() if name != "quant_state"} == {
        name: value for name, value in param.__dict__.items() if name != "quant_state"
    }
    if quantized:
        assert_same_state(tensors(other), tensors(param))
    else:
        assert_bitwise_equal(plain_tensor(other), plain_tensor(param))


def test_deepcopy_shares_nothing() -> None:
    param = make_param()
    other = copy.deepcopy(param)
    before = tensors(param)
    for tensor in (other.data, other.absmax, other.nested_absmax, other.nested_offset):
        tensor.fill_(1)
    assert_same_state(tensors(param), before)


@pytest.mark.parametrize(
    "split", [lambda p: torch.chunk(p, 2), lambda p: torch.split(p, 3072), lambda p: p.chunk(2)]
)
def test_chunk_and_split_keep_class_and_state(split: Any) -> None:
    param = make_param()
    pieces = split(param)
    assert len(pieces) == 2
    for piece in pieces:
        assert type(piece) is Params4bit
        assert piece.quant_state is param.quant_state
        assert piece.bnb_quantized
    assert_bitwise_equal(torch.cat([plain_tensor(piece) for piece in pieces]), plain_tensor(param))


def test_state_is_reachable_by_the_names_of_checkpoint_keys() -> None:
    param = make_param()
    state = param.quant_state
    assert state is not None
    assert state.state2 is not None
    assert param.absmax is state.absmax
    assert param.code is param.quant_map is state.code
    assert param.offset is param.nested_offset is state.offset
    assert param.state2 is state.state2
    assert param.nested_absmax is state.state2.absmax
    assert param.nested_quant_map is state.state2.code
    assert (param.nested_blocksize, param.nested_dtype) == (256, torch.float32)
    with pytest.raises(AttributeError, match="absmax"):
        _ = make_param(quantized=False).absmax
    with pytest.raises(AttributeError, match="its scales are plain"):
        _ = make_param(compress_statistics=False).nested_absmax


def test_from_prequantized_inverts_the_checkpoint_layout(device: str) -> None:
    param = make_param()
    assert param.quant_state is not None
    stats = param.quant_state.as_dict(packed=True)
    again = Params4bit.from_prequantized(plain_tensor(param), stats, device=device)
    assert again.device.type == device
    assert_same_state(tensors(again), tensors(param))
    with pytest.raises(ValueError, match=r"expected 6144 packed bytes for shape \[96, 128\], got 6000"):
        Params4bit.from_prequantized(plain_tensor(param)[:6000], stats)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_weight_with_nan_or_inf_is_refused(value: float, compress_statistics: bool, device: str) -> None:
    weight = randn(96, 128, seed=0)
    weight[50, 3] = value
    with pytest.raises(NonFiniteWeightError, match="holds NaN or Inf"):
        Params4bit(weight, quant_type="nf4", compress_statistics=compress_statistics).to(device)
