"""Shows one training example as the model sees it, with the part that carries the loss apart from the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

MAX_LINES = 40


def segments(input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of tokens with (True) and without (False) loss."""
    pairs = zip(input_ids, labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        yield trained, [token for token, _ in run]


def render(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """Lines of `  prompt | ...` and `  answer | ...`; the loss is on the answer lines only."""
    lines: list[str] = []
    for trained, tokens in segments(input_ids, labels):
        mark = "answer" if trained else "prompt"
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        lines += [f"  {mark} | {line}" for line in text.rstrip("\n").split("\n")]
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        lines = [*lines[:half], f"         | ... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    num_trained = sum(label != -100 for label in labels)
    head = f"One training example: {len(input_ids)} tokens, the loss is on the {num_trained} of the lines marked answer:"
    return "\n".join([head, *lines])
