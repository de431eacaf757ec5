"""Accelerator mode, or qlora.enable(), for one test and off again."""

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


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """qlora.enable() for one test."""
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "from_pretrained",
        transformers.PreTrainedModel.__dict__["from_pretrained"],
    )
    qlora.enable()
    yield
    AUTO_QUANTIZER_MAPPING.clear()
    AUTO_QUANTIZER_MAPPING.update(before)
