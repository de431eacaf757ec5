"""`qlora bench train|generate`: what a run that is cut off has shown and written."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="rich is not installed")

from qlora.bench import processes
from qlora.cli import bench


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process of each stack does: an exception that it raises, or the lines that it prints; None: it fails."""
    outcomes: dict[str, Any] = {}

    class Process:
        def __init__(self, command: list[str], *, stderr: Any, **_: Any) -> None:
            outcome = outcomes[command[3]]
            if isinstance(outcome, BaseException):
                raise outcome
            stderr.write("no memory")
            lines = [] if outcome is None else outcome if isinstance(outcome, list) else [outcome]
            noise = "a warning\n{'loss': 1}\n[1]\n"
            self.stdout = io.StringIO(noise + "".join(f"{json.dumps(line)}\n" for line in lines))
            self.code = 1 if outcome is None else 0

        def wait(self) -> int:
            return self.code

    monkeypatch.setattr(subprocess, "Popen", Process)
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
    assert not bench._bench_generate(arguments("qlora,bf16", tmp_path / "figures.json"), result)
    shown = capsys.readouterr()
    assert "qlora bench generate: qlora failed:\nno memory" in shown.err
    assert "33.50" in shown.out
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == result["figures"]
    assert [figure["stack"] for figure in result["figures"]] == ["bf16"]


