"""The calibration text as windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Tokens of a window, where the model allows as many.
WINDOW = 1024


@dataclass
class CalibrationText:
    """int64 windows [num_windows, length] of a text file, and the SHA-256 of the file."""

    windows: Tensor
    sha256: str


def read_text(path: Path, tokenizer: Any, num_tokens: int, longest: int | None) -> CalibrationText:
    """The first `num_tokens` tokens of a UTF-8 text file in windows of WINDOW or `longest` tokens, whichever is less.

    A tokenizer that begins texts with its bos token has every window begin with it.

    Raises:
        ValueError: the file is no UTF-8 text, is empty or has fewer tokens. OSError: it cannot be read.
    """
    if num_tokens < 1:
        raise ValueError(f"--calibrate-tokens: expected at least 1, got {num_tokens}")
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--calibrate: {path}: expected UTF-8 text, got {error}") from error
    if not text.strip():
        raise ValueError(
            f"--calibrate: {path}: expected a text of at least {num_tokens} tokens, got an empty file"
        )
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    begin = list(tokenizer("").input_ids)[:1]
    begin = begin if begin and begin[0] == tokenizer.bos_token_id else []
    length = min(WINDOW, longest or WINDOW, num_tokens)
    own = length - len(begin)
    count = num_tokens // length
    if own < 1 or len(tokens) < own * count:
        raise ValueError(
            f"--calibrate: {path}: expected at least {own * count} tokens, got {len(tokens)}: take a longer text or fewer "
            "--calibrate-tokens"
        )
    rows = [begin + tokens[index * own : (index + 1) * own] for index in range(count)]
    return CalibrationText(torch.tensor(rows, dtype=torch.int64), hashlib.sha256(content).hexdigest())
