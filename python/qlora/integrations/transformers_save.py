"""save_model: save_pretrained, all or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files import whole_directory


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
    with whole_directory(target) as staging:
        for item in (model, *others):
            item.save_pretrained(staging, **(kwargs if item is model else {}))
