"""The arrows of the architecture hold: who includes, or imports, whom; and files stay short."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
NATIVE = (".h", ".cpp", ".c", ".cu", ".cuh")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# Folder -> local headers it may include, by prefix.
ALLOWED_LOCAL = {
    "cpp/include": (),
    "cpp/core": ("qlora/qlora.h", "core/"),
    "cpp/cpu": ("qlora/qlora.h", "core/", "cpu/"),
    "cpp/torch": ("qlora/qlora.h", "core/format.h", "core/low_rank.h", "torch/"),
    "cpp/python": ("qlora/qlora.h", "core/format.h", "python/"),
    "cuda/device": ("core/format.h", "cuda/device/"),
    "cuda": ("qlora/qlora.h", "core/", "cuda/"),
}
# Headers of others -> the one folder that may include them.
ALLOWED_FOREIGN = {
    r"(torch|ATen|c10|caffe2)/": "cpp/torch",
    r"(pybind11/|Python\.h$|numpy/)": "cpp/python",
    r"(cuda|cublas|cusparse|curand|nv_|nvtx|cub/|thrust/|cutlass/|cute/|cooperative_groups|mma\.h|crt/|device_|"
    r"driver_types|vector_types)": "cuda",
}
# Python layer -> layers of qlora it must not import.
FORBIDDEN_IMPORTS = {
    "reference": ("ops", "nn", "integrations", "cli", "train", "bench", "_library", "_qlora_ext"),
    "format": ("ops", "nn", "integrations", "cli", "train", "bench", "reference"),
    "_library": ("ops", "nn", "integrations", "cli", "train", "bench", "reference"),
    "ops": ("nn", "integrations", "cli", "train", "bench", "reference"),
    "lora_ops": ("ops", "nn", "integrations", "cli", "train", "bench", "reference"),
    "nn": ("integrations", "cli", "train", "bench", "reference"),
    "integrations": ("cli", "train", "bench", "reference"),
    "calibration": ("integrations", "cli", "train", "bench", "reference"),
    "files": ("ops", "nn", "integrations", "cli", "train", "bench", "reference"),
    **dict.fromkeys(
        (
            "lora",
            "loftq",
            "loss",
            "preparation",
            "merging",
            "adapter_reader",
            "checkpoint_reader",
            "checkpoint_writer",
        ),
        ("cli", "train", "bench", "reference"),
    ),
}
# Packages of others that only the upper layers know.
HOSTS = ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
LAYERS_WITHOUT_HOSTS = ("reference", "format", "_library", "ops", "lora_ops", "nn", "calibration")


def files_under(folder: str, suffixes: tuple[str, ...]) -> list[Path]:
    found = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and path.is_file())
    built = (ROOT / "python/qlora/lib", ROOT / "python/qlora/include")
    return [path for path in found if not any(path.is_relative_to(folder) for folder in built)]


def native_files() -> list[Path]:
    return files_under("cpp", NATIVE) + files_under("cuda", NATIVE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes_of(path: Path) -> list[tuple[str, str]]:
    return INCLUDE.findall(path.read_text(encoding="utf-8"))


def layer_of(path: Path) -> str:
    name = name_of(path)
    return next(
        folder for folder in sorted(ALLOWED_LOCAL, key=len, reverse=True) if name.startswith(folder + "/")
    )


def broken_arrows(layer: str, includes: list[tuple[str, str]]) -> list[str]:
    """What `includes` of a file in `layer` break."""
    broken = []
    for quote, header in includes:
        if quote == '"':
            if not header.startswith(ALLOWED_LOCAL[layer]):
                broken.append(f'"{header}" is not for {layer}')
        else:
            for pattern, owner in ALLOWED_FOREIGN.items():
                if re.match(pattern, header) and not f"{layer}/".startswith(owner + "/"):
                    broken.append(f"<{header}> belongs in {owner}")
    return broken


def test_every_native_source_includes_only_what_its_layer_may() -> None:
    broken = {name_of(path): broken_arrows(layer_of(path), includes_of(path)) for path in native_files()}
    assert {name: arrows for name, arrows in broken.items() if arrows} == {}


@pytest.mark.parametrize(
    ("layer", "include"),
    [
        ("cpp/core", ("<", "cuda_runtime.h")),
        ("cpp/cpu", ("<", "torch/csrc/stable/library.h")),
        ("cpp/torch", ("<", "pybind11/pybind11.h")),
        ("cpp/torch", ('"', "cpu/kernels.h")),
        ("cuda", ("<", "ATen/ATen.h")),
        ("cuda/device", ('"', "core/status.h")),
        ("cpp/core", ('"', "cpu/kernels.h")),
    ],
)
def test_a_broken_include_is_found(layer: str, include: tuple[str, str]) -> None:
    assert broken_arrows(layer, [include]) != []


def test_cuda_suffix_means_device_code() -> None:
    device_code = re.compile(r"__global__|__device__|QLORA_HOST_DEVICE|<<<")
    without = [
        name_of(path)
        for path in files_under("cuda", (".cu", ".cuh"))
        if not device_code.search(path.read_text())
    ]
    with_device = [
        name_of(path) for path in files_under("cuda", (".cpp", ".h")) if "__global__" in path.read_text()
    ]
    assert (without, with_device) == ([], [])


def test_every_operator_of_the_schema_is_in_the_c_interface() -> None:
    schema = (ROOT / "cpp/torch/schema.cpp").read_text()
    header = (ROOT / "cpp/include/qlora/qlora.h").read_text()
    operators = re.findall(r'"(\w+)\(', schema)
    assert operators
    header += (
        "qlora_linear_4bit_group_cpu("  # there is none: on the CPU each weight of a group is a linear_4bit
    )
    missing = [
        f"qlora_{operator}_{device}"
        for operator in operators
        for device in ("cpu", "cuda")
        if f"qlora_{operator}_{device}(" not in header
    ]
    assert missing == []


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names a Python file imports, at any depth; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(ROOT / "python").with_suffix("").parts[: -node.level]
                module = ".".join([*package, module] if module else package)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layer_files(layer: str) -> list[Path]:
    package = ROOT / "python/qlora"
    single = package / f"{layer}.py"
    return [single] if single.is_file() else files_under(f"python/qlora/{layer}", (".py",))


@pytest.mark.parametrize("layer", FORBIDDEN_IMPORTS)
def test_a_python_layer_imports_nothing_above_it(layer: str) -> None:
    files = layer_files(layer)
    assert files
    forbidden = [f"qlora.{above}" for above in FORBIDDEN_IMPORTS[layer]]
    broken = [
        f"{name_of(path)} imports {name}"
        for path in files
        for name in sorted(imports_of(path))
        if any(name == above or name.startswith(above + ".") for above in forbidden)
    ]
    assert broken == []


@pytest.mark.parametrize("layer", LAYERS_WITHOUT_HOSTS)
def test_a_lower_python_layer_knows_no_host(layer: str) -> None:
    broken = [
        f"{name_of(path)} imports {name}"
        for path in layer_files(layer)
        for name in sorted(imports_of(path))
        if name.split(".")[0] in HOSTS
    ]
    assert broken == []


def test_source_files_stay_short() -> None:
    sources = (
        native_files() + files_under("python", (".py", ".pyi")) + files_under("tests", (".py", ".c", ".cpp"))
    )
    long = {
        name_of(path): count for path in sources if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_the_build_description_stays_short() -> None:
    files = [ROOT / "CMakeLists.txt", *files_under("cpp", (".cmake",)), *files_under("cuda", (".cmake",))]
    lines = sum(
        1
        for path in files
        for line in path.read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    )
    assert lines <= 200


def test_no_source_names_the_machine_it_was_written_on() -> None:
    sources = (
        native_files() + files_under("python", (".py", ".pyi")) + files_under("tests", (".py", ".c", ".cpp"))
    )
    absolute = re.compile(r"(?<![\w.])/(?:root|home|work|opt)/\w")
    named = [
        name_of(path) for path in sources if path != Path(__file__) and absolute.search(path.read_text())
    ]
    assert named == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
