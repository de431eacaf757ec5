"""`qlora bench train|generate`: what a run that is cut off has shown and written."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="rich is not installed")

from qlora.cli import bench


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process of each stack does: an exception that it raises, or the line that it prints; None: it fails."""
    outcomes: dict[str, Any] = {}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        outcome = outcomes[command[3]]
        if isinstance(outcome, BaseException):
            raise outcome
        line = f"a warning\n{json.dumps(outcome)}\n"
        return subprocess.CompletedProcess(command, 1 if outcome is None else 0, line, "no memory")

    monkeypatch.setattr(subprocess, "run", run)
    return outcomes


def arguments(stacks: str, target: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(
        ["generate", "--stacks", stacks, "--model", str(target.parent), "--json", str(target)]
    )


def row(stack: str, *rates: float) -> dict[str, Any]:
    cases = [{"batch": batch, "tokens_per_s": rate} for batch, rate in enumerate(rates, 1)]
    return {"stack": stack, "cases": cases}


def test_a_run_that_is_cut_off_has_shown_and_written_the_stacks_before(
    children: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children.update(qlora=row("qlora", 11.5, 22.5), bf16=KeyboardInterrupt())
    result: dict[str, Any] = {"gpu": "none"}
    with pytest.raises(KeyboardInterrupt):
        bench._bench_generate(arguments("qlora,bf16", tmp_path / "figures.json"), result)
    assert "11.50" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == {
        "gpu": "none",
        "figures": [
            {"stack": "qlora", "batch": 1, "tokens_per_s": 11.5},
            {"stack": "qlora", "batch": 2, "tokens_per_s": 22.5},
        ],
    }


def test_a_stack_that_fails_is_named_and_the_others_go_on(
    children: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children.update(qlora=None, bf16=row("bf16", 33.5))
    result: dict[str, Any] = {}
    bench._bench_generate(arguments("qlora,bf16", tmp_path / "figures.json"), result)
    shown = capsys.readouterr()
    assert "qlora bench generate: qlora failed:\nno memory" in shown.err
    assert "33.50" in shown.out
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == result["figures"]
    assert [figure["stack"] for figure in result["figures"]] == ["bf16"]


def test_the_table_of_all_comes_last(
    children: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children.update(qlora=row("qlora", 11.5), bf16=row("bf16", 33.5))
    bench._bench_generate(arguments("qlora,bf16", tmp_path / "figures.json"), {})
    shown = capsys.readouterr().out
    assert shown.count("11.50") == shown.count("33.50") == 2
    assert shown.rindex("11.50") > shown.index("33.50")
