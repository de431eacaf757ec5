"""Accelerator mode for a test, and off again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import qlora


@pytest.fixture
def acceleration_ends() -> Iterator[None]:
    """The test may switch accelerator mode on; whatever happens, the next test starts without it."""
    yield
    qlora.accelerate_bitsandbytes(False)


@pytest.fixture
def accelerated(acceleration_ends: None) -> None:  # noqa: ARG001
    """Accelerator mode for one test."""
    qlora.accelerate_bitsandbytes()
