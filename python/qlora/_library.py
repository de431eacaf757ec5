"""Loads libqlora_torch.so, which registers the operators `torch.ops.qlora.*`."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

MINIMUM_TORCH = (2, 10)
LIBRARY_NAME = "libqlora_torch.so"


def library_path() -> Path:
    """Where the operator library of this installation lies, whether or not it is there."""
    return Path(__file__).parent / "lib" / LIBRARY_NAME


def _torch_version(version: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


@lru_cache(maxsize=1)
def load() -> Path:
    """Loads the operator library once and returns its path.

    Raises:
        ImportError: torch is missing or too old, or the library is missing or does not load. The message names the
            file, the torch version found and the torch version needed.
    """
    needed = ".".join(map(str, MINIMUM_TORCH))
    path = library_path()
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"qlora: the operators need PyTorch {needed} or newer, which is not installed: "
            f"pip install 'torch>={needed}'"
        ) from error
    if _torch_version(torch.__version__) < MINIMUM_TORCH:
        raise ImportError(
            f"qlora: {path.name} needs PyTorch {needed} or newer, got {torch.__version__}: "
            f"pip install --upgrade 'torch>={needed}'"
        )
    if not path.is_file():
        raise ImportError(
            f"qlora: {path} is missing (PyTorch {torch.__version__} found, {needed} or newer needed). It is built when "
            "the package is installed: pip install qlora-kernels, or `pip install .` in a source tree"
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"qlora: {path} does not load into PyTorch {torch.__version__} ({needed} or newer needed): {error}"
        ) from error
    return path
