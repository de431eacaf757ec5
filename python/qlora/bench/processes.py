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

# What libraries print need not be of the terminal's encoding.
_TEXT: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace"}


def _error_file() -> Any:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(line: str) -> dict[str, Any] | None:
    """What a process says; None of what only looks like it."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def say(state: str) -> None:
    """In a process that runs in turn: what it has done."""
    print(json.dumps({"state": state}), flush=True)


def wait_for_turn() -> None:
    """In a process that runs in turn: until it may go on."""
    if not sys.stdin.readline():
        sys.exit("nobody waits for the figures")


def run_one_by_one(commands: Iterable[tuple[str, list[str]]], failed: list[str]) -> Iterator[Cases]:
    """The cases of each command line as they are done; a failure is printed under the title beside it, which goes to
    `failed`."""
    for title, command in commands:
        yield from _run(title, command, failed)


def _run(title: str, command: list[str], failed: list[str]) -> Iterator[Cases]:
    with _error_file() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **_TEXT)
        assert process.stdout is not None
        shown = 0
        try:
            for line in process.stdout:
                common = _read(line)
                if common is None or "cases" not in common:
                    continue
                cases = common.pop("cases")
                is_partial = common.pop("partial", False)
                cases = cases if is_partial else cases[shown:]
                shown += len(cases)
                if cases:
                    yield [{**common, **case} for case in cases]
            code = process.wait()
        except BaseException:  # whoever wanted the figures is gone; the GPU is not to be kept
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        if code != 0:
            failed.append(title)
            _print_failure(title, errors)


def run_at_once(commands: Iterable[tuple[str, list[str]]], failed: list[str]) -> Iterator[Cases]:
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
            if process.has_failed:
                failed.append(process.title)
            if cases:
                yield cases


class _InTurn:
    """A process that goes on at a line on its standard input."""

    def __init__(self, title: str, command: list[str]) -> None:
        self.title = title
        self._errors = _error_file()  # closed by close
        self._process = subprocess.Popen(
            [*command, "--in-turn"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            **_TEXT,
        )
        self.has_failed = False

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
        """Waits until the process says that it is in the state, or for its cases. If it fails, which is printed once, those
        that were done."""
        assert self._process.stdout is not None
        done: Cases = []
        for line in self._process.stdout:
            common = _read(line)
            if common is None:
                continue
            if state is not None and common.get("state") == state:
                return []
            if state is None and "cases" in common:
                cases = common.pop("cases")
                is_partial = common.pop("partial", False)
                cases = [{**common, **case} for case in cases]
                if not is_partial:
                    return cases
                done += cases
        if not self.has_failed:
            self.has_failed = True
            self._process.wait()
            _print_failure(self.title, self._errors)
        return done

    def wait(self) -> None:
        """For a process that has said all, so that it does not disturb the next one."""
        self._process.wait()


def _print_failure(title: str, errors: IO[str]) -> None:
    errors.seek(0)
    print(f"{title} failed:\n{errors.read()[-2000:]}", file=sys.stderr)
