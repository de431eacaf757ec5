"""The entry point that bitsandbytes calls at the end of its import: switches accelerator mode on, if that is asked for.

Outside of the package `qlora`, so that who imports bitsandbytes without asking does not import qlora with it.
"""

from __future__ import annotations

import os
import warnings

#: Environment variable: 1 switches accelerator mode on whenever bitsandbytes is imported.
VARIABLE = "QLORA_ACCELERATE_BITSANDBYTES"


def load() -> None:
    """Does nothing unless the variable is 1. A failure is a warning: the import of bitsandbytes goes on."""
    value = os.environ.get(VARIABLE, "0")
    try:
        if value not in ("0", "1", ""):
            raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
        if value == "1":
            import qlora

            qlora.accelerate_bitsandbytes()
    except Exception as error:  # noqa: BLE001  bitsandbytes turns any error into a failed import
        text = " ".join(str(error).split())
        warnings.warn(
            f"qlora: bitsandbytes keeps its own kernels: {type(error).__name__}: {text}", stacklevel=2
        )
