"""Files that are either whole or absent: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all (also when the disk is full or the process is killed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory to fill; when the block ends well it takes the place of `path`, else it is removed.

    The new directory is complete on disk before it gets its name. An existing `path` is moved aside first and removed
    last, so a kill at any point leaves the old one, the new one, or (between two renames) the old one under its
    hidden name, never a mixture.

    Raises:
        OSError: it could not be written; ENOSPC also where safetensors reports a full disk as an error of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        sync_tree(staging)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(staging, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(staging, path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, OSError) and "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"{path}: {error}") from error
        raise


def move_files(source: Path, target: Path) -> None:
    """Moves every file of `source` into the existing directory `target`, each in one rename."""
    sync_tree(source)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        destination = target / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        os.replace(path, destination)


def sync_tree(directory: Path) -> None:
    """Flushes every file below `directory` to the disk, so that a later rename cannot overtake the contents."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
