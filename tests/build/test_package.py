"""The installed package: its files, and what its binaries need, export and keep silent about."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import qlora
from qlora import _qlora_ext

PACKAGE = Path(qlora.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = PACKAGE / "lib" / "libqlora.so"
TORCH_LIBRARY = PACKAGE / "lib" / "libqlora_torch.so"
EXTENSION = Path(_qlora_ext.__file__)
BINARIES = {"libqlora": LIBRARY, "libqlora_torch": TORCH_LIBRARY, "_qlora_ext": EXTENSION}

# Libraries that every Linux with glibc and a C++ runtime has.
SYSTEM = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "libgcc_s.so.1",
}
LOADER = re.compile(r"ld-linux.*\.so\.\d")

needs_binutils = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("nm") is None, reason="binutils are not installed"
)


def output_of(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def dynamic_entries(binary: Path, kind: str) -> list[str]:
    return re.findall(rf"\({kind}\).*\[(.*)\]", output_of("readelf", "-d", binary))


def undefined_symbols(binary: Path) -> list[str]:
    return [line.split()[-1].split("@")[0] for line in output_of("nm", "-D", "-u", binary).splitlines()]


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "_qlora_ext.pyi",
        "include/qlora/qlora.h",
        "lib/libqlora.so",
        "lib/libqlora_torch.so",
        "lib/cmake/qlora/qlora-config.cmake",
        "lib/cmake/qlora/qlora-config-version.cmake",
        "lib/cmake/qlora/qlora-targets.cmake",
        "lib/cmake/qlora/qlora-targets-release.cmake",
    ],
)
def test_the_package_holds(name: str) -> None:
    assert (PACKAGE / name).is_file()


def test_the_extension_lies_in_the_package_under_its_abi_tag() -> None:
    assert PACKAGE / ("_qlora_ext" + sysconfig.get_config_var("EXT_SUFFIX")) == EXTENSION


def test_the_header_is_the_one_of_the_source() -> None:
    installed = (PACKAGE / "include/qlora/qlora.h").read_text()
    assert installed == (ROOT / "cpp/include/qlora/qlora.h").read_text()


def test_every_python_module_of_the_source_is_installed() -> None:
    source = ROOT / "python" / "qlora"
    names = {path.relative_to(source) for path in source.rglob("*.py")}
    assert {name for name in names if not (PACKAGE / name).is_file()} == set()


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert _qlora_ext.build_info()["version"] == declared[1]


def test_metadata_names_the_command_and_the_licence() -> None:
    try:
        distribution = importlib.metadata.distribution("qlora-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qlora-kernels is not installed as a package: this is a source tree")
    commands = {
        entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"
    }
    assert commands == {"qlora": "qlora.cli:main"}
    assert any(str(file).endswith("LICENSE") for file in distribution.files or [])
    assert distribution.metadata["License-Expression"] == "Apache-2.0"


@needs_binutils
def test_the_core_needs_no_torch_no_python_and_no_cuda_library() -> None:
    needed = {name for name in dynamic_entries(LIBRARY, "NEEDED") if not LOADER.fullmatch(name)}
    assert needed <= SYSTEM


@needs_binutils
def test_the_operators_need_only_the_core_and_the_umbrella_library_of_torch() -> None:
    needed = {name for name in dynamic_entries(TORCH_LIBRARY, "NEEDED") if not LOADER.fullmatch(name)}
    assert needed - SYSTEM == {"libqlora.so", "libtorch.so"}


@needs_binutils
def test_the_extension_needs_only_the_core() -> None:
    needed = {name for name in dynamic_entries(EXTENSION, "NEEDED") if not LOADER.fullmatch(name)}
    assert needed - SYSTEM == {"libqlora.so"}


@needs_binutils
@pytest.mark.parametrize(
    ("name", "expected"), [("libqlora", []), ("libqlora_torch", ["$ORIGIN"]), ("_qlora_ext", ["$ORIGIN/lib"])]
)
def test_libraries_are_found_beside_each_other(name: str, expected: list[str]) -> None:
    paths = dynamic_entries(BINARIES[name], "RUNPATH") + dynamic_entries(BINARIES[name], "RPATH")
    assert paths == expected


@needs_binutils
@pytest.mark.parametrize("name", ["libqlora", "libqlora_torch"])
def test_no_python_symbol_is_used(name: str) -> None:
    assert [symbol for symbol in undefined_symbols(BINARIES[name]) if symbol.startswith(("Py", "_Py"))] == []


@needs_binutils
def test_the_core_exports_the_functions_of_its_header_and_nothing_else() -> None:
    lines = output_of("nm", "-D", "--defined-only", LIBRARY).splitlines()
    exported = {line.split()[-1] for line in lines}
    header = (PACKAGE / "include/qlora/qlora.h").read_text()
    declared = set(re.findall(r"^QLORA_API[^(]*?(qlora_\w+)\(", header, re.MULTILINE))
    assert exported == declared


@pytest.mark.parametrize("name", BINARIES)
def test_no_build_path_is_in_a_binary(name: str) -> None:
    # nvcc keeps the path of a .cu file as the name of its device code; profilers show the source by it.
    content = re.sub(rb"/[ -~]*\.cu\b", b"", BINARIES[name].read_bytes())
    assert re.findall(rb"/[\w./+-]+/(?:cpp|cuda)/[\w./-]+\.(?:cpp|cuh|h)\b", content) == []
    assert str(ROOT).encode() not in content
    assert re.findall(rb"(?<![\w.])/[\w./+-]*site-packages", content) == []


@pytest.mark.skipif(shutil.which("torch-abi-audit", path=Path(sys.executable).parent) is None,
                    reason="torch-abi-audit is not installed")  # fmt: skip
def test_the_operators_use_only_the_stable_abi_of_torch() -> None:
    command = Path(sys.executable).parent / "torch-abi-audit"
    result = subprocess.run(
        [command, "--check", "torch", PACKAGE], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Min torch:   2.10" in output_of(command, PACKAGE)
