"""The largest size that fits, found by evaluating the estimate itself."""

from __future__ import annotations

from collections.abc import Callable

STEP = 64  # tokens, of which a longest sequence is a multiple


def largest(need: Callable[[int], int], room: int, *, step: int, start: int, limit: int | None) -> int:
    """The largest multiple of `step` up to `limit` whose need is at most `room`; 0 if there is none.

    `need` must not fall where its argument grows. It is nearly linear, so a straight line through the two nearest known
    points says where to look next, and halving takes over where that does not help.

    Args:
        start: where to look first.
    """
    last = None if limit is None else limit // step
    fits, too_big = 0, None if last is None else last + 1
    known: dict[int, int] = {}
    guess = max(1, start // step)
    tries = 0
    while too_big is None or too_big - fits > 1:
        lowest, highest = fits + 1, None if too_big is None else too_big - 1
        guess = max(guess, lowest) if highest is None else min(max(guess, lowest), highest)
        known[guess] = need(guess * step)
        if known[guess] <= room:
            fits = guess
        else:
            too_big = guess
        tries += 1
        guess = _next(known, room, fits, too_big, tries)
    return fits * step


def _next(known: dict[int, int], room: int, fits: int, too_big: int | None, tries: int) -> int:
    if len(known) < 2:
        return 2 * fits if fits else 1
    (x0, y0), (x1, y1) = sorted(sorted(known.items(), key=lambda pair: abs(pair[1] - room))[:2])
    if y1 <= y0 or (tries > 5 and tries % 2):
        return 2 * fits + 1 if too_big is None else (fits + too_big) // 2
    crossing = int(x0 + (room - y0) * (x1 - x0) / (y1 - y0))
    # A step past the crossing where it is known to fit: that closes the bracket.
    return crossing + 1 if crossing <= fits else crossing
