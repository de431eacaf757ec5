"""A memory budget: filled and not passed, with the gradients of plain checkpointing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import qlora
from assertions import assert_same_tensors
from qlora.checkpointing import layer_checkpoints, use_checkpoints
from qlora.estimate.fake import budget_of
from qlora.estimate.layers import TimelineMeter
from qlora.estimate.timeline import Timeline
from qlora.memory_budget import Profile, Size, parse_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")

LAYERS = 6


def model_of(device: str = "cpu", width: int = 64, **prepared: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(vocab_size=160, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS),
        **dict(num_attention_heads=4, num_key_value_heads=2),
    )
    with torch.device(device):
        dense = LlamaForCausalLM(config).to(torch.float32 if device == "cpu" else torch.bfloat16)
    model = qlora.add_lora(qlora.prepare(qlora.quantize_(dense), **prepared), r=4).train()
    fill_adapters(model)
    return model


class Watched:
    """A model whose budget goes by what a Timeline sees of real tensors on the CPU."""

    def __init__(self, num_bytes: int | None) -> None:
        self.lines: list[str] = []
        self.meter = TimelineMeter(0)
        self.model = model_of()
        if num_bytes is not None:
            use_checkpoints(
                self.model.get_base_model(),
                lambda layers: layer_checkpoints(
                    layers,
                    is_offloaded=False,
                    num_bytes=num_bytes,
                    make_meter=lambda _: self.meter,
                    tell=self.lines.append,
                ),
            )
        self.budget = budget_of(self.model)

    def step(self, batch: int = 2, length: int = 64) -> tuple[dict[str, Tensor], int]:
        """Gradients, and the peak of what the step itself allocated."""
        ids = torch.randint(160, (batch, length), generator=torch.Generator().manual_seed(length))
        self.meter.timeline = Timeline()
        with self.meter.timeline:
            self.model(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return gradients, self.meter.timeline.peak().num_bytes


@pytest.fixture(scope="module")
def bounds() -> tuple[int, int]:
    """Peaks of a step that recomputes all layers, and of one that keeps all."""
    lean = Watched(None).step()[1]
    watched = Watched(1 << 40)
    return lean, [watched.step()[1] for _ in range(4)][-1]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9, 1.1])
def test_a_budget_is_filled_and_not_passed(bounds: tuple[int, int], part: float) -> None:
    lean, full = bounds
    assert full > 2 * lean
    num_bytes = int(lean + part * (full - lean))
    watched = Watched(num_bytes)
    peaks = [watched.step()[1] for _ in range(6)]
    assert peaks[0] == lean
    assert max(peaks) <= max(num_bytes, lean)
    assert watched.budget is not None
    layer = (full - lean) / LAYERS
    assert watched.budget.num_kept == LAYERS or peaks[-1] > 0.98 * num_bytes - 1.5 * layer
    assert peaks[-1] == peaks[-2]
    wanted = Watched(None).step()[0]
    assert_same_tensors(watched.step()[0], wanted)


def test_the_plan_is_told_once_it_changes(bounds: tuple[int, int]) -> None:
    watched = Watched(sum(bounds) // 2)
    for _ in range(8):
        watched.step()
    assert 1 <= len(watched.lines) <= 4
    assert watched.budget is not None
    recomputed = LAYERS - watched.budget.num_kept
    assert (
        f"memory budget: {recomputed} of {LAYERS} layers recomputed for 128 tokens: est" in watched.lines[-1]
    )


def test_a_batch_larger_than_any_before_is_recomputed_first_and_a_smaller_one_keeps_more(
    bounds: tuple[int, int],
) -> None:
    watched = Watched(sum(bounds) // 2)
    budget = watched.budget
    assert budget is not None
    for _ in range(4):
        watched.step()
    usual = budget.num_kept
    watched.step(1)
    assert budget.num_kept >= 2 * usual or budget.num_kept == LAYERS
    watched.step(3)
    assert budget.num_kept == 0
    assert [watched.step(3)[1] <= budget.num_bytes for _ in range(4)] == [True] * 4
    watched.step(1, 128)  # as many tokens as usual, but more pairs of them
    assert budget.num_kept == 0


def test_several_forward_passes_before_a_backward_pass_keep_nothing() -> None:
    watched = Watched(1 << 40)
    ids = torch.arange(64).view(1, 64)
    losses = [watched.model(input_ids=ids, labels=ids).loss for _ in range(2)]
    sum(losses).backward()
    assert watched.budget is not None
    for _ in range(3):
        watched.step()
        assert watched.budget.num_kept == 0
    assert "several forward passes" in watched.lines[0] and len(watched.lines) == 1


def test_a_pass_without_backward_changes_nothing() -> None:
    watched = Watched(1 << 40)
    ids = torch.arange(64).view(1, 64)
    for _ in range(3):
        watched.model(input_ids=ids)
    with torch.no_grad():
        watched.model(input_ids=ids)
    for _ in range(2):
        watched.step()
    assert watched.budget is not None and watched.budget.num_kept > 0


def test_neither_a_layer_called_without_gradients_nor_one_called_again_begins_a_pass() -> None:
    """As by transformers before 5.24, whose layers call their checkpoint function without gradients too."""
    watched = Watched(1 << 40)
    budget, ids = watched.budget, torch.arange(64).view(1, 64)
    assert budget is not None
    loss = watched.model(input_ids=ids, labels=ids).loss
    begun, hidden = budget._pass, torch.ones(1, 64, 64)
    with torch.no_grad():
        for index in range(LAYERS):
            budget.run(index, lambda x: x, hidden)
    assert budget._pass is begun
    loss.backward()
    for _ in range(2):
        watched.step()
    assert budget.num_kept > 0

    watched.model.zero_grad()
    passes = []
    for index in (0, 1, 1, 2, 0):
        budget.run(index, lambda x: x, hidden)
        passes.append(budget._pass)
    assert passes[0] is passes[1] is passes[2] is passes[3] is not passes[4]


def test_a_copy_measures_for_itself() -> None:
    watched = Watched(1 << 40)
    for _ in range(2):
        watched.step()
    copied = budget_of(copy.deepcopy(watched.model))
    assert copied is not None and copied is not watched.budget
    assert copied.num_bytes == 1 << 40 and copied.num_kept == 0


def test_the_bound_of_a_profile_holds_above_and_below_what_was_measured() -> None:
    profile = Profile(Size(100, 1000), [10, 10, 10, 10], rest=50, rest_kept=50)
    assert profile.peak(7, 0, 100) == 57 and profile.peak(7, 2, 100) == 77 and profile.peak(7, 2, 50) == 67
    profile.refine({2: 8, 3: 8}, 46)
    assert profile.cost == [8, 8, 8, 8] and profile.rest_kept == 30
    assert profile.peak(7, 1, 100) == 57  # not below what recomputing all takes
    assert profile.most(7, 62, 100) == 3 and profile.most(7, 56, 100) == 0


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (24e9, 24_000_000_000),
        ("24GB", 24_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("800mb", 800_000_000),
        ("5e9", 5e9),
    ],
)
def test_sizes_are_bytes_or_have_a_unit(size: Any, num_bytes: int) -> None:
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "24 TB", "1.2.3GB", 0, True, None])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="memory_budget: expected bytes or a size such as '24GB'"):
        parse_bytes(size)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, "offload"])
def test_a_gpu_holds_no_more_than_the_budget(checkpointing: Any) -> None:
    def peaks(model: Any, count: int) -> list[int]:
        found = []
        for _ in range(count):
            ids = torch.randint(160, (4, 1024), device="cuda")
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            found.append(torch.cuda.max_memory_allocated())
        return found

    lean = max(peaks(model_of("cuda", 1024, gradient_checkpointing=checkpointing), 2))
    budget = lean + (600 << 20)
    found = peaks(model_of("cuda", 1024, gradient_checkpointing=checkpointing, memory_budget=budget), 6)
    assert max(found) <= 1.02 * budget
    assert found[-1] > lean + (200 << 20)
