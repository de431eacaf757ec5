"""Texts as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import Calibration
from qlora.calibration import token_windows


class Letters:
    """A tokenizer with one token a byte, and 0 as the bos token that it sets first if it is told to."""

    def __init__(self, begins: bool = False) -> None:
        self.bos_token_id = 0
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        begin = [0] if self.begins and add_special_tokens else []
        return SimpleNamespace(input_ids=begin + list(text.encode()))


def windows(text: Any, tokenizer: Any = None, longest: int | None = None, **options: Any) -> Tensor:
    return token_windows(Calibration(text, **options), tokenizer or Letters(), longest)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Each token of this text is its position, modulo 128."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(128)) * 50)
    return path


def test_windows_of_a_file_do_not_overlap_and_are_drawn_by_the_seed(path: Path) -> None:
    first = windows(path, longest=100, num_tokens=2000)
    assert first.shape == (20, 100) and first.dtype is torch.int64
    starts = first[:, 0]
    assert torch.equal(first, (starts[:, None] + torch.arange(100)) % 128)
    assert len(set(starts.tolist())) > 10  # from all over the text
    assert torch.equal(windows(str(path), longest=100, num_tokens=2000), first)
    assert not torch.equal(windows(path, longest=100, num_tokens=2000, seed=1), first)


def test_a_window_is_as_long_as_the_model_and_the_budget_of_tokens_allow(path: Path) -> None:
    assert windows(path, num_tokens=2100).shape == (2, 1024)
    assert windows(path, num_tokens=2100, longest=512).shape == (4, 512)
    assert windows(path, num_tokens=300).shape == (1, 300)


def test_each_window_begins_with_the_bos_token_where_texts_do(path: Path) -> None:
    found = windows(path, Letters(begins=True), longest=100, num_tokens=500)
    assert torch.equal(found[:, 0], torch.zeros(5, dtype=torch.int64))
    assert torch.equal(found[:, 1:], (found[:, 1:2] + torch.arange(99)) % 128)


def test_texts_and_rows_are_drawn_by_the_seed_and_joined_by_blank_lines() -> None:
    texts = [f"text {number:03}" for number in range(100)]
    first = windows(texts, num_tokens=100)
    drawn = bytes(first[0].tolist()).decode().split("\n\n")
    assert drawn[-1] == "" and len(drawn) == 11  # ten texts of 8 letters and a blank line each
    assert set(drawn[:-1]) <= set(texts) and drawn[:-1] != texts[:10]
    assert torch.equal(windows([{"body": text} for text in texts], num_tokens=100, column="body"), first)
    assert not torch.equal(windows(texts, num_tokens=100, seed=1), first)


def test_tokens_are_taken_as_they_are() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert windows(tokens) is tokens


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (["short"], ValueError, "1 texts: expected at least 1000 tokens, got 7: take a longer text"),
        (["a", 7], TypeError, "row 1: expected a text, or a row with one in 'text', got 7"),
        ([{"body": "a"}], TypeError, r"row 0: expected a text, .* in 'text', got columns \['body'\]"),
        ("no such file", FileNotFoundError, r"expected the path of a text file .*, got 'no such file'"),
        ("a text itself " * 100, FileNotFoundError, "texts go in a list"),
        (7, TypeError, "expected a path, a sequence of texts or rows, or a tensor of tokens, got int"),
        (b"bytes", TypeError, "got bytes"),
    ],
)
def test_what_is_no_text_is_named(text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        windows(text, num_tokens=1000)


def test_num_tokens_must_leave_room_beside_the_bos_token() -> None:
    with pytest.raises(ValueError, match="num_tokens: expected at least 2, got 1"):
        windows(["text"], Letters(begins=True), num_tokens=1)
