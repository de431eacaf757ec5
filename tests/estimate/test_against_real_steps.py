"""The estimate's fake steps hold what real steps on the CPU hold, term by term and in the same phase."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import qlora
from qlora import checkpointing
from qlora.estimate import fake
from qlora.estimate.attention import CountedLabels, unpacked_batches
from qlora.estimate.timeline import Block, Peak, Step, Timeline

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
import tiny_models

BATCH, SEQ = 2, 48
TOLERANCE = 0.02  # of the peak and of each term of more than 5 % of it


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(BATCH * SEQ).reshape(BATCH, SEQ) % 200 + 3
    return {"input_ids": ids, "labels": ids.clone()}


def prepared(name: str, device: str, is_checkpointed: bool | str, **settings: Any) -> Any:
    with torch.device(device):
        model = tiny_models.make_model(name, **settings)
    model = qlora.quantize_(model)
    if device == "meta":
        return fake.trainable(model, r=4, targets="all-linear", gradient_checkpointing=is_checkpointed)
    return qlora.add_lora(qlora.prepare(model, is_checkpointed), r=4).train()


def peaks(model: Any, given: dict[str, torch.Tensor], *, keeps_gradients: bool) -> list[Peak]:
    """Of the first step, without optimizer state, and of the second."""
    step = Step(model, fake.held_tensors(model))
    result = []
    for _ in range(2):
        timeline = Timeline()
        step.run(given, timeline, keeps_gradients=keeps_gradients)
        result.append(timeline.peak())
    return result


def real_peaks(name: str, is_checkpointed: bool, keeps_gradients: bool, **settings: Any) -> list[Peak]:
    model = prepared(name, "cpu", is_checkpointed, **settings)
    return peaks(model, inputs(), keeps_gradients=keeps_gradients)


def fake_peaks(name: str, is_checkpointed: bool | str, keeps_gradients: bool, **settings: Any) -> list[Peak]:
    model = prepared(name, "meta", is_checkpointed, **settings)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake.materialise(model, mode)
    with unpacked_batches(), mode, CountedLabels(BATCH, SEQ):
        fakes = {key: torch.zeros_like(value) for key, value in inputs().items()}
        return peaks(model, fakes, keeps_gradients=keeps_gradients)


def assert_same(found: Peak, wanted: Peak) -> None:
    assert found.num_bytes == pytest.approx(wanted.num_bytes, rel=TOLERANCE)
    least = 0.05 * wanted.num_bytes
    large = {term for peak in (found, wanted) for term, size in peak.terms.items() if size > least}
    for term in large:
        assert found.terms.get(term, 0) == pytest.approx(wanted.terms.get(term, 0), rel=TOLERANCE), term


@pytest.mark.parametrize("is_checkpointed", [True, False])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fake_steps_hold_what_real_ones_do(name: str, is_checkpointed: bool) -> None:
    found = fake_peaks(name, is_checkpointed, keeps_gradients=is_checkpointed)
    wanted = real_peaks(name, is_checkpointed, keeps_gradients=is_checkpointed)
    for fake_peak, real_peak in zip(found, wanted, strict=True):
        assert_same(fake_peak, real_peak)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoints_are_kept_one_a_layer() -> None:
    """What more layers hold: their weights, and one [batch, seq, width] each while nothing else grows."""
    few, many = (fake_peaks("llama", True, False, num_hidden_layers=count)[1] for count in (3, 7))
    grown = many.terms["kept activations"] - few.terms["kept activations"]
    assert grown == 4 * BATCH * SEQ * 64 * 4
    assert many.terms["working memory of a layer"] == few.terms["working memory of a layer"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_offloaded_checkpoints_do_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 1)
    few, many = (fake_peaks("llama", "offload", False, num_hidden_layers=count)[1] for count in (3, 7))
    assert many.terms["kept activations"] == few.terms["kept activations"]


def test_a_storage_counts_once_in_whole_units_and_until_it_dies() -> None:
    timeline = Timeline()
    with timeline:
        a = torch.zeros(129)  # 516 bytes
        b = a.view(3, 43)
        del a
        c = torch.zeros(1)
        del b
        d = torch.zeros(200)
    assert timeline.peak().num_bytes == 1024 + 512  # a and c, then c and d
    del c, d


@pytest.mark.parametrize(
    ("born", "died", "term"),
    [
        ("forward", "forward", "working memory of a layer"),
        ("forward", "backward", "kept activations"),
        ("forward", None, "kept activations"),
        ("loss", "backward", "logits and loss"),
        ("backward", "backward", "working memory of a layer"),
    ],
)
def test_the_term_of_a_block_follows_from_its_life(born: str, died: str | None, term: str) -> None:
    assert Block(512, born, None, died).term() == term
