"""When `qlora train` compiles layers, and for which lengths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora import regional_compile
from qlora.train import compiling
from qlora.train.config import QloraArguments


def trainer(**args: Any) -> Any:
    given = dict(max_steps=-1, gradient_accumulation_steps=4, per_device_train_batch_size=2, world_size=2)
    given |= dict(num_train_epochs=3, packing=False, packing_strategy="bfd") | args
    return SimpleNamespace(
        args=SimpleNamespace(**given),
        model=SimpleNamespace(get_base_model=lambda: None),
        train_dataset=range(100),
    )


@pytest.mark.parametrize(
    ("args", "count"), [({}, 75), ({"max_steps": 10}, 40), ({"world_size": 1}, 150)], ids=str
)
def test_passes_are_counted_on_one_process(args: dict[str, Any], count: int) -> None:
    assert compiling.num_passes(trainer(**args)) == count


@pytest.mark.parametrize(
    ("packing", "strategy", "dynamic"),
    [(False, "wrapped", True), (True, "bfd", True), (True, "bfd_split", True), (True, "wrapped", None)],
)
def test_graphs_are_for_one_length_where_all_rows_have_it(
    monkeypatch: pytest.MonkeyPatch, packing: bool, strategy: str, dynamic: bool | None
) -> None:
    asked: list[Any] = []

    def compile_layers(_: Any, *, dynamic: bool | None) -> dict[str, int]:
        asked.append(dynamic)
        return {"Layer": 2}

    monkeypatch.setattr(regional_compile, "compile_layers", compile_layers)
    given = trainer(packing=packing, packing_strategy=strategy)
    line = compiling.compile_layers(given, QloraArguments(compile_layers="true"), torch.device("cpu"))
    assert asked == [dynamic] and "2 Layer compiled" in line


def test_auto_says_why_not() -> None:
    line = compiling.compile_layers(trainer(), QloraArguments(), torch.device("cpu"))
    assert line == "layers: eager (compile_layers auto: no GPU)"
