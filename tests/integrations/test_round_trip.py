"""Checkpoints between bitsandbytes and here, every tensor compared bit by bit, and what other readers check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from safetensors.torch import load_file  # noqa: E402
from tiny_models import ARCHITECTURES, logits, model_class, saved  # noqa: E402

from assertions import assert_bitwise_equal, assert_same_tensors  # noqa: E402
from qlora import QuantConfig  # noqa: E402
from qlora.nn import Linear4bit  # noqa: E402
from qlora.nn.convert import keep_reasons, vision_towers  # noqa: E402


def their_config(quant_type: str = "nf4", double_quant: bool = True, **settings: Any) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype="bfloat16",
        **settings,
    )


def load_theirs(path: Path | str, name: str, **kwargs: Any) -> Any:
    """Through transformers' own quantizer for bitsandbytes."""
    model = model_class(name).from_pretrained(path, device_map={"": "cpu"}, **kwargs)
    assert type(model.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
    return model


def load_ours(path: Path | str, name: str, config: QuantConfig | None = None, **kwargs: Any) -> Any:
    model = model_class(name).from_pretrained(path, quantization_config=config or QuantConfig(), **kwargs)
    assert type(model.hf_quantizer).__name__ == "QloraHfQuantizer"
    return model


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()
    }


def quantization_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


