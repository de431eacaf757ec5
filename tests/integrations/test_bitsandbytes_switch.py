"""Accelerator mode is switched on and off: what it replaces, what comes back, and the entry point."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes_cases import (
    bitsandbytes,
    make_layer,
    random_values,
)
from tiny_models import run_python

import qlora
from qlora.integrations import bitsandbytes as accelerator
from qlora.integrations import peft_clone

pytestmark = pytest.mark.usefixtures("acceleration_ends")

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "QLORA_ACCELERATE_BITSANDBYTES"
OPERATORS = (
    "quantize_4bit",
    "dequantize_4bit",
    "dequantize_4bit.out",
    "gemv_4bit",
    "gemv_4bit.out",
    "gemm_4bit",
)


HAS_GEMM = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
if not HAS_GEMM:
    OPERATORS = OPERATORS[:-1]


def everything() -> list[Any]:
    """All that the mode replaces: registrations of kernels as text, and objects."""
    functions = importlib.import_module("bitsandbytes.autograd._functions")
    modules = importlib.import_module("bitsandbytes.nn.modules")
    registered: list[Any] = [torch._C._dispatch_dump(f"bitsandbytes::{name}") for name in OPERATORS]
    registered += [bitsandbytes.matmul_4bit, functions.matmul_4bit, functions.MatMul4Bit]
    registered += [value for name, value in vars(modules).items() if name == "_convert_weight_packed_for_cpu"]
    for name, class_name, method in peft_clone._METHODS:
        owner = getattr(importlib.import_module(name), class_name)
        registered.append(vars(owner)[method])
    return registered


def test_switching_off_restores_everything() -> None:
    before = everything()
    has_own_gemv = getattr(bitsandbytes.functional, "has_avx512bf16", bool)()
    for _ in range(2):
        text = qlora.accelerate_bitsandbytes()
        during = everything()
        unchanged = [
            index for index, pair in enumerate(zip(before, during, strict=True)) if pair[0] == pair[1]
        ]
        # gemv_4bit and gemv_4bit.out, where bitsandbytes has a CPU kernel in its own order of weights.
        assert unchanged == ([3, 4] if has_own_gemv and "CUDA" not in text else [])
        qlora.accelerate_bitsandbytes(False)
        assert everything() == before


def test_a_second_call_does_nothing_and_says_the_same() -> None:
    text = qlora.accelerate_bitsandbytes()
    assert text.startswith(f"qlora: bitsandbytes {bitsandbytes.__version__}: 4-bit ") and "\n" not in text
    during = everything()
    assert qlora.accelerate_bitsandbytes() == text
    assert everything() == during
    assert qlora.accelerate_bitsandbytes(False) == "qlora: bitsandbytes runs its own kernels again"
    assert qlora.accelerate_bitsandbytes(False) == "qlora: bitsandbytes runs its own kernels, as before"


def test_a_graph_recorded_before_the_switch_still_goes_backward() -> None:
    layer = make_layer(torch.float32)
    x = random_values(4, 128).requires_grad_()
    qlora.accelerate_bitsandbytes()
    y = layer(x)
    qlora.accelerate_bitsandbytes(False)
    y.sum().backward()
    ours = x.grad.clone()
    x.grad = None
    y = layer(x)
    qlora.accelerate_bitsandbytes()
    y.sum().backward()
    torch.testing.assert_close(x.grad, ours)


def test_a_function_imported_before_the_switch_runs_our_kernels() -> None:
    matmul_4bit = bitsandbytes.matmul_4bit
    layer = make_layer(torch.float32)
    qlora.accelerate_bitsandbytes()
    x = random_values(4, 128).requires_grad_()
    y = matmul_4bit(x, layer.weight.t(), layer.weight.quant_state)
    assert "_Linear" in type(y.grad_fn).__name__


@pytest.mark.gpu
def test_on_a_gpu_the_cuda_kernels_are_taken_over() -> None:
    zeros = torch.zeros(64, 64, device="cuda")
    assert "qlora's CPU and CUDA kernels" in qlora.accelerate_bitsandbytes()
    # A block of zeros: our code is that of 0, bitsandbytes' on CUDA that of -1.
    packed, _ = bitsandbytes.functional.quantize_4bit(zeros, quant_type="nf4")
    assert packed.unique().tolist() == [0x77]
    qlora.accelerate_bitsandbytes(False)
    packed, _ = bitsandbytes.functional.quantize_4bit(zeros, quant_type="nf4")
    assert packed.unique().tolist() == [0x00]


@pytest.mark.parametrize(
    ("cuda", "architectures", "has_kernels", "reason"),
    [
        (None, ["sm_80"], True, "; its GPU kernels stay: qlora has none for ROCm"),
        ("13.0", [], True, "; its CUDA kernels stay: this qlora was built for the CPU only"),
        ("13.0", ["sm_80"], False, "; its CUDA kernels stay: this qlora has none for Old GPU"),
    ],
)
def test_a_gpu_that_we_have_no_kernels_for_keeps_bitsandbytes_own(
    cuda: str | None,
    architectures: list[str],
    has_kernels: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extension = SimpleNamespace(
        build_info=lambda: {"cuda_architectures": architectures},
        devices=lambda: [{"name": "Old GPU", "has_kernels": has_kernels}],
    )
    monkeypatch.setattr(qlora, "_qlora_ext", extension, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    before = torch._C._dispatch_dump("bitsandbytes::dequantize_4bit")
    assert qlora.accelerate_bitsandbytes().endswith(f"run on qlora's CPU kernels{reason}")
    during = torch._C._dispatch_dump("bitsandbytes::dequantize_4bit")
    lines = [[line for line in dump.splitlines() if line.startswith("CUDA")] for dump in (before, during)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("version", ["0.45.5", "0.51.0", "1.0.0", "unknown"])
def test_an_unknown_version_is_refused_with_the_expected_one(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything()
    monkeypatch.setattr(accelerator.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"expected bitsandbytes 0.46 to 0.50, got {version}"):
        qlora.accelerate_bitsandbytes()
    assert everything() == before


@pytest.mark.parametrize("version", ["0.46.0", "0.48.2.dev0", "0.50.2"])
def test_versions_of_the_range_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator.importlib.metadata, "version", lambda name: version)
    assert qlora.accelerate_bitsandbytes().startswith(f"qlora: bitsandbytes {version}: 4-bit")


def test_an_operator_with_other_arguments_is_refused() -> None:
    def kernel(A: Any, absmax: Any) -> None: ...

    with pytest.raises(
        RuntimeError,
        match=r"expected the operator bitsandbytes::quantize_4bit\(A, absmax\) .*got \(A, blocksize",
    ):
        accelerator._check_schema("quantize_4bit", kernel)
    with pytest.raises(RuntimeError, match=r"bitsandbytes::none_4bit.* got no such operator"):
        accelerator._check_schema("none_4bit", kernel)


def test_without_bitsandbytes_the_error_says_what_to_install() -> None:
    code = "import qlora\ntry:\n    qlora.accelerate_bitsandbytes()\nexcept ImportError as error:\n    print(error)"
    expected = "qlora.accelerate_bitsandbytes: expected bitsandbytes 0.46 to 0.50, got none: pip install bitsandbytes\n"
    assert run_python(code, without=("bitsandbytes",)) == expected


# ---------------------------------------------------------------------------------------------------------------------
WRONG_VERSION = """
import importlib.metadata
true = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9" if name == "bitsandbytes" else true(name)
"""
REPORT = """
import sys
import bitsandbytes
from bitsandbytes.autograd._functions import MatMul4Bit
print(MatMul4Bit.__module__.partition(".")[0], "qlora" in sys.modules)
"""


def import_bitsandbytes(directory: Path, value: str | None, prelude: str = "") -> tuple[str, str]:
    """Output and errors of a process that imports bitsandbytes where our entry point is installed."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), *sys.path])}
    environment.pop(VARIABLE, None)
    if value is not None:
        environment[VARIABLE] = value
    done = subprocess.run(
        [sys.executable, "-c", prelude + REPORT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "bitsandbytes False"),
        ("0", "bitsandbytes False"),
        ("", "bitsandbytes False"),
        ("1", "qlora True"),
    ],
)
def test_the_variable_switches_it_on_at_import(value: str | None, expected: str, tmp_path: Path) -> None:
    """And without it qlora is not imported."""
    out, err = import_bitsandbytes(tmp_path, value)
    assert out == expected
    assert "qlora" not in err