def test_the_table_of_all_comes_last(
    children: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    children.update(qlora=row("qlora", 11.5), bf16=row("bf16", 33.5))
    assert bench._bench_generate(arguments("qlora,bf16", tmp_path / "figures.json"), {})
    shown = capsys.readouterr().out
    assert shown.count("11.50") == shown.count("33.50") == 2
    assert shown.rindex("11.50") > shown.index("33.50")


def test_cases_are_shown_as_they_are_done_and_once(
    children: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = row("qlora", 11.5, 22.5)
    profile = {"device_ms": {"products": [61.5, 7]}, "busy_ms": 70.0, "idle_share": 0.25, "kernels": {}}
    whole["cases"] = [{"case": "1x8", **case, **profile} for case in whole["cases"]]
    parts = [{**whole, "cases": [case], "partial": True} for case in whole["cases"]]
    children.update(qlora=[*parts, whole])
    result: dict[str, Any] = {}
    bench._bench_generate(arguments("qlora", tmp_path / "figures.json"), result)
    assert [figure["tokens_per_s"] for figure in result["figures"]] == [11.5, 22.5]
    shown = capsys.readouterr().out
    assert shown.count("qlora 1x8: some kernel runs for 70.0 ms, none for 25% of the step") == 2
    assert "61.50" in shown and "device_ms" not in shown


IN_TURN = """
import json, sys
name = sys.argv[1]
def say(line): print(json.dumps(line), flush=True)
def wait(what):
    assert sys.stdin.readline()
    open(sys.argv[2], "a").write(f"{what} {name}\\n")
assert sys.argv[-1] == "--in-turn"
wait("load")
if name == "broken": sys.exit("no memory")
say({"state": "loaded"}), say({"state": "warm"}), print("a warning")
wait("time")
if name == "half": say({"stack": name, "cases": [{"batch": 1}], "partial": True}), sys.exit("no memory")
say({"stack": name, "cases": [{"batch": 1}, {"batch": 16}]})
"""


def test_at_once_stacks_load_one_by_one_and_are_timed_when_all_are_warm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    commands = [(name, [sys.executable, "-c", IN_TURN, name, str(log)]) for name in ("a", "broken", "b")]
    failed: list[str] = []
    found = list(processes.run_at_once(commands, failed))
    assert failed == ["broken"]
    assert found == [[{"stack": name, "batch": size} for size in (1, 16)] for name in ("a", "b")]
    assert log.read_text().splitlines() == ["load a", "load broken", "load b", "time a", "time b"]
    assert capsys.readouterr().err.count("broken failed:\nno memory") == 1


def test_processes_that_wait_are_ended_with_the_one_that_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [(name, [sys.executable, "-c", IN_TURN, name, str(log)]) for name in ("a", "b")]
    running = processes.run_at_once(commands, [])
    next(running)
    running.close()  # waits for both
    assert log.read_text().splitlines() == ["load a", "load b", "time a"]


def test_at_once_there_is_a_process_for_each_stack_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Any] = []
    monkeypatch.setattr(processes, "run_at_once", lambda given, failed: commands.extend(given) or [])
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    line = [
        "generate",
        "--stacks",
        "qlora,bf16",
        "--cases",
        "1,4",
        "--no-checkpoint",
        "--at-once",
        "--layers",
        "2",
    ]
    bench._bench_generate(parser.parse_args(line), {})
    assert [command[2:] for _, command in commands] == [
        ["qlora.bench.generation", stack, "--layers", "2", "--batches", size]
        for stack in ("qlora", "bf16")
        for size in ("1", "4")
    ]


def test_what_was_timed_before_a_failure_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    commands = [(name, [sys.executable, "-c", IN_TURN, name, str(log)]) for name in ("half", "b")]
    failed: list[str] = []
    found = list(processes.run_at_once(commands, failed))
    assert found == [[{"stack": "half", "batch": 1}], [{"stack": "b", "batch": size} for size in (1, 16)]]
    assert failed == ["half"] and "half failed:\nno memory" in capsys.readouterr().err


def test_a_process_is_ended_with_whoever_wanted_its_figures(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = 'import os, sys, time\nprint(\'{"cases": [{"pid": %d}], "partial": true}\' % os.getpid(), flush=True)\n'
    code += "time.sleep(5)\nopen(sys.argv[1], 'w').write('went on')"
    running = processes.run_one_by_one([("a", [sys.executable, "-c", code, str(log)])], [])
    ((case,),) = (next(running),)
    started = time.monotonic()
    running.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 4
    with pytest.raises(ProcessLookupError):
        os.kill(case["pid"], 0)  # nor is it a zombie
    assert not log.exists()


def test_a_failure_of_another_encoding_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os\nos.write(1, b'\\xff\\n')\nos.write(2, b'no \\xff memory')\nos._exit(1)"
    assert not list(processes.run_one_by_one([("a", [sys.executable, "-c", code])], []))
    assert "a failed:\nno \ufffd memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "--at-once"], "--at-once: expected with generate, got train"),
        (["generate", "--memory-limit", "24GiB"], "--memory-limit: expected with train, got generate"),
        (["train", "--memory-limit", "24 cards"], "--memory-limit: expected bytes or a size"),
        (["train", "--cases", "1x2048,2048"], "case: expected batch x length"),
        (["calibrate", "--tokens", "0"], "--steps, --tokens, --layers: expected at least 1"),
    ],
)
def test_arguments_are_checked_before_anything_runs(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(line)) == 2
    assert message in capsys.readouterr().err


def commands_of(line: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[Any] = []
    monkeypatch.setattr(processes, "run_one_by_one", lambda given, failed: commands.extend(given) or [])
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    given = parser.parse_args(line)
    assert (bench._bench_train if given.what == "train" else bench._bench_calibrate)(given, {})
    return [command[2:] for _, command in commands]


def test_training_within_a_limit_of_memory_takes_it_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    case = "1x110592+offload"
    line = ["train", "--no-checkpoint", "--stacks", "qlora-eager", "--memory-limit", "24GiB", "--steps", "1"]
    (command,) = commands_of([*line, "--cases", case], monkeypatch)
    assert command[:2] == ["qlora.bench.train_step", "qlora-eager"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert (options["--memory-limit"], options["--steps"], options["--cases"]) == ("24GiB", "1", case)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"  # the user's own stays


def test_calibration_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = commands_of(["calibrate", "--layers", "2", "--tokens", "2048"], monkeypatch)
    assert command == ["qlora.bench.calibration", "--layers", "2", "--tokens", "2048"]
