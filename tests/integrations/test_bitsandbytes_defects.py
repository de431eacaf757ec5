"""What is broken or missing in bitsandbytes' 4-bit path and works here: those that no other file tests.

docs/bitsandbytes.md lists all of them.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from tiny_models import logits, make_model, saved, tokens  # noqa: E402
from torch import nn  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_bitwise_equal, assert_close_by_depth  # noqa: E402
from qlora import QuantConfig  # noqa: E402
from qlora.integrations.transformers_quantizer import QloraHfQuantizer  # noqa: E402
from qlora.nn import Linear4bit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")

AutoModel = transformers.AutoModelForCausalLM


def layer(dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any) -> Linear4bit:
    """A quantised layer [96, 128] with a bias."""
    torch.manual_seed(0)
    return Linear4bit(128, 96, quant_type="nf4", dtype=dtype, **settings).to(device)


def packed_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.data.clone().view(-1).view(torch.uint8)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_pefts_preparation_for_k_bit_training_leaves_the_packed_bytes_alone(
    storage: str, tmp_path: Path
) -> None:
    """It casts what it takes for 16-bit weights to float32, as numbers: bytes in a float dtype would be lost."""
    model = AutoModel.from_pretrained(
        saved(tmp_path), quantization_config=QuantConfig(quant_storage=storage), dtype=torch.bfloat16
    )
    before = packed_bytes(model)
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    after = packed_bytes(prepared)
    assert after.keys() == before.keys() and before
    for name, value in before.items():
        assert_bitwise_equal(after[name], value)
    assert logits(prepared).isfinite().all()


def test_preparation_casts_no_expert_and_no_embedding_to_float32(tmp_path: Path) -> None:
    """peft.prepare_model_for_kbit_training doubles the memory of both; qlora.prepare is the way here."""
    model = AutoModel.from_pretrained(
        saved(tmp_path, "mixtral"), quantization_config=QuantConfig(), dtype=torch.bfloat16
    )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["model.layers.0.mlp.experts.gate_up_proj"] == torch.bfloat16
    prepared = qlora.prepare(model)
    assert {name: parameter.dtype for name, parameter in prepared.named_parameters()} == dtypes


def test_float32_products_on_a_gpu_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """The default of BitsAndBytesConfig, slow and silent in bitsandbytes."""
    for settings, expected in ({}, True), ({"bnb_4bit_compute_dtype": "bfloat16"}, False):
        caplog.clear()
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
        with caplog.at_level(logging.WARNING, logger="qlora"):
            QloraHfQuantizer(config, pre_quantized=False)._resolve(make_model(), {"": "cuda:0"})
        assert ("computes in float32 unless told otherwise" in caplog.text) == expected


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_mix_of_dtypes_runs_and_changes_no_parameter(
    compute_dtype: torch.dtype | None, input_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    """bitsandbytes casts the bias in place, once for all, to the dtype of the first product."""
    module = layer(dtype, device, compute_dtype=compute_dtype)
    bias = module.bias.detach().clone()
    x = torch.randn(3, 128, device=device).to(input_dtype)
    result = module(x)
    assert result.dtype == input_dtype
    exact = nn.functional.linear(x.double(), module.dequantize().double(), bias.double())
    rounded = [kind for kind in (input_dtype, compute_dtype, dtype) if kind is not None]
    epsilon = max(torch.finfo(kind).eps for kind in rounded)
    # Operands and result rounded once each: to first order three roundings of sums of 128 products.
    bound = 2 * epsilon * (x.double().abs() @ module.dequantize().double().abs().t() + bias.double().abs())
    assert ((result.double() - exact).abs() <= bound).all()
    assert_bitwise_equal(module.bias, bias)
    assert module.compute_dtype is compute_dtype


def test_a_layer_that_ran_in_eval_mode_still_trains_and_keeps_its_bytes() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes reorders the weight then, for good, and the input gets no gradient."""
    module = layer(torch.bfloat16, compute_dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        expected = module.eval()(x)
    assert_bitwise_equal(module.train()(x), expected)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.any()
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_bitwise_equal(after[name], value)


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16])
def test_a_model_that_multiplies_by_the_weight_itself_gets_the_layers_product(
    quant_storage: torch.dtype, device: str
) -> None:
    """F.linear(x, layer.weight): bitsandbytes passes the packed bytes on, whose shape does not fit."""
    module = layer(quant_storage=quant_storage, device=device)
    x = torch.randn(2, 5, 128, device=device, requires_grad=True)
    got = nn.functional.linear(x, module.weight, module.bias)
    assert_bitwise_equal(got, module(x))
    assert_bitwise_equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(module(x).sum(), x)[0])
    assert_close_by_depth(
        nn.functional.linear(x, weight=module.weight), nn.functional.linear(x, module.dequantize())
    )
    with torch.autocast(device, torch.bfloat16):
        assert nn.functional.linear(x, module.weight).dtype == torch.bfloat16
    fresh = Linear4bit(128, 96)
    assert_bitwise_equal(
        nn.functional.linear(x.cpu(), fresh.weight), nn.functional.linear(x.cpu(), fresh.weight.data)
    )


def test_adapters_merge_and_unmerge_many_times_without_a_trace(tmp_path: Path) -> None:
    """As in a loop that generates with merged weights and trains in between."""
    model = qlora.add_lora(AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig()), r=4)
    generator = torch.Generator().manual_seed(0)
    before = packed_bytes(model)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        expected = logits(model)
        model.merge_adapter()
        assert any(not torch.equal(value, before[name]) for name, value in packed_bytes(model).items())
        model.unmerge_adapter()
        for name, value in packed_bytes(model).items():
            assert_bitwise_equal(value, before[name])
        assert_bitwise_equal(logits(model), expected)


def test_a_tied_head_stays_tied_through_saving_in_4_bits(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path, "qwen2"), quantization_config=QuantConfig())
    model.save_pretrained(tmp_path / "q")
    again = AutoModel.from_pretrained(tmp_path / "q", quantization_config=QuantConfig())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_bitwise_equal(logits(again), logits(model))


def test_a_generation_with_a_static_cache_may_compile(tmp_path: Path) -> None:
    """transformers compiles generate() by itself only for quantizers that say so."""
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens(), **settings)
    compiled = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config = copy.deepcopy(model.generation_config)
    config.update(cache_implementation="static", compile_config=compiled)
    # Where there is no GPU transformers compiles only if told that the device is one it compiles for.
    compiled._compile_all_devices = True
    counts = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counts.clear()
    try:
        got = model.generate(tokens(), generation_config=config, **settings)
        assert counts["stats"]["unique_graphs"] >= 1
    finally:
        torch._dynamo.reset()
    assert torch.equal(got, expected)
