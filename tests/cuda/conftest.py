"""The choice of a linear kernel."""

from __future__ import annotations

import pytest


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """kernel("naive") makes the following calls use that kernel alone.

    chunk_bytes sets the chunk of dense, decoders how many multiprocessors decode the next one meanwhile.
    """

    def choose(name: str, chunk_bytes: int | None = None, decoders: int | None = None) -> None:
        monkeypatch.setenv("QLORA_LINEAR_KERNEL", name)
        for variable, value in (("QLORA_DENSE_CHUNK_BYTES", chunk_bytes), ("QLORA_DENSE_DECODERS", decoders)):
            if value is None:
                monkeypatch.delenv(variable, raising=False)
            else:
                monkeypatch.setenv(variable, str(value))

    return choose