FORMATS = {
    "nf4": {},
    "fp4-plain": {"quant_type": "fp4", "double_quant": False},
    "bf16-storage": {"bnb_4bit_quant_storage": "bfloat16"},
    "fp32-storage": {"quant_type": "fp4", "bnb_4bit_quant_storage": "float32"},
}


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "nf4") for name in ARCHITECTURES), *(("llama", form) for form in FORMATS if form != "nf4")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theirs_read_and_written_here_is_read_by_them_with_every_bit(
    name: str, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = load_theirs(
        saved(tmp_path, name), name, quantization_config=their_config(**FORMATS[form]), dtype=dtype
    )
    original.save_pretrained(tmp_path / "theirs")
    ours = load_ours(tmp_path / "theirs", name, dtype=dtype)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    again = load_theirs(tmp_path / "ours", name, dtype=dtype)
    assert_same_tensors(again.state_dict(), original.state_dict())
    assert quantization_config(tmp_path / "ours") == quantization_config(tmp_path / "theirs")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig("fp4", 32, double_quant=False, quant_storage="bfloat16"),
        QuantConfig(skip_modules=["fc1", "q_proj", "c_fc", "q"], quantize_vision=True),
    ],
    ids=["default", "fp4", "skip"],
)
def test_ours_is_read_by_them_with_every_bit(name: str, config: QuantConfig, tmp_path: Path) -> None:
    ours = load_ours(saved(tmp_path, name), name, config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours", name)
    in_4_bit = {path for path, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert in_4_bit == {
        path for path, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert_same_tensors(theirs.state_dict(), ours.state_dict())
    for path in in_4_bit:
        layer, module = theirs.get_submodule(path), ours.get_submodule(path)
        values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(values, module.dequantize()), path  # but for the sign of zeros
    load_ours(tmp_path / "ours", name).save_pretrained(tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "ours"))


def test_a_checkpoint_in_the_form_of_unsloths_has_the_same_bits_here(tmp_path: Path) -> None:
    """bfloat16, double-quantised, whole blocks of layers left in 16 bits by name, and a key of their own."""
    skip = ["lm_head", "multi_modal_projector", "merger", "modality_projection", "model.layers.1.mlp"]
    theirs = load_theirs(
        saved(tmp_path),
        "llama",
        quantization_config=their_config(llm_int8_skip_modules=skip),
        dtype=torch.bfloat16,
    )
    theirs.save_pretrained(tmp_path / "u")
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    config |= {"unsloth_fixed": True, "unsloth_version": "2025.1.1"}
    (tmp_path / "u" / "config.json").write_text(json.dumps(config))
    ours = load_ours(tmp_path / "u", "llama", dtype=torch.bfloat16)
    assert type(ours.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert type(ours.model.layers[0].mlp.up_proj) is Linear4bit
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    ours.save_pretrained(tmp_path / "again")
    assert quantization_config(tmp_path / "again")["llm_int8_skip_modules"] == skip
    assert_same_tensors(load_theirs(tmp_path / "again", "llama").state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_whose_offset_is_a_half_float_keeps_its_dtype_and_values(dtype: torch.dtype) -> None:
    """Old checkpoints; bitsandbytes has read them since, as float32."""
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", bias=False).to("cpu")
    layer.weight.quant_state.offset = layer.weight.quant_state.offset.to(dtype)
    ours = Linear4bit(64, 64, bias=False)
    ours.load_state_dict(layer.state_dict())
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(ours.dequantize(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM's loader for bitsandbytes: it reads the files itself, and quant states with bitsandbytes' class.

STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes")


def read_like_vllm(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights by name and the quant states of those in 4 bits, by vLLM's rules; it refuses what they do not cover."""
    config = quantization_config(path)
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_4bit"] and not config["load_in_8bit"]
    assert config["bnb_4bit_quant_storage"] == "uint8"
    assert config["bnb_4bit_quant_type"] in ("fp4", "nf4")
    tensors = stored(path)
    # By the last component of the name.
    of_state = {key for key in tensors if any(part in key.rpartition(".")[2] for part in STATE_PARTS)}
    states = {}
    weights = {key: tensor for key, tensor in tensors.items() if key not in of_state}
    for key in weights:
        if any(f"{key}.quant_state.bitsandbytes__{kind}" in of_state for kind in ("nf4", "fp4")):
            own = {name: tensors[name] for name in of_state if f"{key}." in name}
            states[key] = bitsandbytes.functional.QuantState.from_dict(own, device="cpu")
    return weights, states


def without_double_quantisation(state: Any) -> Any:
    """vLLM undoes it when it loads."""
    if state.nested:
        functional = bitsandbytes.functional
        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested, state.offset, state.state2 = False, None, None
    return state


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi", "qwen2_vl"])
@pytest.mark.parametrize(
    "config", [QuantConfig(), QuantConfig("fp4", double_quant=False)], ids=["nf4", "fp4"]
)
@pytest.mark.parametrize("shards", ["60KB", "5GB"])
def test_what_is_written_passes_the_checks_of_vllms_loader(
    name: str, config: QuantConfig, shards: str, tmp_path: Path
) -> None:
    ours = load_ours(saved(tmp_path, name), name, config, dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    weights, states = read_like_vllm(tmp_path / "ours")
    modules = {path: module for path, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(states) == len(modules)
    by_shape_and_bytes = {bytes(module.weight.view(-1).tolist()): module for module in modules.values()}
    for key, state in states.items():
        packed = weights[key]
        module = by_shape_and_bytes[bytes(packed.view(-1).tolist())]
        rows, cols = module.weight_shape()
        assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (rows * cols // 2, 1))
        assert (tuple(state.shape), state.blocksize, state.dtype) == ((rows, cols), 64, torch.bfloat16)
        values = bitsandbytes.functional.dequantize_4bit(packed, without_double_quantisation(state))
        assert torch.equal(values, module.dequantize()), key


def test_fused_projections_are_taken_apart_by_the_offsets_that_vllm_computes(tmp_path: Path) -> None:
    """It joins q, k and v by their packed rows and slices them again at products of the stored shapes."""
    ours = load_ours(saved(tmp_path), "llama", dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours")
    weights, states = read_like_vllm(tmp_path / "ours")
    prefix = "model.layers.0.self_attn"
    parts = [f"{prefix}.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
    joined = torch.cat([weights[part] for part in parts])
    begin = 0
    for part in parts:
        end = begin + math.prod(states[part].shape) // 2
        values = bitsandbytes.functional.dequantize_4bit(joined[begin:end], states[part])
        assert torch.equal(values, ours.get_submodule(part.removesuffix(".weight")).dequantize())
        begin = end
    assert begin == len(joined)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_another_storage_than_uint8_says_so_where_vllm_looks(storage: str, tmp_path: Path) -> None:
    load_ours(saved(tmp_path), "llama", QuantConfig(quant_storage=storage)).save_pretrained(tmp_path / "ours")
    assert quantization_config(tmp_path / "ours")["bnb_4bit_quant_storage"] == storage


# ---------------------------------------------------------------------------------------------------------------------
# Which layers other readers expect in 4 bits: config.json has to say where it differs from their default.


def vision_layers(model: Any) -> set[bool]:
    return {
        isinstance(module, Linear4bit)
        for path, module in model.named_modules()
        if path.startswith("model.visual.") and isinstance(module, torch.nn.Linear)
    }


def test_a_vision_tower_stays_in_16_bits_and_config_json_lists_it(tmp_path: Path) -> None:
    ours = load_ours(saved(tmp_path, "qwen2_vl"), "qwen2_vl")
    assert vision_layers(ours) == {False}
    ours.save_pretrained(tmp_path / "ours")
    assert set(quantization_config(tmp_path / "ours")["llm_int8_skip_modules"]) == {
        "lm_head",
        *(f"model.visual.blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        *(f"model.visual.merger.mlp.{index}" for index in (0, 2)),
    }


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(("skip", "in_4_bit"), [(None, False), (["lm_head"], True)])
def test_an_unchanged_bitsandbytes_config_quantises_the_vision_tower_if_a_list_leaves_it_out(
    skip: list[str] | None, in_4_bit: bool, tmp_path: Path
) -> None:
    config = their_config(llm_int8_skip_modules=skip)
    before = config.to_dict()
    model = model_class("qwen2_vl").from_pretrained(saved(tmp_path, "qwen2_vl"), quantization_config=config)
    assert config.to_dict() == before
    assert type(model.hf_quantizer).__name__ == "QloraHfQuantizer"
    assert vision_layers(model) == {in_4_bit}
    model.save_pretrained(tmp_path / "ours")
    again = model_class("qwen2_vl").from_pretrained(tmp_path / "ours")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert_bitwise_equal(logits(again, "qwen2_vl"), logits(model, "qwen2_vl"))


def test_quantize_vision_quantises_the_vision_tower(tmp_path: Path) -> None:
    ours = load_ours(saved(tmp_path, "qwen2_vl"), "qwen2_vl", QuantConfig(quantize_vision=True))
    assert vision_layers(ours) == {True}
    ours.save_pretrained(tmp_path / "ours")
    assert quantization_config(tmp_path / "ours")["llm_int8_skip_modules"] is None
    assert vision_layers(load_ours(tmp_path / "ours", "qwen2_vl")) == {True}


@pytest.mark.parametrize(
    ("prefix", "tower"),
    [
        ("Llava", "model.vision_tower"),
        ("Gemma3", "model.vision_tower"),
        ("Mllama", "model.vision_model"),
        ("Blip2", "vision_model"),
    ],
)
def test_a_vision_tower_is_found_by_the_configuration_it_was_made_of(prefix: str, tower: str) -> None:
    with torch.device("meta"):
        cls = getattr(transformers, f"{prefix}ForConditionalGeneration")
        model = cls(getattr(transformers, f"{prefix}Config")())
    kept = {name for name, reason in keep_reasons(model, QuantConfig()).items() if reason == "vision tower"}
    expected = {
        name
        for name, module in model.get_submodule(tower).named_modules(prefix=tower)
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    assert kept == expected
    assert expected
    whole = keep_reasons(model, QuantConfig(quantize_vision=True))
    assert not any(type(model.get_submodule(name)) is torch.nn.Linear for name in kept & whole.keys())
    assert vision_towers(model.get_submodule(tower)) == []
