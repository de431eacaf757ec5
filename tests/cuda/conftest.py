"""The choice of a linear kernel."""

from __future__ import annotations

import pytest


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """kernel("naive") makes the following calls use that kernel alone; chunk_bytes sets the chunk of dense."""

    def choose(name: str, chunk_bytes: int | None = None) -> None:
        monkeypatch.setenv("QLORA_LINEAR_KERNEL", name)
        if chunk_bytes is None:
            monkeypatch.delenv("QLORA_DENSE_CHUNK_BYTES", raising=False)
        else:
            monkeypatch.setenv("QLORA_DENSE_CHUNK_BYTES", str(chunk_bytes))

    return choose
