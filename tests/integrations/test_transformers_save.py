"""Checkpoints through transformers: bit-equal round trips, bitsandbytes' layout, and damaged ones refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NAMES, logits, make_model, run_python, saved

import qlora
from assertions import assert_bitwise_equal
from qlora import QuantConfig
from qlora.nn import Linear4bit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

AutoModel = transformers.AutoModelForCausalLM
#: Loads 4-bit checkpoints here, whether bitsandbytes is installed or not.
OURS = QuantConfig()

LAYER = "model.layers.0.mlp.up_proj"


def assert_same_model(actual: Any, expected: Any) -> None:
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for key in b:
        if a[key].dtype == b[key].dtype == torch.uint8 or not b[key].is_floating_point():
            assert torch.equal(a[key], b[key]), key
        else:
            assert_bitwise_equal(a[key].float(), b[key].float())
            assert a[key].dtype == b[key].dtype, key
    assert_bitwise_equal(logits(actual), logits(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_reload_are_bit_equal_twice(
    name: str, dtype: torch.dtype, tmp_path: Path, device: str
) -> None:
    model = AutoModel.from_pretrained(
        saved(tmp_path, name), quantization_config=QuantConfig(), dtype=dtype, device_map={"": device}
    )
    model.save_pretrained(tmp_path / "first")
    first = AutoModel.from_pretrained(
        tmp_path / "first", quantization_config=OURS, dtype=dtype, device_map={"": device}
    )
    assert_same_model(first, model)
    # bitsandbytes cannot save a model that was loaded in 4 bits.
    first.save_pretrained(tmp_path / "second")
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    second = AutoModel.from_pretrained(
        tmp_path / "second", quantization_config=OURS, dtype=dtype, device_map={"": device}
    )
    assert_same_model(second, model)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("fp4", 128, double_quant=False),
        QuantConfig(quant_storage="bfloat16", block_size=32),
        QuantConfig(quantize_head=True, quantize_embeddings=True),
        QuantConfig(skip_modules=["q_proj", "layers.1"]),
        QuantConfig(compute_dtype="float16"),
    ],
)
def test_every_setting_survives_a_round_trip(config: QuantConfig, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    again = AutoModel.from_pretrained(tmp_path / "q", quantization_config=OURS)
    assert_same_model(again, model)
    types = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in again.named_modules()} == types
    layer = again.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.compute_dtype in (config.resolve_compute_dtype("cpu"), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_checkpoint_reloads(name: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path, name), quantization_config=QuantConfig())
    model.save_pretrained(tmp_path / "q", max_shard_size="60KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    assert_same_model(AutoModel.from_pretrained(tmp_path / "q", quantization_config=OURS), model)


def test_config_json_has_exactly_bitsandbytes_keys(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(
        saved(tmp_path), quantization_config=QuantConfig(compute_dtype="bfloat16")
    )
    model.save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"] == QuantConfig(compute_dtype="bfloat16").to_dict()


def test_a_converted_model_saves_a_loadable_checkpoint(tmp_path: Path) -> None:
    model = qlora.quantize_(make_model())
    assert model.is_quantized
    model.save_pretrained(tmp_path / "q")
    assert_same_model(AutoModel.from_pretrained(tmp_path / "q", quantization_config=OURS), model)
    plain = qlora.dequantize_(model)
    assert not hasattr(plain, "hf_quantizer")
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_compute_dtype_of_the_user_wins_over_the_checkpoints(tmp_path: Path) -> None:
    AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig()).save_pretrained(
        tmp_path / "q"
    )
    given = QuantConfig("fp4", 128, compute_dtype="bfloat16")
    model = AutoModel.from_pretrained(tmp_path / "q", quantization_config=given)
    layer = model.get_submodule(LAYER)
    assert (layer.compute_dtype, layer.weight.quant_type, layer.weight.blocksize) == (
        torch.bfloat16,
        "nf4",
        64,
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "q")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        ValueError, match="expected a 16-bit or 4-bit bitsandbytes checkpoint for a QuantConfig, got"
    ):
        AutoModel.from_pretrained(tmp_path / "q", config=config, quantization_config=given)


# ---------------------------------------------------------------------------------------------------------------------
# The real bitsandbytes, in a process of its own so that this one stays free of it.

BITSANDBYTES_SAVES = """
import torch, transformers
config = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type=sys.argv[3], bnb_4bit_use_double_quant=sys.argv[4] == "True"
)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
assert type(model.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
model.save_pretrained(sys.argv[2])
import bitsandbytes
values = {
    name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).contiguous()
    for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
}
from safetensors.torch import save_file
save_file(values, sys.argv[2] + "/values.st")
"""

BITSANDBYTES_LOADS = """
import torch, transformers, bitsandbytes
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
values = {
    name: bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).contiguous()
    for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
}
from safetensors.torch import save_file
save_file(values, sys.argv[2])
"""


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.dequantize() for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_a_checkpoint_that_bitsandbytes_wrote_has_the_same_values_here(
    name: str, quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    path = tmp_path / "bnb"
    run_python(BITSANDBYTES_SAVES, saved(tmp_path, name), str(path), quant_type, str(double_quant))
    model = AutoModel.from_pretrained(path, quantization_config=OURS)
    values, expected = dequantized(model), load_file(path / "values.st")
    assert values.keys() == expected.keys()
    for key in expected:
        assert torch.equal(values[key], expected[key]), (
            key
        )  # but for the sign of zeros, which their CPU code drops
    # Saved again it is the same file but for the order of the tensors.
    model.save_pretrained(tmp_path / "again")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert_bitwise_equal(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig("fp4", 32, double_quant=False)])
def test_bitsandbytes_reads_our_checkpoint_with_the_same_values(
    name: str, config: QuantConfig, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = AutoModel.from_pretrained(saved(tmp_path, name), quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    run_python(BITSANDBYTES_LOADS, str(tmp_path / "q"), str(tmp_path / "values.st"))
    values, expected = load_file(tmp_path / "values.st"), dequantized(model)
    assert values.keys() == expected.keys()
    for key in expected:
        assert torch.equal(values[key], expected[key]), (
            key
        )  # but for the sign of zeros, which their CPU code drops


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layers_state_dict_is_bitsandbytes_own(double_quant: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    code = (
        "import torch, bitsandbytes as bnb, pickle\n"
        "torch.manual_seed(0)\n"
        "layer = bnb.nn.Linear4bit(200, 96, quant_type='nf4', compress_statistics=sys.argv[2] == 'True')\n"
        "layer.weight.data.mul_(8)\n"
        "torch.save(layer.weight.data.clone(), sys.argv[1] + '/dense')\n"
        "layer.to('cpu')\n"
        "torch.save(layer.state_dict(), sys.argv[1] + '/state')\n"
    )
    run_python(code, str(tmp_path), str(double_quant))
    theirs = torch.load(tmp_path / "state")
    layer = Linear4bit(200, 96, quant_type="nf4")
    layer.load_state_dict(theirs)
    ours = layer.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert_bitwise_equal(ours[key], value)


# ---------------------------------------------------------------------------------------------------------------------
# Damage.


def damaged_checkpoint(directory: Path, change: str) -> str:
    path = directory / "q"
    AutoModel.from_pretrained(saved(directory), quantization_config=QuantConfig()).save_pretrained(path)
    file = path / "model.safetensors"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
        return str(path)
    tensors = load_file(file)
    if change == "short":
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:-8].clone()
    elif change == "no scales":
        del tensors[f"{LAYER}.weight.absmax"]
    elif change == "no weight":
        del tensors[f"{LAYER}.weight"]
    elif change == "nothing":
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{LAYER}.weight")}
    elif change == "text":
        key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        tensors[key] = tensors[key][:20].clone()
    elif change == "another layer's":
        for key in list(tensors):
            if key.startswith(f"{LAYER}.weight"):
                tensors[key] = tensors[key.replace("up_proj", "down_proj")].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return str(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", r"model.safetensors: expected a safetensors file, got a truncated or damaged one"),
        ("short", rf"{LAYER}: expected 4096 packed bytes for shape \[128, 64\], got 4088"),
        ("no scales", rf"{LAYER}: absmax is missing: have"),
        ("no weight", rf"{LAYER}: weight is missing: have weight.absmax"),
        ("nothing", rf"{LAYER}: the checkpoint holds no weight for it"),
        ("text", rf"{LAYER}: quant_state.bitsandbytes__nf4: expected JSON text, got 20 damaged bytes"),
        ("another layer's", rf"{LAYER}: expected a weight of shape \[128, 64\], got \[64, 128\]"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(change: str, message: str, tmp_path: Path) -> None:
    path = damaged_checkpoint(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModel.from_pretrained(path, quantization_config=OURS)


def change_dense(directory: Path, key: str, value: torch.Tensor | None) -> str:
    path = saved(directory)
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def test_nan_in_a_16_bit_checkpoint_names_every_such_layer(tmp_path: Path, device: str) -> None:
    weight = torch.randn(128, 64)
    weight[3, 3] = float("nan")
    path = change_dense(tmp_path, f"{LAYER}.weight", weight)
    with pytest.raises(
        ValueError, match=rf"1 layers could not be loaded:\n  {LAYER}: its weight holds NaN or Inf"
    ):
        AutoModel.from_pretrained(path, quantization_config=QuantConfig(), device_map={"": device})


def test_a_16_bit_weight_of_another_shape_names_the_layer(tmp_path: Path) -> None:
    path = change_dense(tmp_path, f"{LAYER}.weight", torch.randn(64, 64))
    with pytest.raises(ValueError, match=rf"{LAYER}: expected a weight of shape \[128, 64\], got \[64, 64\]"):
        AutoModel.from_pretrained(path, quantization_config=QuantConfig())


def test_a_weight_that_does_not_fill_the_storage_names_the_layer(tmp_path: Path) -> None:
    path = saved(tmp_path, hidden_size=20, intermediate_size=27, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(
        ValueError, match=r"proj.weight: expected a multiple of 8 values for quant_storage torch.float32"
    ):
        AutoModel.from_pretrained(path, quantization_config=QuantConfig(quant_storage="float32"))


def test_a_linear_layer_missing_from_a_16_bit_checkpoint_is_initialised_and_quantised(tmp_path: Path) -> None:
    path = change_dense(tmp_path, f"{LAYER}.weight", None)
    model = AutoModel.from_pretrained(path, quantization_config=QuantConfig())
    layer = model.get_submodule(LAYER)
    assert layer.weight.bnb_quantized
    assert 0.01 < layer.dequantize().std() < 0.03  # initializer_range 0.02


def test_a_bias_missing_from_a_4_bit_checkpoint_is_zero(tmp_path: Path) -> None:
    AutoModel.from_pretrained(saved(tmp_path, "qwen2"), quantization_config=QuantConfig()).save_pretrained(
        tmp_path / "q"
    )
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    model = AutoModel.from_pretrained(tmp_path / "q", quantization_config=OURS)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()


# ---------------------------------------------------------------------------------------------------------------------
# All or nothing.

FULL_DISK = """
import resource, signal, transformers
from tiny_models import make_model
import qlora
from qlora.integrations.transformers import save_model
model = qlora.quantize_(make_model())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_model(model, sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    out = run_python(FULL_DISK, str(tmp_path / "q"))
    assert "File too large" in out
    assert list(tmp_path.iterdir()) == []


def test_save_model_writes_model_and_tokenizer_or_refuses(tmp_path: Path) -> None:
    from qlora.integrations.transformers import save_model

    model = qlora.quantize_(make_model())
    save_model(model, str(tmp_path / "q"))
    assert_same_model(AutoModel.from_pretrained(tmp_path / "q", quantization_config=OURS), model)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    with pytest.raises(FileExistsError, match="directory: expected a new or empty one, got"):
        save_model(model, str(tmp_path / "q"))
