"""LoRA over 4-bit layers: who makes it, and that it computes what PEFT computes on the dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import (  # noqa: E402
    fill_adapters,
    lora_layers,
    packed_weights,
    pair,
    tiny_model,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_close_by_depth, assert_same_tensors  # noqa: E402
from qlora.integrations.peft import LoraEmbedding4bit, LoraLinear4bit  # noqa: E402

NUM_LINEARS = 2 * 7
# peft asks transformers by names that transformers 5.23 renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed but the targeted layer.*has no bias"),
]


def config(**kwargs):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs}
    )


def with_adapters(kind="llama", dtype=torch.float32, quant=None, **kwargs):
    """The 4-bit and the dense model, both with the same non-zero adapter."""
    quantized, dense = pair(kind, dtype, **(quant or {}))
    models = tuple(get_peft_model(model, config(**kwargs)) for model in (quantized, dense))
    for model in models:
        fill_adapters(model)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# Wiring


def test_get_peft_model_uses_our_layer_on_every_linear_but_the_head():
    model = get_peft_model(pair()[0], config())
    layers = lora_layers(model)
    assert len(layers) == NUM_LINEARS
    assert all(isinstance(layer, PeftLinear) for layer in layers.values())
    assert not any("lm_head" in name for name in layers)


def test_layers_that_are_not_ours_keep_peft_layer():
    model = get_peft_model(tiny_model(), config())
    kinds = {type(module) for module in model.modules() if isinstance(module, PeftLinear)}
    assert kinds == {PeftLinear}


def test_a_mapping_the_user_registered_comes_first():
    class Mine(LoraLinear4bit):
        pass

    settings = config()
    settings._register_custom_module({qlora.nn.Linear4bit: Mine})
    model = get_peft_model(pair()[0], settings)
    assert {type(layer) for layer in lora_layers(model).values()} == {Mine}


def test_transformers_add_adapter_uses_our_layer():
    from transformers.integrations import peft as in_transformers

    needed = getattr(in_transformers, "MIN_PEFT_VERSION", "0")
    if tuple(map(int, peft.__version__.split(".")[:2])) < tuple(map(int, needed.split(".")[:2])):
        pytest.skip(f"peft {needed}, which this transformers needs, is not installed")
    model = pair()[0]
    model.add_adapter(config(task_type=None))
    assert len(lora_layers(model)) == NUM_LINEARS
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_only_adapters_train_and_count_as_trainable():
    model = get_peft_model(pair()[0], config())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_float32_whatever_the_model(dtype):
    model = get_peft_model(pair(dtype=dtype)[0], config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4", "block_size": 128, "double_quant": False}])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_outputs_equal_peft_on_the_dequantised_model(kind, quant, options):
    ours, theirs = with_adapters(kind, quant=quant, **options)
    expected = theirs(input_ids=tokens()).logits
    assert_close_by_depth(ours(input_ids=tokens()).logits, expected, torch.float32)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_gradients_equal_peft_on_the_dequantised_model(options):
    ours, theirs = with_adapters("qwen2", **options)
    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    got = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_close_by_depth(got[name], wanted, torch.float32, factor=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_peft_is(dtype):
    """Both round in `dtype`; ours also rounds the adapters to it, as autocast does."""
    ours, theirs = with_adapters(dtype=dtype)
    exact = with_adapters()[1]
    for name, parameter in exact.named_parameters():
        parameter.data.copy_(theirs.get_parameter(name).data.float())
    expected = exact(input_ids=tokens()).logits
    assert_close_by_depth(ours(input_ids=tokens()).logits, expected, dtype)


@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast_computes_in_its_dtype_and_returns_it(use_dora):
    ours, theirs = with_adapters(use_dora=use_dora)
    expected = theirs(input_ids=tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(input_ids=tokens()).logits
        layer = next(iter(lora_layers(ours).values()))
        assert layer(torch.randn(3, 64)).dtype is torch.bfloat16
    assert_close_by_depth(logits, expected, torch.bfloat16)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_cast_in_a_bfloat16_layer(adapter_dtype):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
                self.shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    model = get_peft_model(pair(dtype=torch.bfloat16)[0], config())
    layer = next(iter(lora_layers(model).values()))
    layer.to(adapter_dtype)
    with Casts() as casts:
        layer(torch.randn(2, 5, 64, dtype=torch.bfloat16))
    assert casts.shapes == []


def test_dropout_changes_training_only_and_has_the_right_mean():
    ours, _ = with_adapters(lora_dropout=0.5, target_modules=["q_proj"])
    layer = next(iter(lora_layers(ours).values()))
    x = torch.randn(4, 64)
    layer.eval()
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) for _ in range(400)])
    spread = draws.std(0) / 400**0.5
    assert (draws[0] != draws[1]).any()
    assert ((draws.mean(0) - expected).abs() <= 6 * spread + 1e-6).all()


def test_dora_with_dropout_equals_peft_under_the_same_mask():
    ours, theirs = with_adapters("qwen2", use_dora=True, lora_dropout=0.3, target_modules=["q_proj"])
    layers = [
        next(m for m in model.modules() if isinstance(m, PeftLinear)).train() for model in (ours, theirs)
    ]
    x = torch.randn(3, 5, 64)
    results = []
    for layer in layers:
        torch.manual_seed(7)
        results.append(layer(x))
    assert_close_by_depth(*results, torch.float32)


def test_dora_dequantises_no_weight_after_the_first_pass():
    model = with_adapters(use_dora=True)[0]
    passes = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            passes[-1].add(func.name())
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        passes.append(set())
        with Operators():
            model(input_ids=tokens()).logits.sum().backward()
    assert all("qlora::linear_4bit" in names for names in passes)
    assert ["qlora::dequantize_4bit" in names for names in passes] == [True, False]


def test_dora_starts_as_the_base_model():
    quantized, _ = pair()
    expected = quantized(input_ids=tokens()).logits
    model = get_peft_model(quantized, config(use_dora=True))
    assert_close_by_depth(model(input_ids=tokens()).logits, expected, torch.float32)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        ours, _ = with_adapters()
        qlora.prepare(ours, gradient_checkpointing=checkpointing).train()
        ours(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    assert_same_tensors(gradients[1], gradients[0])


def test_the_layer_compiles_to_one_graph():
    ours, _ = with_adapters(target_modules=["q_proj"])
    layer = next(iter(lora_layers(ours).values()))
    x = torch.randn(2, 5, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), layer(x)
    torch.testing.assert_close(got, expected)
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_loss_falls_in_a_few_steps():
    model = qlora.add_lora(qlora.prepare(pair()[0]), r=4).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("watched", ["base_layer", "lora_A", "lora_B"])
def test_hooks_on_the_parts_still_run(watched):
    ours, _ = with_adapters(target_modules=["q_proj"])
    layer = next(iter(lora_layers(ours).values()))
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    part = layer.base_layer if watched == "base_layer" else getattr(layer, watched)["default"]
    shapes = []
    part.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    torch.testing.assert_close(layer(x), expected)
    assert shapes and shapes[0][:2] == (2, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Saving, several adapters


def test_a_saved_adapter_loads_without_user_code_and_gives_the_same_bits(tmp_path):
    ours, _ = with_adapters(use_rslora=True)
    expected = ours(input_ids=tokens()).logits
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair()[0], tmp_path)
    assert len(lora_layers(loaded)) == NUM_LINEARS
    assert torch.equal(loaded(input_ids=tokens()).logits, expected)
    loaded = PeftModel.from_pretrained(pair()[0], tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(input_ids=tokens()).logits, expected)


def test_a_saved_dora_adapter_loads_on_meta_too(tmp_path):
    ours, _ = with_adapters(use_dora=True)
    for layer in lora_layers(ours).values():
        layer.lora_magnitude_vector["default"].weight.data *= 1.1
    expected = ours(input_ids=tokens()).logits
    ours.save_pretrained(tmp_path)
    for meta in (False, True):
        loaded = PeftModel.from_pretrained(pair()[0], tmp_path, low_cpu_mem_usage=meta)
        # Not to the bit: a product of weights that lie otherwise in memory may sum in another order.
        assert_close_by_depth(loaded(input_ids=tokens()).logits, expected, torch.float32)


def test_load_adapter_and_set_adapter_switch_between_adapters(tmp_path):
    first, _ = with_adapters()
    first.save_pretrained(tmp_path)
    expected_first = first(input_ids=tokens()).logits
    model = get_peft_model(pair()[0], config(r=2), adapter_name="second")
    fill_adapters(model, seed=9)
    expected_second = model(input_ids=tokens()).logits
    model.load_adapter(tmp_path, adapter_name="first")
    assert torch.equal(model(input_ids=tokens()).logits, expected_second)
    model.set_adapter("first")
    assert torch.equal(model(input_ids=tokens()).logits, expected_first)
    model.base_model.set_adapter(["first", "second"])
    both = model(input_ids=tokens()).logits
    assert not torch.equal(both, expected_first) and not torch.equal(both, expected_second)


def test_disable_adapter_is_the_base_model_bit_for_bit():
    quantized, _ = pair()
    expected = quantized(input_ids=tokens()).logits
    model = get_peft_model(quantized, config())
    fill_adapters(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert not torch.equal(model(input_ids=tokens()).logits, expected)


def test_mixed_batches_give_each_row_its_adapter():
    model, _ = with_adapters()
    model.add_adapter("other", config(r=2))
    fill_adapters(model, seed=5)
    ids = tokens(batch=3)
    rows = []
    for name in ("default", "other"):
        model.set_adapter(name)
        rows.append(model(input_ids=ids).logits)
    with model.disable_adapter():
        rows.append(model(input_ids=ids).logits)
    mixed = model.eval()(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
    for index in range(3):
        assert_close_by_depth(mixed[index], rows[index][index], torch.float32)


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswap_replaces_an_adapter_in_place(tmp_path, compiled):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other, _ = with_adapters(r=8)
    other.save_pretrained(tmp_path)
    expected = other(input_ids=tokens()).logits
    model = get_peft_model(pair()[0], config())
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert {layer.lora_A["default"].weight.shape[0] for layer in lora_layers(model).values()} == {8}
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    assert_close_by_depth(model(input_ids=tokens()).logits, expected, torch.float32)


def test_xlora_converts_our_layers():
    from peft.tuners.xlora.layer import XLoraLinearLayer
    from peft.tuners.xlora.model import convert_layers_to_xlora

    model, _ = with_adapters(target_modules=["q_proj", "v_proj"])
    xlora = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters={"default": "unused"}
    )
    count, _ = convert_layers_to_xlora(model, nn.Identity(), xlora)
    assert count == 4
    replaced = [m for m in model.modules() if isinstance(m, LoraLinear4bit)]
    assert all(isinstance(m.forward.__self__, XLoraLinearLayer) for m in replaced)


def test_weighted_combination_of_adapters_works():
    model, _ = with_adapters()
    expected = model(input_ids=tokens()).logits
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    model.set_adapter("copy")
    assert_close_by_depth(model(input_ids=tokens()).logits, expected, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


def test_lora_on_a_4bit_embedding_equals_peft_on_the_dense_one():
    quantized, dense = pair(quantize_embeddings=True)
    models = [get_peft_model(m, config(target_modules=["embed_tokens"])) for m in (quantized, dense)]
    for model in models:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ours, theirs = models
    layer = next(m for m in ours.modules() if isinstance(m, LoraEmbedding4bit))
    assert_close_by_depth(ours(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits, torch.float32)
    before = packed_weights(ours)
    ours.merge_adapter()
    assert not torch.equal(
        layer.base_layer.weight, before["base_model.model.model.embed_tokens.base_layer.weight"]
    )
    ours.unmerge_adapter()
    assert_same_tensors(packed_weights(ours), before)


def test_variants_on_a_4bit_embedding_are_refused():
    quantized, _ = pair(quantize_embeddings=True)
    with pytest.raises(ValueError, match="expected a 16-bit embedding"):
        get_peft_model(quantized, config(target_modules=["embed_tokens"], use_dora=True))
