"""What `qlora train` wrote beside an adapter: args.json, the arguments of the run, and with --calibrate the base."""

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


def base_of(adapter: Path) -> str | None:
    """The base model that an adapter names, or None.

    One that moved is looked for where `qlora train` puts it: a calibrated one beside the adapter, the built-in model in
    this user's cache.
    """
    from qlora.train import smollm2

    try:
        name = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    if not name or Path(name).exists():
        return name or None
    if (adapter / Path(name).name / "config.json").is_file():
        return str(adapter / Path(name).name)
    return str(smollm2.model_directory() if Path(name).name == smollm2.DIRECTORY else name)
