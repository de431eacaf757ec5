"""What `qlora bench train` times, on a tiny model and the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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


def test_a_case_that_runs_out_of_memory_is_said_to_and_the_next_one_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_step = train_step.make_step

    def make(model: Any, batch: int, length: int) -> Any:
        step = make_step(model, batch, length)

        def run() -> Any:
            loss = step()
            if length > 8:
                for parameter in model.parameters():  # half a step
                    parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert all(parameter.grad is None for parameter in model.parameters())
            return loss

        return run

    limits: list[int] = []
    monkeypatch.setattr(train_step, "make_step", make)
    monkeypatch.setattr(train_step, "limit_memory", lambda model, num_bytes: limits.append(num_bytes))
    load = train_step.load_and_adapt
    monkeypatch.setattr(train_step, "load_and_adapt", lambda *args, **_: load(*args, "cpu"))
    line = ["", "qlora-eager", saved(tmp_path), "--memory-limit", "24GiB", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*line, "--cases", "1x16+offload,1x8"])
    train_step.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["limit_gb"] == 25.77 and limits == [24 * 2**30]
    assert last["cases"][0] == {"case": "1x16+offload", "error": "out of memory"}
    assert last["cases"][1]["case"] == "1x8" and last["cases"][1]["tokens_per_s"] > 0


def test_another_failure_is_none_of_memory() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        train_step.try_case(torch.nn.Module(), Case(1, 8), 1)


@pytest.mark.parametrize(("limit", "fraction"), [(24, 0.2375), (4, None), (90, None)])
def test_torch_is_left_what_the_context_does_not_take(
    limit: int, fraction: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr(train_step, "make_step", lambda *_: lambda: torch.zeros(()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (71 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 << 30)  # of 9 GiB that are in use
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    if fraction is None:
        with pytest.raises(
            ValueError, match=r"expected a size between what the model takes, 9.7 GB, and 85.9"
        ):
            train_step.limit_memory(torch.nn.Module(), limit << 30)
    else:
        train_step.limit_memory(torch.nn.Module(), limit << 30)
    assert given == ([] if fraction is None else [fraction])


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
