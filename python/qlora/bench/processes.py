"""A process for each stack: one after another, or warmed up together and timed in turn.

A process prints JSON lines: `{"stack": ..., "cases": [...]}` with what is measured of it, the last with all of its cases,
those before, marked `"partial": true`, with the ones that are done. With `--in-turn` it waits for a line on its standard
input before it loads and another before it times, and prints `{"state": "loaded"}` and `{"state": "warm"}` in time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

Cases = list[dict[str, Any]]


def say(state: str) -> None:
    """In a process that runs in turn: what it has done."""
    print(json.dumps({"state": state}), flush=True)


def wait_for_turn() -> None:
    """In a process that runs in turn: until it may go on."""
    if not sys.stdin.readline():
        sys.exit("nobody waits for the figures")


def run_one_by_one(commands: Iterable[tuple[str, list[str]]]) -> Iterator[Cases]:
    """The cases of each command line as they are done; a failure is printed under the title beside it."""
    for title, command in commands:
        yield from _run(title, command)


def _run(title: str, command: list[str]) -> Iterator[Cases]:
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        shown = 0
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            common = json.loads(line)
            cases = common.pop("cases")
            is_partial = common.pop("partial", False)
            cases = cases if is_partial else cases[shown:]
            shown += len(cases)
            if cases:
                yield [{**common, **case} for case in cases]
        if process.wait() != 0:
            _print_failure(title, errors)


def run_at_once(commands: Iterable[tuple[str, list[str]]]) -> Iterator[Cases]:
    """The same of processes in turn. They load one after another, as loading takes more memory than the model does; warm up
    together; and are timed one by one."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(contextlib.closing(_InTurn(title, command))) for title, command in commands
        ]
        for process in processes:
            process.go()
            process.read("loaded")
        for process in processes:
            process.read("warm")
        for process in processes:
            process.go()
            cases = process.read()
            process.wait()
            if cases:
                yield cases


class _InTurn:
    """A process that goes on at a line on its standard input."""

    def __init__(self, title: str, command: list[str]) -> None:
        self._title = title
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close
        self._process = subprocess.Popen(
            [*command, "--in-turn"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._has_failed = False

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # closes its pipes and waits
            pass
        self._errors.close()

    def go(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `read` says so
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def read(self, state: str | None = None) -> Cases:
        """Waits until the process says that it is in the state, or for its cases. [] if it fails, which is printed once."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue
            common = json.loads(line)
            if state is not None and common.get("state") == state:
                return []
            if state is None and "cases" in common and "partial" not in common:
                cases = common.pop("cases")
                return [{**common, **case} for case in cases]
        if not self._has_failed:
            self._has_failed = True
            self._process.wait()
            _print_failure(self._title, self._errors)
        return []

    def wait(self) -> None:
        """For a process that has said all, so that it does not disturb the next one."""
        self._process.wait()


def _print_failure(title: str, errors: IO[str]) -> None:
    errors.seek(0)
    print(f"{title} failed:\n{errors.read()[-2000:]}", file=sys.stderr)
