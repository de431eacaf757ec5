"""What `qlora bench generate` times, on a tiny model and the CPU."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import saved  # noqa: E402

from qlora.bench import generation  # noqa: E402
from qlora.bench.generation import Batch  # noqa: E402

LAYERS = [("qlora", "qlora.nn.linear.Linear4bit"), ("bf16", "torch.nn.modules.linear.Linear")]
CONFIG = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.mark.parametrize(("stack", "layer"), LAYERS)
@pytest.mark.parametrize("is_random", [False, True])
def test_every_stack_loads_its_layers_and_makes_the_tokens_asked_for(
    stack: str, layer: str, is_random: bool, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, **CONFIG)
    result: dict[str, Any] = {}
    model = generation.load(stack, config if is_random else Path(saved(tmp_path)), result, "cpu")
    assert result["layer"] == layer and not model.training
    batches = [Batch(model, size, prompt=5, new_tokens=3) for size in (2, 1)]
    cases = generation.time_batches(batches, repeats=1)
    assert [case["batch"] for case in cases] == [2, 1]
    assert all(case["tokens_per_s"] > 0 for case in cases)


def test_in_turn_all_batches_are_warm_before_a_line_has_the_first_one_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def warm_up(self) -> None:
            events.append(f"warm {self.name}")

        def time(self, repeats: int) -> dict[str, Any]:
            events.append(f"time {self.name} {repeats}")
            return {"batch": self.name}

    class Lines(io.StringIO):
        def readline(self, *_: Any) -> str:
            events.append("line")
            return super().readline()

    monkeypatch.setattr(sys, "stdin", Lines("\n"))
    batches: Any = [Recorded("a"), Recorded("b")]
    assert generation.time_batches(batches, 3, in_turn=True) == [{"batch": "a"}, {"batch": "b"}]
    assert events == ["warm a", "warm b", "line", "time a 3", "time b 3"]
    assert json.loads(capsys.readouterr().out) == {"state": "warm"}
    with pytest.raises(SystemExit):
        generation.time_batches(batches, 3, in_turn=True)  # whoever asked is gone


def test_a_model_that_makes_too_few_tokens_is_an_error(tmp_path: Path) -> None:
    model = generation.load("bf16", Path(saved(tmp_path)), {}, "cpu")
    model.generate = lambda ids, **_: ids
    with pytest.raises(RuntimeError, match=r"expected \(1, 8\) tokens from generate\(\), got \(1, 5\)"):
        Batch(model, 1, prompt=5, new_tokens=3).warm_up()
