"""What works where torch or the Hugging Face packages are not installed, and what is said where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import qlora

PACKAGE_PARENT = str(Path(qlora.__file__).resolve().parents[1])


def run_without(
    packages: tuple[str, ...], code: str, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter where importing any of `packages` raises ModuleNotFoundError."""
    prelude = f"""
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {packages!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Absent())
        """
    environment = {**os.environ, "PYTHONPATH": PACKAGE_PARENT, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        check=check, capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_import_works_without_torch() -> None:
    done = run_without(("torch",), "import qlora; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_import_loads_no_host_package() -> None:
    hosts = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
    done = run_without((), f"import qlora; print([name for name in {hosts!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_arrays_are_quantised_without_torch() -> None:
    code = """
        import numpy
        from qlora import _qlora_ext
        x = numpy.linspace(-1, 1, 128, dtype=numpy.float32)
        packed, absmax = map(numpy.from_dlpack, _qlora_ext.quantize_4bit(x))
        y = numpy.from_dlpack(_qlora_ext.dequantize_4bit(packed, absmax, (2, 64)))
        # NF4's widest gap is 0.304: no value is further than half of it from its code.
        print(numpy.abs(y.ravel() - x).max() <= 0.304 / 2, "torch" in sys.modules)
        """
    assert run_without(("torch",), code).stdout.split() == ["True", "False"]


def test_the_operators_say_that_torch_is_missing() -> None:
    done = run_without(("torch",), "import qlora; qlora.ops", check=False)
    assert done.returncode == 1
    assert "pip install 'torch>=2.10'" in done.stderr


def test_the_operators_work_without_transformers() -> None:
    code = """
        import torch, qlora
        packed, absmax = qlora.ops.quantize_4bit(torch.ones(64))
        print(absmax.tolist())
        """
    done = run_without(("transformers", "peft", "trl", "accelerate", "datasets", "numpy"), code)
    assert done.stdout.strip() == "[1.0]"


def test_info_says_what_to_install_without_torch() -> None:
    done = run_without(("torch",), "from qlora.cli import main; sys.exit(main(['info']))")
    assert "CPU kernels" in done.stdout
