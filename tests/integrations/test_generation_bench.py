"""What `qlora bench generate` times, on a tiny model and the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import saved

from qlora.bench import generation


@pytest.mark.parametrize(
    ("stack", "layer"), [("qlora", "qlora.nn.linear.Linear4bit"), ("bf16", "torch.nn.modules.linear.Linear")]
)
def test_every_stack_loads_its_layers_and_makes_the_tokens_asked_for(
    stack: str, layer: str, tmp_path: Path
) -> None:
    result: dict[str, Any] = {}
    model = generation.load(stack, Path(saved(tmp_path)), result, "cpu")
    assert result["layer"] == layer
    case = generation.time_batch(model, batch=2, prompt=5, new_tokens=3, repeats=1)
    assert case["batch"] == 2
    assert case["tokens_per_s"] > 0
