"""What `qlora train` wrote beside an adapter: args.json, the arguments of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUANTISATION = ("load_in_4bit", "quant_type", "block_size", "double_quant")


def arguments_of(adapter: Path) -> dict[str, Any]:
    """The arguments that the adapter was trained with; empty where another program trained it."""
    try:
        written = json.loads((adapter / "args.json").read_text())
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def quantisation_of(adapter: Path) -> dict[str, Any]:
    """Those of `arguments_of` that say how the base was stored: the ones of `QUANTISATION` that are there."""
    written = arguments_of(adapter)
    return {name: written[name] for name in QUANTISATION if name in written}
