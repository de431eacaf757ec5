"""Shows what this installation has: versions, architectures built, GPUs found, kernels, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora._qlora_ext import BuildInfo, Device

NAME = "info"
HELP = "show versions, GPUs, kernels, and what is missing"

# Package -> what it is needed for.
_PACKAGES = {
    "torch": "everything but the C interface and the array functions",
    "transformers": "loading models",
    "peft": "LoRA adapters",
    "trl": "qlora train",
    "accelerate": "qlora train",
    "datasets": "qlora train",
    "gguf": "the built-in model of qlora train",
    "matplotlib": "the loss plot of qlora train",
    "bitsandbytes": "optional; accelerator mode, comparisons",
}
_OPTIONAL = ("bitsandbytes",)
_LABEL_WIDTH = 18
_TEXT_WIDTH = 80
_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print only the directory for CMake's qlora_DIR"
    )


def run(args: argparse.Namespace) -> int:
    package = Path(__file__).resolve().parent.parent
    if args.cmake_dir:
        print(package / "lib" / "cmake" / "qlora")
        return 0
    missing: list[str] = []
    _show_packages(missing)
    try:
        from qlora import _qlora_ext
    except ImportError as error:
        _show("core", f"does not load: {error}")
        missing.append("the compiled core: install the package again (pip install ., with a C++ compiler)")
    else:
        build = _qlora_ext.build_info()
        _show_build(build)
        _show_gpus(build, missing)
    _show_torch(missing)
    for number, text in enumerate(missing):
        _show("missing" if number == 0 else "", text)
    if not missing:
        _show("missing", "nothing")
    return 0


def _show(label: str, text: str) -> None:
    print(f"{label:<{_LABEL_WIDTH}}{text}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show_packages(missing: list[str]) -> None:
    _show(
        "qlora", f"{_version('qlora-kernels') or 'source tree'} in {Path(__file__).resolve().parent.parent}"
    )
    _show("python", f"{platform.python_version()} ({sys.executable})")
    found = {package: _version(package) for package in _PACKAGES}
    versions = ", ".join(f"{package} {version}" for package, version in found.items() if version)
    for number, line in enumerate(textwrap.wrap(versions, _TEXT_WIDTH)):
        _show("packages" if number == 0 else "", line)
    for package, version in found.items():
        if version is None and package not in _OPTIONAL:
            requirement = "torch" if package == "torch" else "'qlora-kernels[train]'"
            missing.append(f"{package} ({_PACKAGES[package]}): pip install {requirement}")


def _show_build(build: BuildInfo) -> None:
    headers = (
        f", torch {build['torch_headers']} headers" if build["torch_headers"] else ", without torch operators"
    )
    toolkit = f", CUDA {build['cuda_toolkit']}" if build["cuda_toolkit"] else ""
    _show("built with", build["cxx_compiler"] + toolkit + headers)
    _show("architectures", " ".join(build["cuda_architectures"]) or "CPU only")
    _show("CPU kernels", build["cpu_kernels"])


def _show_gpus(build: BuildInfo, missing: list[str]) -> None:
    from qlora import _qlora_ext

    if not build["cuda_architectures"]:
        _show("GPU", "not looked for: this build is for the CPU only")
        missing.append(
            "GPU kernels: build again where nvcc is found (CUDA toolkit 12.4 or newer, nvcc on PATH)"
        )
        return
    try:
        devices = _qlora_ext.devices()
    except RuntimeError as error:
        _show("GPU", str(error))
        missing.append("a newer NVIDIA driver, or a build with an older CUDA toolkit")
        return
    if not devices:
        _show("GPU", "none found")
    for index, device in enumerate(devices):
        _show_gpu(index, device, missing)


def _show_gpu(index: int, device: Device, missing: list[str]) -> None:
    major, minor = device["compute_capability"]
    _show(
        f"GPU {index}",
        f"{device['name']}, sm_{major}{minor}, {device['total_bytes'] / _GIB:.0f} GiB, "
        f"{device['num_multiprocessors']} multiprocessors",
    )
    if not device["has_kernels"]:
        missing.append(f"kernels for GPU {index}: build again with QLORA_CUDA_ARCHS={major}{minor}")
        return
    from qlora import _qlora_ext

    for is_grad, label in ((False, "  linear"), (True, "  its gradient")):
        try:
            text = _qlora_ext.explain_linear_4bit(2048, (4096, 4096), is_grad=is_grad, device=index)
        except RuntimeError as error:
            text = str(error)
        for line_number, line in enumerate(text.strip().splitlines()):
            _show(label if line_number == 0 else "", line)


def _show_torch(missing: list[str]) -> None:
    if _version("torch") is None:
        _show("torch operators", "not available: torch is not installed")
        return
    from qlora import _library

    try:
        path = _library.load()
    except ImportError as error:
        _show("torch operators", str(error))
        missing.append("the torch operators (see above)")
        return
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    _show("torch operators", f"{path.name} in torch {torch.__version__} ({cuda})")
    if torch.cuda.is_available() and not _has_cuda_kernels():
        missing.append("GPU kernels for torch's GPU: this qlora was built for the CPU only")


def _has_cuda_kernels() -> bool:
    from qlora import _qlora_ext

    return bool(_qlora_ext.build_info()["cuda_architectures"])
