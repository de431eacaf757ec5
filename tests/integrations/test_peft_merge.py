"""Merging adapters into 4-bit weights: once, checked, and undone to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import fill_adapters, lora_layers, packed_weights, pair, tokens  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_same_tensors  # noqa: E402
from qlora.integrations.peft import LoraLinear4bit  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]
# Largest distance of a value in [-1, 1] from its code: half the widest gap of the code book.
HALF_STEP = {"nf4": (1.0 - 0.6961928009986877) / 2, "fp4": (1.0 - 0.6666666865348816) / 2}


def adapted(kind="llama", dtype=torch.float32, quant=None, names=("default",), **options):
    model = pair(kind, dtype, **(quant or {}))[0]
    targets = options.pop("target_modules", "all-linear")
    for index, name in enumerate(names):
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
        if index == 0:
            model = get_peft_model(model, settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    fill_adapters(model)
    return model


def first_layer(model) -> LoraLinear4bit:
    return next(iter(lora_layers(model).values()))


def dense(layer) -> torch.Tensor:
    return layer.get_base_layer().dequantize(torch.float32)


def absmax_of(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = weight.flatten().view(-1, block_size)
    return blocks.abs().amax(1, keepdim=True).expand_as(blocks).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4", "block_size": 32, "double_quant": False}])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_unmerge_gives_back_every_byte(dtype, quant, options):
    model = adapted("qwen2", dtype, quant, **options)
    before, logits = packed_weights(model), model(input_ids=tokens()).logits
    model.merge_adapter()
    merged = packed_weights(model)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    model.unmerge_adapter()
    assert_same_tensors(packed_weights(model), before)
    assert torch.equal(model(input_ids=tokens()).logits, logits)


@pytest.mark.parametrize("kept", ["cpu", None])
def test_unmerge_gives_back_every_byte_wherever_they_were_kept(kept, device, monkeypatch):
    monkeypatch.setattr(LoraLinear4bit, "kept_device", kept)
    model = adapted().to(device)
    before = packed_weights(model)
    model.merge_adapter()
    assert first_layer(model)._kept.weight.device.type == (kept or device)
    model.unmerge_adapter()
    assert first_layer(model)._kept is None
    assert_same_tensors(packed_weights(model), before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merged_weight_is_the_sum_within_half_a_step(quant_type, options):
    quant = {"quant_type": quant_type, "double_quant": False}
    layer = first_layer(adapted(quant=quant, **options))
    base = dense(layer)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    wanted = base + update
    if options.get("use_dora"):
        wanted = wanted * (layer.lora_magnitude_vector["default"].weight / wanted.norm(dim=1))[:, None]
    layer.merge()
    bound = HALF_STEP[quant_type] * absmax_of(wanted, 64)
    assert ((dense(layer) - wanted).abs() <= bound * (1 + 1e-5) + 1e-7).all()
    state = layer.base_layer.quant_state
    assert (state.quant_type, state.blocksize, state.dtype, state.nested) == (
        quant_type,
        64,
        torch.float32,
        False,
    )


@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4", "block_size": 128, "quant_storage": "bfloat16"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_keeps_block_size_code_scales_storage_and_dtype(quant, dtype):
    layer = first_layer(adapted(dtype=dtype, quant=quant))
    old = layer.base_layer.weight
    layer.merge()
    new = layer.base_layer.weight
    for name in ("blocksize", "quant_type", "nested", "dtype", "shape"):
        assert getattr(new.quant_state, name) == getattr(old.quant_state, name), name
    assert new.dtype == old.dtype and new.shape == old.shape and type(new) is type(old)
    assert not new.requires_grad and layer.base_layer.quant_state is new.quant_state


def test_several_adapters_are_quantised_once():
    """Merged together, one after the other, or one of them twice over: the same bytes."""
    together = adapted(names=("first", "second"))
    together.base_model.set_adapter(["first", "second"])
    apart = copy.deepcopy(together)
    together.merge_adapter(["first", "second"])
    apart.merge_adapter(["first"])
    apart.merge_adapter(["second"])
    assert_same_tensors(packed_weights(apart), packed_weights(together))
    assert first_layer(apart).merged_adapters == ["first", "second"]


def test_merged_dora_adapters_compose_as_forward_composes_them():
    model = adapted(
        names=("first", "second"), use_dora=True, quant={"double_quant": False}, target_modules=["q_proj"]
    )
    layer = first_layer(model)
    layer.set_adapter(["first", "second"])
    x = torch.eye(64)
    expected = layer(x).T
    layer.merge()
    bound = HALF_STEP["nf4"] * absmax_of(expected, 64)
    assert ((dense(layer) - expected).abs() <= bound * (1 + 1e-4) + 1e-6).all()


def test_bias_of_an_adapter_merges_scaled_and_unmerges_exactly():
    model = adapted("qwen2", target_modules=["q_proj"], lora_bias=True)
    layer = first_layer(model)
    layer.lora_B["default"].bias.data.normal_()
    before = layer.base_layer.bias.clone()
    expected = before + layer.lora_B["default"].bias * layer.scaling["default"]
    assert layer.scaling["default"] == 2
    for safe in (False, True):
        layer.merge(safe_merge=safe)
        torch.testing.assert_close(layer.base_layer.bias, expected)
        layer.unmerge()
        assert torch.equal(layer.base_layer.bias, before)


@pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed but the targeted layer.*has no bias")
def test_bias_without_a_place_for_it_is_refused_before_anything_changes():
    model = adapted("llama", target_modules=["q_proj"], lora_bias=True)
    before = packed_weights(model)
    with pytest.raises(RuntimeError, match="the base layer has none"):
        model.merge_adapter()
    assert_same_tensors(packed_weights(model), before)
    assert first_layer(model).merged_adapters == []


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_anything_changes(safe, value):
    model = adapted(target_modules=["q_proj"])
    layer = first_layer(model)
    layer.lora_B["default"].weight.data[3, 1] = value
    before = packed_weights(model)
    with pytest.raises(ValueError, match="adapter 'default': expected finite values"):
        layer.merge(safe_merge=safe)
    assert_same_tensors(packed_weights(model), before)
    assert not layer.merged


def test_disable_adapter_unmerges():
    model = adapted()
    before = packed_weights(model)
    model.merge_adapter()
    with model.disable_adapter():
        model(input_ids=tokens())
    assert_same_tensors(packed_weights(model), before)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        first_layer(adapted()).unmerge()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_merged_layer_still_unmerges(how):
    layer = first_layer(adapted(target_modules=["q_proj"]))
    before = layer.base_layer.weight.data.clone()
    layer.merge()
    new = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    new.unmerge()
    assert torch.equal(new.base_layer.weight.data, before)
    assert layer.merged and not torch.equal(layer.base_layer.weight.data, before)


def test_what_is_kept_is_in_no_state_dict():
    model = adapted()
    keys = set(model.state_dict())
    model.merge_adapter()
    assert set(model.state_dict()) == keys
    assert {name for name, _ in model.named_parameters()} <= keys


def test_merge_and_unload_leaves_the_merged_4bit_layers():
    model = adapted()
    other = copy.deepcopy(model)
    other.merge_adapter()
    expected = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): t
        for n, t in packed_weights(other).items()
    }
    merged = model.merge_and_unload()
    assert not lora_layers(merged)
    assert_same_tensors(packed_weights(merged), expected)


def test_unload_gives_back_the_base_model():
    model = adapted()
    with model.disable_adapter():
        expected = model(input_ids=tokens()).logits
    assert torch.equal(model.unload()(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_merge_to_16_or_32_bit_loses_only_that_rounding(options):
    model = adapted("qwen2", **options)
    expected = model(input_ids=tokens()).logits
    merged = qlora.merge_and_unload(model, torch.float32)
    assert not any(isinstance(module, qlora.nn.Linear4bit) for module in merged.modules())
    error = (merged(input_ids=tokens()).logits - expected).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert {p.dtype for p in qlora.merge_and_unload(adapted(), torch.bfloat16).model.layers.parameters()} == {
        torch.bfloat16,
        torch.float32,  # the norms of a float32 model are not ours to cast
    }


def test_training_goes_on_after_unmerge():
    model = adapted().train()
    model.merge_adapter()
    model.unmerge_adapter()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert first_layer(model).lora_B["default"].weight.grad.abs().sum() > 0
