"""`qlora info` shows what the installation has and what to do about the rest."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from qlora import _qlora_ext
from qlora.cli import info


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    return info.run(parser.parse_args(list(argv)))


def test_versions_architectures_and_kernels_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}
    build = _qlora_ext.build_info()
    assert lines["CPU kernels"] == build["cpu_kernels"]
    assert lines["architectures"] == (" ".join(build["cuda_architectures"]) or "CPU only")
    assert "torch" in lines["packages"]
    assert "libqlora_torch.so in torch" in lines["torch operators"]


def test_a_missing_package_is_named_with_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = info._version
    monkeypatch.setattr(info, "_version", lambda package: None if package == "peft" else found(package))
    assert run() == 0
    assert "peft (LoRA adapters): pip install 'qlora-kernels[train]'" in capsys.readouterr().out


def test_a_build_for_the_cpu_only_says_how_to_get_the_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {**_qlora_ext.build_info(), "cuda_architectures": [], "cuda_toolkit": ""}
    monkeypatch.setattr(_qlora_ext, "build_info", lambda: build)
    assert run() == 0
    out = capsys.readouterr().out
    assert "CPU only" in out
    assert "build again where nvcc is found" in out


def test_a_gpu_without_kernels_is_told_the_architecture_to_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = {
        "name": "Some GPU",
        "compute_capability": (12, 1),
        "num_multiprocessors": 48,
        "l2_bytes": 1 << 25,
        "total_bytes": 128 << 30,
        "has_kernels": False,
    }
    monkeypatch.setattr(_qlora_ext, "build_info", lambda: {
        "version": "0", "cuda_architectures": ["sm_80"], "cuda_toolkit": "13.0", "cxx_compiler": "c++",
        "torch_headers": "", "cpu_kernels": "plain",
    })  # fmt: skip
    monkeypatch.setattr(_qlora_ext, "devices", lambda: [device])
    assert run() == 0
    out = capsys.readouterr().out
    assert "Some GPU, sm_121, 128 GiB, 48 multiprocessors" in out
    assert "QLORA_CUDA_ARCHS=121" in out


def test_the_cmake_directory_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cmake-dir") == 0
    assert (Path(capsys.readouterr().out.strip()) / "qlora-config.cmake").is_file()


@pytest.mark.gpu
def test_the_gpu_is_listed_with_the_kernels_that_serve_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert _qlora_ext.devices()[0]["name"] in out
    assert "its gradient" in out
