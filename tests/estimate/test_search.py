"""The search for the largest size that fits finds it, in few steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora.estimate.search import largest

NEEDS: dict[str, Callable[[int], int]] = {
    "a line": lambda x: 1000 + 7 * x,
    "a kink": lambda x: 1000 + max(3 * x, 11 * x - 2000),
    "steps": lambda x: 1000 + 512 * (x // 100),
    "a square": lambda x: 1000 + x * x // 50,
    "a constant first": lambda x: 5000 if x < 900 else 5000 + 9 * (x - 900),
}


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("room", [900, 1100, 5000, 8000, 20000])
@pytest.mark.parametrize("start", [1, 640, 4000])
@pytest.mark.parametrize("step", [1, 64])
def test_it_is_the_largest_that_fits(need: Callable[[int], int], room: int, start: int, step: int) -> None:
    limit = 4096
    fitting = [x for x in range(step, limit + 1, step) if need(x) <= room]
    asked: list[int] = []

    def counted(size: int) -> int:
        asked.append(size)
        return need(size)

    assert largest(counted, room, step=step, start=start, limit=limit) == max(fitting, default=0)
    assert len(asked) == len(set(asked)) <= 25


def test_without_a_limit_it_goes_as_far_as_fits() -> None:
    assert largest(lambda x: 3 * x, 3_000_001, step=1, start=4, limit=None) == 1_000_000
