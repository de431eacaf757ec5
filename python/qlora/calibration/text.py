"""The calibration text as windows of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Calibration

#: Tokens of a window, where the model allows as many.
WINDOW = 1024
#: Between texts that are short of a window.
_SEPARATOR = "\n\n"


def token_windows(calibration: Calibration, tokenizer: Any, longest: int | None = None) -> Tensor:
    """int64 [num_windows, length]: the calibration's tokens in windows of WINDOW or `longest` tokens, whichever is less.

    Of one long text, windows that do not overlap are drawn; of many texts, texts, joined by blank lines. The seed says
    which. A tokenizer that begins texts with its bos token has every window begin with it.

    Raises:
        ValueError: the text is no UTF-8 text, is empty or has fewer tokens. OSError: a file cannot be read.
        TypeError: the text is not of the kinds that Calibration says.
    """
    if isinstance(calibration.text, Tensor):
        return calibration.text
    begin = begin_tokens(tokenizer)
    length = min(WINDOW, longest or WINDOW, calibration.num_tokens)
    count, own = calibration.num_tokens // length, length - len(begin)
    if own < 1:
        raise ValueError(f"qlora: calibration: num_tokens: expected at least 2, got {calibration.num_tokens}")
    generator = torch.Generator().manual_seed(calibration.seed)
    if isinstance(calibration.text, (str, Path)):
        where = str(calibration.text)
        tokens = _tokens(_read(Path(calibration.text)), tokenizer)
        windows = cut(tokens, begin, length)
        windows = windows[torch.randperm(len(windows), generator=generator)[:count].sort().values]
    else:
        where = f"{len(calibration.text)} texts"
        parts: list[Tensor] = []
        order = torch.randperm(len(calibration.text), generator=generator)
        for text in _texts(calibration.text, order.tolist(), calibration.column):
            parts.append(_tokens(text + _SEPARATOR, tokenizer))
            if sum(map(len, parts)) >= count * own:
                break
        tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        windows = cut(tokens, begin, length)[:count]
    if len(windows) < count:
        raise ValueError(
            f"qlora: calibration: {where}: expected at least {own * count} tokens, got {len(tokens)}: take a longer text or "
            "fewer tokens"
        )
    return windows


def begin_tokens(tokenizer: Any) -> list[int]:
    """The bos token where the tokenizer begins texts with it, else none."""
    first = list(tokenizer("").input_ids)[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def cut(tokens: Tensor, begin: list[int], length: int) -> Tensor:
    """int64 [num_windows, length] of int64 [n] tokens, each with the tokens `begin` first; what is left over is dropped."""
    own = length - len(begin)
    pieces = tokens[: len(tokens) // own * own].view(-1, own)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(pieces), -1), pieces], dim=1)


def _read(path: Path) -> str:
    if not os.path.isfile(path):  # a Path itself raises where the name is too long for one
        raise FileNotFoundError(
            f"qlora: calibration: expected the path of a text file (texts go in a list), got {str(path)[:80]!r}"
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"qlora: calibration: {path}: expected UTF-8 text, got {error}") from error
    if not text.strip():
        raise ValueError(f"qlora: calibration: {path}: expected a text, got an empty file")
    return text


def _texts(rows: Any, order: list[int], column: str) -> Iterator[str]:
    for index in order:
        row = rows[index]
        text = row.get(column) if isinstance(row, dict) else row
        if not isinstance(text, str):
            got = f"columns {sorted(row)}" if isinstance(row, dict) and column not in row else repr(text)
            raise TypeError(
                f"qlora: calibration: row {index}: expected a text, or a row with one in {column!r}, got {got}"
            )
        yield text


def _tokens(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
