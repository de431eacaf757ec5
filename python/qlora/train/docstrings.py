"""The built-in data: functions of the installed Python standard library and their docstrings.

Every function or method with a docstring is one pair: the source without the docstring, and the docstring's summary
(its first paragraph, on one line). Modules are held out as a whole, chosen by a hash of their name, so the split is the
same everywhere and no function of a held-out module is trained on.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCTION = "Write the docstring of this Python function."
HELD_OUT_OF_100 = 10
# Not library code, or not from this library: tests, demos, bundled applications, installed packages.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
)
MAX_SOURCE = 1200  # characters; longer ones cost more compute than they teach
MIN_SUMMARY, MAX_SUMMARY = 12, 300


@dataclass(frozen=True)
class Pair:
    module: str  # path below the standard library
    name: str
    source: str  # the function without its docstring, dedented
    docstring: str  # first paragraph, one line

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.module.encode()).hexdigest(), 16) % 100 < HELD_OUT_OF_100


def pairs(root: Path | None = None) -> list[Pair]:
    """Every pair below `root` (default: the running interpreter's standard library), in a fixed order, none twice."""
    directory = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: dict[tuple[str, str], Pair] = {}
    for path in sorted(directory.rglob("*.py")):
        module = path.relative_to(directory)
        if SKIPPED.isdisjoint(module.parts[:-1]):
            for pair in _pairs_of(path, module.as_posix()):
                found.setdefault((pair.source, pair.docstring), pair)
    return list(found.values())


def as_example(pair: Pair, *, has_template: bool = True) -> dict[str, Any]:
    """TRL's prompt/completion, of messages where the model has a chat template, else of texts."""
    if not has_template:
        return {"prompt": f"{INSTRUCTION}\n\n{pair.source}\n\nDocstring: ", "completion": pair.docstring}
    return {
        "prompt": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": pair.source},
        ],
        "completion": [{"role": "assistant", "content": pair.docstring}],
    }


def _pairs_of(path: Path, module: str) -> Iterator[Pair]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return  # not UTF-8, or a template that is not Python
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pair = _pair(node, lines, module)
            if pair is not None:
                yield pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], module: str) -> Pair | None:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2 or node.end_lineno is None:
        return None
    summary = " ".join(docstring.split("\n\n")[0].split())
    first, second = node.body[0], node.body[1]
    if first.end_lineno is None or second.lineno <= first.end_lineno:
        return None  # body and docstring share a line
    before = lines[node.lineno - 1 : first.lineno - 1]
    after = lines[first.end_lineno : node.end_lineno]
    source = textwrap.dedent("".join(before + after)).strip("\n")
    if not MIN_SUMMARY <= len(summary) <= MAX_SUMMARY or len(source) > MAX_SOURCE or not before:
        return None
    return Pair(module, node.name, source, summary)
