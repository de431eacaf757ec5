"""PEFT's tuners over unchanged bitsandbytes layers train in accelerator mode as they do without it."""

from __future__ import annotations

import importlib
from typing import Any

import peft
import pytest
import torch
from bitsandbytes_cases import (
    bitsandbytes,
)
from lora_models import SIZES, VOCABULARY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora
from qlora.integrations.peft_clone import _METHODS, without_clone

pytestmark = pytest.mark.usefixtures("acceleration_ends")

TARGETS = ["q_proj", "o_proj"]
STEPS = 3
# Rows of 64 and 128 values: whole blocks, since bitsandbytes' CPU backend reads the scales of others wrong.
MODEL = {**SIZES, "intermediate_size": 128}

CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False),
}
# Tuner -> its class over a bitsandbytes layer.
LAYERS = {
    "lora": "peft.tuners.lora.bnb.Linear4bit",
    "dora": "peft.tuners.lora.bnb.Linear4bit",
    "ia3": "peft.tuners.ia3.bnb.Linear4bit",
    "adalora": "peft.tuners.adalora.bnb.SVDLinear4bit",
    "vera": "peft.tuners.vera.layer.Linear",
    "oft": "peft.tuners.oft.layer.Linear",
}


def bitsandbytes_model(device: str) -> nn.Module:
    """The tiny Llama, each of its projections a bitsandbytes layer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True
    return model.to(device)


def train(tuner: str, device: str) -> tuple[list[float], Any]:
    """The loss of each step, and the model."""
    base = bitsandbytes_model(device)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, CONFIGS[tuner]()).train()
    tokens = (torch.arange(40, device=device).reshape(2, 20) * 7) % VOCABULARY
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tuner", CONFIGS)
def test_a_tuner_trains_to_the_same_losses(tuner: str, device: str) -> None:
    theirs, model = train(tuner, device)
    found = {f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()}
    assert LAYERS[tuner] in found
    qlora.accelerate_bitsandbytes()
    ours, _ = train(tuner, device)
    # Sums of up to 128 terms in another order, in each of 14 projections forward and backward; the loss is about 5.
    terms = MODEL["intermediate_size"] * 7 * MODEL["num_hidden_layers"] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= abs(b) * terms * torch.finfo(torch.float32).eps
    assert theirs[-1] < theirs[0]


@pytest.mark.parametrize("tuner", ["lora", "ia3"])
def test_the_mode_can_be_switched_on_under_a_model_with_adapters(tuner: str) -> None:
    _, model = train(tuner, "cpu")
    tokens = (torch.arange(40).reshape(2, 20) * 7) % VOCABULARY
    before = model(input_ids=tokens).logits
    qlora.accelerate_bitsandbytes()
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


def count_clones(model: nn.Module, x: torch.Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::clone")


def test_a_lora_layer_no_longer_copies_the_base_result() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    ).to("cpu")
    base.is_loaded_in_4bit = True
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0"]), base)
    x = torch.randn(3, 64)
    with_copy = count_clones(model, x)
    expected = model(x)
    qlora.accelerate_bitsandbytes()
    assert count_clones(model, x) == with_copy - 1
    torch.testing.assert_close(model(x), expected)
    qlora.accelerate_bitsandbytes(False)
    assert count_clones(model, x) == with_copy


@pytest.mark.parametrize(("module", "class_name", "method"), _METHODS)
def test_every_method_of_the_list_copies_once_in_this_version_of_peft(
    module: str, class_name: str, method: str
) -> None:
    original = vars(getattr(importlib.import_module(module), class_name))[method]
    new = without_clone(original)
    assert "clone" in original.__code__.co_names
    assert "clone" not in new.__code__.co_names and "contiguous" in new.__code__.co_names
    assert new.__name__ == original.__name__ and new.__globals__ is original.__globals__


def test_a_method_that_copies_twice_or_never_is_left_alone() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        return x

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.clone() + x.clone()

    assert without_clone(never) is None
    assert without_clone(twice) is None
    assert without_clone(None) is None
