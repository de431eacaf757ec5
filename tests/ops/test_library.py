"""Importing qlora: nothing heavy, and where something is missing one text that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora
from qlora import _library


def run(code: str) -> str:
    """Output of a new interpreter that finds qlora as this one does."""
    path = str(Path(qlora.__file__).parents[1])
    setup = f"import sys; sys.path.insert(0, {path!r})\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_a_host() -> None:
    heavy = ("torch", "numpy", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    assert run(f"import qlora; print([name for name in {heavy} if name in sys.modules])") == "[]\n"


def test_ops_import_neither_transformers_nor_peft() -> None:
    heavy = ("transformers", "peft", "trl", "accelerate", "bitsandbytes")
    code = f"from qlora import ops, reference; print([name for name in {heavy} if name in sys.modules])"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", ["ops", "nn"])
def test_without_torch_the_error_says_what_to_install(name: str) -> None:
    code = f"""
sys.modules["torch"] = None
import qlora
try:
    qlora.{name}
except ImportError as error:
    print(error)
"""
    output = run(code)
    assert "pip install" in output
    assert "torch>=2.10" in output


def test_without_peft_the_error_says_what_to_install() -> None:
    code = """
sys.modules["peft"] = None
import qlora
try:
    qlora.add_lora
    import torch
    qlora.add_lora(torch.nn.Linear(2, 2))
except ImportError as error:
    print(error)
"""
    output = run(code)
    assert "peft" in output
    assert "pip install" in output


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qlora' has no attribute 'frobnicate'"):
        qlora.frobnicate  # noqa: B018
    assert not hasattr(qlora, "frobnicate")
    assert {"nn", "ops", "quantize_", "QuantConfig"} <= set(dir(qlora))


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        ImportError, match=r"libqlora_torch\.so needs PyTorch 2\.10 or newer, got 2\.9\.1\+cpu"
    ):
        _library.load.__wrapped__()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libqlora_torch.so"
    monkeypatch.setattr(_library, "library_path", lambda: path)
    with pytest.raises(ImportError) as caught:
        _library.load.__wrapped__()
    for text in (str(path), "is missing", torch.__version__, "2.10 or newer", "pip install"):
        assert text in str(caught.value)


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libqlora_torch.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(_library, "library_path", lambda: path)
    with pytest.raises(ImportError) as caught:
        _library.load.__wrapped__()
    for text in (str(path), "does not load into PyTorch", torch.__version__, "2.10 or newer"):
        assert text in str(caught.value)


def test_a_development_version_of_torch_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.15.0a0+git1234567", "3.0.0.dev20270101", "2.10.0+cu128"):
        monkeypatch.setattr(torch, "__version__", version)
        assert _library.load.__wrapped__().is_file()
