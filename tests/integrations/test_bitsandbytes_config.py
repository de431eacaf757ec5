"""Every option of an unchanged BitsAndBytesConfig, loaded here and by bitsandbytes: the same layers and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from tiny_models import inputs, logits, model_class, saved  # noqa: E402

from assertions import assert_bitwise_equal  # noqa: E402
from qlora.nn import Linear4bit  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"bnb_4bit_use_double_quant": True},
    "compute-bf16": {"bnb_4bit_compute_dtype": torch.bfloat16},
    "compute-fp16": {"bnb_4bit_compute_dtype": "float16"},
    "store-int8": {"bnb_4bit_quant_storage": torch.int8},
    "store-bf16": {"bnb_4bit_quant_storage": torch.bfloat16},
    "store-fp16": {"bnb_4bit_quant_storage": "float16"},
    "store-fp32": {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_use_double_quant": True},
    "store-fp64": {"bnb_4bit_quant_storage": torch.float64},
    "skip-nothing": {"llm_int8_skip_modules": []},
    "skip-some": {"llm_int8_skip_modules": ["lm_head", "down_proj", "model.layers.0.self_attn"]},
}


def load(path: str, name: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    return model_class(name).from_pretrained(
        path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


def assert_same_format(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor the same to the bit, but for codes that bitsandbytes' CPU code rounds to the other side.

    These are FP4 codes and 8-bit codes of scales beside a threshold: tests/ops/test_bitsandbytes_golden.py has which.
    """
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        ours, theirs = (tensor.reshape(-1).view(torch.uint8) for tensor in (got[key], value))
        differing = ours != theirs
        if value.dtype == torch.uint8 and key.endswith(".absmax"):
            assert (ours.int() - theirs.int()).abs().max() <= 1, key
            assert differing.float().mean() < 0.05, key
        elif f"{key}.quant_state.bitsandbytes__fp4" in expected:
            assert differing.float().mean() < 0.02, key
        else:
            assert not differing.any(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("llama", option) for option in OPTIONS),
        ("gpt2", "double"),
        ("t5", "double"),
        ("gemma", "skip-nothing"),
    ],
)
def test_an_option_makes_the_layers_and_bytes_of_bitsandbytes(
    name: str, option: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, options = saved(tmp_path, name), OPTIONS[option]
    theirs = load(path, name, options, dtype)
    assert type(theirs.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
    request.getfixturevalue("enabled")
    ours = load(path, name, options, dtype)
    assert type(ours.hf_quantizer).__name__ == "QloraHfQuantizer"
    layers = {
        path: module
        for path, module in theirs.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    if option == "skip-nothing" and name == "gemma":
        # They quantise a tied head apart from its embeddings, which then are two weights.
        assert not isinstance(ours.lm_head, Linear4bit)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        layers.pop("lm_head")
    else:
        assert_same_format(ours.state_dict(), theirs.state_dict())
    assert {path for path, module in ours.named_modules() if isinstance(module, Linear4bit)} == set(layers)
    for layer_path, layer in layers.items():
        module = ours.get_submodule(layer_path)
        assert (module.compute_dtype, module.quant_storage) == (layer.compute_dtype, layer.quant_storage)
        for attribute in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
            assert getattr(module.weight, attribute) == getattr(layer.weight, attribute), attribute
    assert ours.generate(**inputs(name), max_new_tokens=2, min_new_tokens=2).shape == (
        1,
        3 if name == "t5" else 22,
    )
    ours.save_pretrained(tmp_path / "q")
    again = model_class(name).from_pretrained(tmp_path / "q", dtype=dtype)
    assert type(again.hf_quantizer).__name__ == "QloraHfQuantizer"
    assert_bitwise_equal(logits(again, name), logits(ours, name))
    plain = again.dequantize()
    assert plain.dtype == dtype
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())


@pytest.mark.usefixtures("enabled")
def test_modules_on_the_cpu_of_a_gpu_model_stay_in_16_bits(tmp_path: Path) -> None:
    """llm_int8_enable_fp32_cpu_offload, as far as the choice of layers goes; here all devices are the CPU."""
    from qlora.integrations.transformers_quantizer import QloraHfQuantizer

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    quantizer = QloraHfQuantizer(config, pre_quantized=False)
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "cpu"}
    quantizer.validate_environment(device_map=device_map)
    model = model_class("llama").from_pretrained(saved(tmp_path))
    quantizer._process_model_before_weight_loading(model, device_map=device_map)
    converted = {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(converted) == 7
    assert all(path.startswith("model.layers.0.") for path in converted)


@pytest.mark.usefixtures("enabled")
def test_dequantize_keeps_the_hooks_of_accelerate(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = load(saved(tmp_path), "llama", {}, torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(layer, hook)
    expected = logits(model)
    plain = model.dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert plain.model.layers[0].mlp.up_proj._hf_hook is hook
    torch.testing.assert_close(logits(plain), expected)
