"""Checkpoints that are known to be whole.

transformers writes a checkpoint file by file. When the last file is on disk, a marker with every file's size is
written (atomically) into the directory. A checkpoint without a marker, or one whose files do not have the sizes in it,
was cut short (kill, full disk, power) and is never resumed from.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

from qlora import files
from qlora.train.config import ConfigError

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(directory: Path) -> int | None:
    """The step of a `checkpoint-N` directory, None for any other name."""
    match = _NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def unmark(directory: Path) -> None:
    """Before a checkpoint is written over an older one of the same step."""
    with contextlib.suppress(FileNotFoundError):
        (directory / MARKER).unlink()


def mark_complete(directory: Path) -> None:
    """Flushes the checkpoint's files to disk, then declares them whole."""
    files.sync_tree(directory)
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    files.write_json(directory / MARKER, {"files": sizes})


def is_complete(directory: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((directory / MARKER).read_text())["files"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint directory, oldest step first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def last_complete(output_dir: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the newer ones that were skipped because they are not."""
    skipped: list[Path] = []
    for directory in reversed(checkpoints(output_dir)):
        if is_complete(directory):
            return directory, skipped
        skipped.append(directory)
    return None, skipped


def to_resume(output_dir: Path, wanted: str) -> tuple[Path, list[Path]]:
    """The checkpoint that `--resume WANTED` means, and the broken ones it passed over.

    `wanted` is "auto" (the newest whole one in `output_dir`) or a checkpoint or output directory.
    """
    directory = output_dir if wanted == "auto" else Path(wanted)
    if step_of(directory) is not None and directory.is_dir():
        if not is_complete(directory):
            raise ConfigError(
                f"resume: {directory} was not written to its end; --resume auto takes the last whole one"
            )
        return directory, []
    found, skipped = last_complete(directory)
    if found is None:
        broken = f" (only incomplete ones: {', '.join(p.name for p in skipped)})" if skipped else ""
        raise ConfigError(f"resume: no complete checkpoint in {directory}{broken}")
    return found, skipped


def keep_newest(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Deletes incomplete checkpoints and all but the newest `limit` whole ones; the best one stays as well."""
    whole = []
    for directory in checkpoints(output_dir):
        if is_complete(directory):
            whole.append(directory)
        else:
            remove(directory)
    if limit is not None and limit > 0:
        for directory in whole[:-limit]:
            if best is None or directory.name != Path(best).name:
                remove(directory)


def remove(directory: Path) -> None:
    """Takes the marker away first, so that a half-deleted checkpoint is never mistaken for a whole one."""
    unmark(directory)
    shutil.rmtree(directory, ignore_errors=True)
