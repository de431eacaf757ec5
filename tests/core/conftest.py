from __future__ import annotations

import pytest
from cpu_library import LEVELS, Library, library_or_skip


@pytest.fixture(params=LEVELS)
def lib(request: pytest.FixtureRequest) -> Library:
    """libqlora.so with each instruction set of its CPU kernels."""
    return library_or_skip(request.param)
