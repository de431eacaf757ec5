"""save_model: save_pretrained, all or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def save_model(model: Any, directory: str | os.PathLike[str], *others: Any, **kwargs: Any) -> None:
    """`model.save_pretrained(directory, **kwargs)`, and that of `others` (a tokenizer), all or nothing.

    Writes beside `directory` and renames at the end: after a failure, a full disk say, nothing is left of it.

    Raises:
        OSError: it could not be written.
        FileExistsError: `directory` exists and is not an empty directory.
    """
    target = Path(directory).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"qlora.save_model: directory: expected a new or empty one, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for item in (model, *others):
            item.save_pretrained(temporary, **(kwargs if item is model else {}))
        temporary.chmod(0o777 & ~_umask())
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports I/O errors as its own kind.
        if isinstance(error, Exception) and not isinstance(error, OSError) and "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"qlora.save_model: {target}: {error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
