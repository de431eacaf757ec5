"""A model compiled as a whole, as generate() does it, computes what the eager one does after everything done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import fill_adapters, tiny_model, tokens

import qlora
from assertions import assert_bitwise_equal
from qlora.nn import Linear4bit

Change = Callable[[Any], object]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make() -> Any:
    """A 4-bit model of one layer in eval mode with two adapters, of which the first is active."""
    from peft import LoraConfig, get_peft_model

    model = _base()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    fill_adapters(model)
    return model.eval()


def _base(factor: float = 1.0) -> Any:
    """Its base, whose weights are `factor` times what they are."""
    model = tiny_model()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    return qlora.quantize_(model)


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _other_adapter(model: Any) -> None:
    model.set_adapter("other")


def _both_adapters(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


def _no_adapter(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merge(model: Any) -> None:
    model.merge_adapter()


def _unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("other")


def _set_scaling(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 3.0


def _delete_adapter(model: Any) -> None:
    model.delete_adapter("default")


def _load_adapter(model: Any) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: 2 * tensor for name, tensor in state.items()})


def _load(model: Any) -> None:
    state = make().state_dict()
    changed = {f"base_model.model.{name}": tensor for name, tensor in _base(1.5).state_dict().items()}
    matched = {name: changed.get(name.replace(".base_layer", ""), tensor) for name, tensor in state.items()}
    model.load_state_dict(matched)


def _load_assigned(model: Any) -> None:
    other = make()
    for layer in layers_of(other):
        layer.weight.quant_state.state2.absmax.mul_(2)
    model.load_state_dict(other.state_dict(), assign=True)


def _to_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def _to_float64_and_back(model: Any) -> None:
    model.to(torch.float16)
    model.to(torch.float32)


def _write_scales(model: Any) -> None:
    for layer in layers_of(model):
        layer.weight.quant_state.state2.absmax.mul_(2)


def _last_scales(model: Any) -> None:
    state = layers_of(model)[-1].weight.quant_state
    state.absmax = state.absmax.roll(1)


def _last_weight(model: Any) -> None:
    layer = layers_of(model)[-1]
    layer.weight = layers_of(_base(1.5))[-1].weight


def _compute_dtype(model: Any) -> None:
    for layer in layers_of(model):
        layer.compute_dtype = torch.bfloat16


CHANGES = (
    _other_adapter,
    _both_adapters,
    _no_adapter,
    _merge,
    _unmerge,
    _set_scaling,
    _delete_adapter,
    _load_adapter,
    _load,
    _load_assigned,
    _to_bfloat16,
    _to_float64_and_back,
    _write_scales,
    _last_scales,
    _last_weight,
    _compute_dtype,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_compiled_model_computes_what_the_eager_one_does_after(change: Change) -> None:
    model, ids = make(), tokens()
    compiled = torch.compile(model.__call__, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):  # the third call may trust what the second has seen unchanged
            before = compiled(input_ids=ids, use_cache=False).logits
        assert_bitwise_equal(before, model(input_ids=ids, use_cache=False).logits)
        change(model)
        expected = model(input_ids=ids, use_cache=False).logits
        if change is not _to_float64_and_back:
            assert before.dtype != expected.dtype or not torch.equal(before, expected)
        for _ in range(3):
            assert_bitwise_equal(compiled(input_ids=ids, use_cache=False).logits, expected)
