"""How often an operator is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

GROUP, SINGLE = "qlora.linear_4bit_group.default", "qlora.linear_4bit.default"


class CountCalls(TorchDispatchMode):
    """Counts operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], Any]) -> tuple[int, int]:
    """Calls of the group operator and of the single one."""
    with CountCalls() as counter:
        function()
    return counter.names[GROUP], counter.names[SINGLE]
