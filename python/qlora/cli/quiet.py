"""Keeps the libraries below from talking over a command's own lines; errors still come as exceptions."""

from __future__ import annotations

import sys
import warnings


def quiet_libraries() -> None:
    """No bars for the small steps of loading, no notes to programmers, no retry messages of the hub."""
    import huggingface_hub
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        import datasets
    except ImportError:
        return
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