def test_the_call_and_the_variable_go_together(tmp_path: Path) -> None:
    out, err = import_bitsandbytes(tmp_path, "1", "import qlora; print(qlora.accelerate_bitsandbytes())\n")
    assert out.startswith("qlora: bitsandbytes ") and out.endswith("\nqlora True")
    assert "qlora" not in err


@pytest.mark.parametrize(
    ("value", "prelude", "reason"),
    [
        ("yes", "", f"ValueError: {VARIABLE}: expected 0 or 1, got 'yes'"),
        (
            "1",
            WRONG_VERSION,
            "RuntimeError: qlora.accelerate_bitsandbytes: expected bitsandbytes 0.46 to 0.50, got 9.9",
        ),
        (
            "1",
            "import sys; sys.modules['qlora.ops'] = None\n",
            "ModuleNotFoundError: import of qlora.ops halted; None in sys.modules",
        ),
    ],
)
def test_a_failure_is_one_warning_and_bitsandbytes_is_imported(
    value: str, prelude: str, reason: str, tmp_path: Path
) -> None:
    out, err = import_bitsandbytes(tmp_path, value, prelude)
    assert out.startswith("bitsandbytes ")
    warnings = [line for line in err.splitlines() if "Warning: " in line and "qlora" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(f"UserWarning: qlora: bitsandbytes keeps its own kernels: {reason}")
