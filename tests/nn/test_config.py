"""QuantConfig: defaults, checks, and its way into config.json."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from qlora import QuantConfig


def test_defaults_are_nf4_block_64_double_quantised() -> None:
    config = QuantConfig()
    assert (config.quant_type, config.block_size, config.double_quant) == ("nf4", 64, True)
    assert (config.compute_dtype, config.quant_storage, config.skip_modules) == ("auto", "uint8", None)
    assert not config.quantize_embeddings
    assert not config.quantize_head


@pytest.mark.parametrize("given", [torch.float16, "float16", "torch.float16"])
def test_dtypes_are_taken_as_objects_and_names(given: Any) -> None:
    config = QuantConfig(compute_dtype=given, quant_storage=torch.bfloat16)
    assert config.compute_dtype == "float16"
    assert config.resolve_compute_dtype("cpu") is torch.float16
    assert config.torch_quant_storage is torch.bfloat16


def test_auto_computes_in_the_inputs_dtype_on_cpu() -> None:
    assert QuantConfig().resolve_compute_dtype("cpu") is None


@pytest.mark.gpu
def test_auto_computes_in_16_bits_on_gpu() -> None:
    is_new = torch.cuda.get_device_capability() >= (8, 0)
    assert QuantConfig().resolve_compute_dtype("cuda") is (torch.bfloat16 if is_new else torch.float16)
    assert QuantConfig().resolve_compute_dtype(0) is QuantConfig().resolve_compute_dtype("cuda:0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int4"}, r"quant_type: expected one of \('nf4', 'fp4'\), got 'int4'"),
        ({"block_size": 48}, r"block_size: expected one of \(32, 64, .*, got 48"),
        ({"block_size": True}, r"block_size: .*got True"),
        ({"compute_dtype": "int8"}, r"compute_dtype: expected 'auto' or one of .*got 'int8'"),
        ({"quant_storage": "int16"}, r"quant_storage: .*got 'int16'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"double_quant": 1}, "double_quant: expected a bool, got 1"),
        ({"skip_modules": "lm_head"}, "skip_modules: expected a list of module names, got 'lm_head'"),
        ({"double_qaunt": True}, "unknown key 'double_qaunt': did you mean 'double_quant'"),
        ({"zzz": True}, "unknown key 'zzz': expected one of block_size"),
    ],
)
def test_a_wrong_type_or_argument_is_a_type_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantConfig(**arguments)


def test_to_dict_has_exactly_bitsandbytes_keys() -> None:
    assert QuantConfig().to_dict() == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def test_from_dict_reads_both_vocabularies() -> None:
    config = QuantConfig(quant_type="fp4", double_quant=False, compute_dtype="float16", skip_modules=["a"])
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert QuantConfig.from_dict({"quant_type": "fp4", "block_size": 128}) == QuantConfig("fp4", 128)


def test_from_dict_names_the_nearest_known_key() -> None:
    with pytest.raises(
        ValueError, match="unknown key 'bnb_4bit_quant_typ': did you mean 'bnb_4bit_quant_type'"
    ):
        QuantConfig.from_dict({"bnb_4bit_quant_typ": "nf4"})
    with pytest.raises(ValueError, match="quant_method: expected 'bitsandbytes' or 'qlora', got 'gptq'"):
        QuantConfig.from_dict({"quant_method": "gptq"})
    with pytest.raises(ValueError, match="load_in_8bit"):
        QuantConfig.from_dict({"load_in_8bit": True})


def test_config_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "import qlora; print(qlora.QuantConfig().to_dict()['quant_method'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "bitsandbytes", done.stderr
