"""What `qlora bench train` times, on a tiny model and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import saved  # noqa: E402

from qlora.bench import llama, train_step  # noqa: E402
from qlora.bench.train_step import Case  # noqa: E402
from qlora.regional_compile import compiled_layers  # noqa: E402

TARGETS = train_step.TARGETS["all"]


def test_a_case_is_a_size_and_what_saves_memory() -> None:
    assert Case.parse("4x2048") == (4, 2048, "")
    for text in ("4x2048", "1x512+offload", "2x16+none", "2x16+24GB"):
        assert str(Case.parse(text)) == text
    for text in ("2048", "x2048", "4x", "ax4", "4x2048+"):
        with pytest.raises(ValueError, match="case: expected batch x length"):
            Case.parse(text)


def test_every_case_of_qlora_is_timed_from_the_same_losses(tmp_path: Path) -> None:
    model = train_step.load_and_adapt("qlora-eager", Path(saved(tmp_path)), 4, TARGETS, {}, "cpu").train()
    losses = {}
    for case in map(Case.parse, ("2x8", "2x8+offload", "2x8+none", "2x8+1GB", "2x8")):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        train_step.save_memory(model, "qlora-eager", case)
        layer = model.get_base_model().model.layers[0]
        assert layer.gradient_checkpointing == (case.memory != "none")
        figures = train_step.time_case(model, case, steps=1)
        assert figures["case"] == str(case) and figures["tokens_per_s"] > 0
        if not case.has_budget:  # which takes more steps until its plan stands
            losses[case] = figures["loss"]
    assert len(losses) == 3 and max(losses.values()) - min(losses.values()) < 0.01


def test_layers_of_the_stack_qlora_are_compiled_for_each_case(tmp_path: Path) -> None:
    model = train_step.load_and_adapt("qlora", Path(saved(tmp_path)), 4, TARGETS, {}, "cpu").train()
    for case in (Case(2, 8), Case(1, 8, "offload")):
        train_step.save_memory(model, "qlora", case)
        assert sum(compiled_layers(model).values()) == len(model.get_base_model().model.layers)


def test_other_stacks_have_sizes_only(tmp_path: Path) -> None:
    model = train_step.load_and_adapt("bf16", Path(saved(tmp_path)), 4, TARGETS, {}, "cpu").train()
    train_step.save_memory(model, "bf16", Case(2, 8))
    with pytest.raises(ValueError, match=r"bf16: expected cases of batch x length, got 2x8\+offload"):
        train_step.save_memory(model, "bf16", Case(2, 8, "offload"))


@pytest.mark.parametrize("stack", ["qlora", "bf16", "bitsandbytes"])
def test_random_weights_need_no_checkpoint_and_are_the_same_in_every_stack(stack: str) -> None:
    if stack == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 99}
    config = transformers.LlamaConfig(num_hidden_layers=2, **sizes)
    plain, model = (llama.load_model(name, config, {}, "cpu") for name in ("bf16", stack))
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear" if stack == "bf16" else "Linear4bit")
    assert type(layer).__module__.partition(".")[0] == ("torch" if stack == "bf16" else stack)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
