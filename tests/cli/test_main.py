"""The command itself: help, exit statuses, messages."""

from __future__ import annotations

import argparse
import sys

import pytest

from qlora.cli import info as info_command
from qlora.cli.main import COMMANDS, UsageError, main


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `qlora info` end in `error`."""

    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info_command, "run", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: qlora {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["trian"], ["info", "--unknown"], ["bench", "nothing"]])
def test_bad_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("x: expected a, got b"), 2, "qlora info: x: expected a, got b\n"),
        (ValueError("x: expected a, got b"), 1, "qlora info: x: expected a, got b\n"),
        (OSError(28, "No space left on device"), 1, "qlora info: [Errno 28] No space left on device\n"),
        (KeyError("x"), 1, "qlora info: KeyError: 'x' (QLORA_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, "\nqlora info: interrupted\n"),
    ],
)
def test_a_failure_is_one_message(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(monkeypatch, error)
    assert main(["info"]) == status
    assert capsys.readouterr().err == message


def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'trl'", name="trl"))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == (
        "qlora info: the package 'trl' is not installed; pip install 'qlora-kernels[train]' installs what this "
        "command needs\n"
    )


def test_missing_trl_stops_training_with_that_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["train", "--lora_r", "4"]) == 1
    assert "'trl' is not installed; pip install 'qlora-kernels[train]'" in capsys.readouterr().err


def test_debug_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("x"))
    monkeypatch.setenv("QLORA_DEBUG", "1")
    with pytest.raises(ValueError, match="x"):
        main(["info"])
