"""Every architecture of docs/models.md through every step of its table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from lora_models import fill_adapters, packed_weights  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_models import ARCHITECTURES, inputs, logits, make_model, model_class, saved, training_inputs  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_bitwise_equal, assert_close_by_depth, assert_same_tensors  # noqa: E402
from qlora import QuantConfig  # noqa: E402
from qlora.integrations.peft import LoraLinear4bit  # noqa: E402
from qlora.nn import Linear4bit  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.parametrize("name", ARCHITECTURES),
]


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def is_kept(name: str, module_name: str) -> bool:
    """What is to stay in 16 bits: heads, T5's float32 projections and the vision tower."""
    if name == "t5" and module_name.endswith(".wo"):
        return True
    return module_name == "lm_head" or module_name.startswith("model.visual.")


def load(path: Path | str, name: str, device: str = "cpu") -> Any:
    config = QuantConfig(
        compute_dtype="auto" if device == "cpu" else "float32"
    )  # on a CPU "auto" is float32 too
    return model_class(name).from_pretrained(path, quantization_config=config, device_map={"": device})


@pytest.fixture
def model(name: str, device: str, tmp_path: Path) -> Any:
    """The 4-bit model, of a 16-bit checkpoint."""
    return load(saved(tmp_path, name), name, device)


def dequantised(model: Any) -> Any:
    return qlora.dequantize_(copy.deepcopy(model))


def adapted(model: Any) -> Any:
    """With LoRA on every linear layer but the head, not zero."""
    model = qlora.add_lora(model, r=4)
    fill_adapters(model)
    return model


def test_load(model: Any, name: str) -> None:
    linear = {path for path, module in make_model(name).named_modules() if is_linear(module)}
    expected = {path for path in linear if not is_kept(name, path)}
    assert {path for path, module in model.named_modules() if isinstance(module, Linear4bit)} == expected
    assert expected
    dense = dequantised(model)
    assert {path for path, module in dense.named_modules() if is_linear(module)} == linear
    assert_close_by_depth(logits(model, name), logits(dense, name))
    change = (logits(dense, name).cpu() - logits(make_model(name), name)).norm()
    assert 0 < change < 0.3 * logits(make_model(name), name).norm()


def test_train_step(model: Any, name: str) -> None:
    dense = adapted(dequantised(model))
    ours = adapted(model)
    gradients = []
    for trained in (ours, dense):
        trained(**training_inputs(name, trained.device.type)).loss.backward()
        gradients.append({path: p.grad for path, p in trained.named_parameters() if p.requires_grad})
    got, expected = gradients
    assert got.keys() == expected.keys()
    assert sum(isinstance(module, LoraLinear4bit) for module in ours.modules()) == sum(
        isinstance(module, LoraLayer) and not is_kept(name, path.removeprefix("base_model.model."))
        for path, module in dense.named_modules()
    )
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for path, gradient in expected.items():
        assert gradient.any(), path
        assert_close_by_depth(got[path], gradient, factor=8, scale=largest)
    first = ours(**training_inputs(name, ours.device.type)).loss.item()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.05 * parameter.grad)
    assert ours(**training_inputs(name, ours.device.type)).loss.item() < first


def test_generate(model: Any, name: str) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    given = inputs(name, model.device.type)
    got = model.generate(**given, **settings)
    expected = dequantised(model).generate(**given, **settings)
    assert got.shape[1] >= 6
    assert torch.equal(got, expected)


def test_save(model: Any, name: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    dense = load_file(tmp_path / f"dense-{name}" / "model.safetensors")
    packed = {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    stats = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    # A vision-language model is saved under other names than its modules have: the dense checkpoint's.
    stored = {key.rpartition(".weight.")[0] + ".weight" for key in tensors if key.endswith("nf4")}
    assert len(stored) == len(packed)
    assert tensors.keys() == dense.keys() | {f"{key}.{stat}" for key in stored for stat in stats}
    for key in stored:
        meta = json.loads(bytes(tensors[f"{key}.quant_state.bitsandbytes__nf4"].tolist()))
        shape = list(dense[key].T.shape if name == "gpt2" else dense[key].shape)
        assert (meta["shape"], meta["blocksize"], meta["dtype"]) == (shape, 64, "float32")
        assert tensors[key].dtype == torch.uint8
    for key in dense.keys() - stored:
        assert_bitwise_equal(tensors[key], dense[key])


def test_reload(model: Any, name: str, device: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "q", max_shard_size="60KB")
    assert (tmp_path / "q" / "model.safetensors.index.json").exists()
    again = load(tmp_path / "q", name, device)
    got, expected = again.state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert_bitwise_equal(got[key], value)
    assert_bitwise_equal(logits(again, name), logits(model, name))
    assert {type(module) for module in again.modules()} == {type(module) for module in model.modules()}


def test_merge(model: Any, name: str, device: str, tmp_path: Path) -> None:
    ours = adapted(model)
    expected = logits(ours, name)
    before = packed_weights(ours)

    requantised = copy.deepcopy(ours)
    requantised.merge_adapter()
    merged_logits = logits(requantised, name)
    assert not torch.equal(merged_logits, expected)
    requantised.unmerge_adapter()
    in_4_bit = {
        key: value
        for key, value in packed_weights(requantised).items()
        if f"{key.partition('.base_layer')[0]}.base_layer.weight.absmax" in before
    }
    assert in_4_bit
    assert_same_tensors(in_4_bit, {key: before[key] for key in in_4_bit})
    small = requantised.merge_and_unload()
    assert_bitwise_equal(logits(small, name), merged_logits)
    small.save_pretrained(tmp_path / "merged-4-bit")
    assert_bitwise_equal(logits(load(tmp_path / "merged-4-bit", name, device), name), merged_logits)

    plain = qlora.merge_and_unload(ours, torch.float32)
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())
    assert_close_by_depth(logits(plain, name), expected)
    plain.save_pretrained(tmp_path / "merged")
    again = model_class(name).from_pretrained(tmp_path / "merged", device_map={"": device})
    assert_bitwise_equal(logits(again, name), logits(plain, name))
    dense = load_file(tmp_path / f"dense-{name}" / "model.safetensors")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in dense.items()
    }
