"""Devices: device-generic tests take the fixture `device`; tests that only a GPU can run carry the marker `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

NO_GPU = "needs a CUDA gpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", then "cuda"."""
    return str(request.param)


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """No TF32: trainers of other tests, and some machines' settings, allow it for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = False  # first: torch wants the older name to agree with the newer
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.fp32_precision = "none"  # what it was


@pytest.fixture(autouse=True)
def verbosity_of_transformers() -> Iterator[None]:
    """Sets transformers' log level back: the commands lower it for the process, and tests share processes."""
    yield
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_warning()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
