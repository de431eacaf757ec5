"""A C program finds the installed package through CMake, links, and gets the results of the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora
from qlora import reference

SOURCE = Path(__file__).resolve().parents[1] / "consumer"
CMAKE_DIR = Path(qlora.__file__).resolve().parent / "lib" / "cmake" / "qlora"
ROWS, COLS, BLOCK_SIZE = 4, 64, 64


def tool(name: str) -> str | None:
    """A program, looked for beside the interpreter first."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


pytestmark = pytest.mark.skipif(
    tool("cmake") is None or tool("cc") is None, reason="CMake or a C compiler is not installed"
)


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The program's output, line by line: first word -> the rest."""
    build = tmp_path_factory.mktemp("consumer")
    cmake = str(tool("cmake"))
    for command in (
        [cmake, "-S", str(SOURCE), "-B", str(build), f"-Dqlora_DIR={CMAKE_DIR}"],
        [cmake, "--build", str(build)],
        [str(build / "consumer")],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """The weight that consumer.c computes, in its float32 arithmetic."""
    values = (torch.arange(ROWS * COLS) * 37) % 101 - 50
    return values.to(torch.float32) / 50.0


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(number) for number in text.split()], dtype=torch.float64)


def test_the_program_quantises_like_the_reference(consumer: dict[str, str], weight: torch.Tensor) -> None:
    packed, absmax = reference.quantize_4bit(weight, BLOCK_SIZE, "nf4")
    assert torch.equal(numbers(consumer["packed"]), packed.flatten().double())
    assert torch.equal(numbers(consumer["absmax"]), absmax.double())


def test_the_program_multiplies_like_the_reference(consumer: dict[str, str], weight: torch.Tensor) -> None:
    packed, absmax = reference.quantize_4bit(weight, BLOCK_SIZE, "nf4")
    dequantised = reference.dequantize_4bit(
        packed, absmax, (ROWS, COLS), block_size=BLOCK_SIZE, dtype=torch.float32
    )
    x = (torch.arange(COLS) % 5 - 2).double()
    products = dequantised.double() * x
    # fp32 sum of COLS terms: each addition rounds by half an ulp of at most the sum of magnitudes.
    tolerance = COLS * torch.finfo(torch.float32).eps * products.abs().sum(1)
    assert ((numbers(consumer["y"]) - products.sum(1)).abs() <= tolerance).all()


def test_an_error_reaches_the_program_with_its_value(consumer: dict[str, str]) -> None:
    assert "block_size" in consumer["error"]
    assert consumer["error"].endswith("got 48")


def test_another_minor_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(wrong LANGUAGES NONE)\nfind_package(qlora 99.0 CONFIG REQUIRED)\n"
    )
    command = [
        str(tool("cmake")),
        "-S",
        str(tmp_path),
        "-B",
        str(tmp_path / "build"),
        f"-Dqlora_DIR={CMAKE_DIR}",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "99.0" in done.stderr
