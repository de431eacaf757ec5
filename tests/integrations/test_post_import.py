"""The post-import hook: when callbacks run, and that the import they wait for never suffers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import run_python

from qlora.integrations import when_imported


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "qlora_hook_target"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_runs_after_the_modules_own_code_and_once(module_name: str) -> None:
    seen: list[tuple[ModuleType, int]] = []
    when_imported(module_name, lambda module: seen.append((module, module.value)))
    assert not seen
    module = importlib.import_module(module_name)
    assert seen == [(module, 1)]
    importlib.reload(module)
    assert len(seen) == 1


def test_runs_at_once_where_the_module_is_imported(module_name: str) -> None:
    module = importlib.import_module(module_name)
    seen: list[ModuleType] = []
    when_imported(module_name, seen.append)
    assert seen == [module]


def test_several_callbacks_run_in_order(module_name: str) -> None:
    seen: list[int] = []
    when_imported(module_name, lambda _: seen.append(1))
    when_imported(module_name, lambda _: seen.append(2))
    importlib.import_module(module_name)
    assert seen == [1, 2]


def test_a_failing_callback_is_a_warning_of_a_successful_import(module_name: str) -> None:
    def fail(_: ModuleType) -> None:
        raise RuntimeError("no such attribute")

    when_imported(module_name, fail)
    with pytest.warns(
        UserWarning, match=f"integration with {module_name} failed and is off: RuntimeError: no such"
    ):
        module = importlib.import_module(module_name)
    assert module.value == 1


def test_the_module_keeps_its_loader_and_source(module_name: str) -> None:
    import inspect

    when_imported(module_name, lambda _: None)
    module = importlib.import_module(module_name)
    assert inspect.getsource(module) == "value = 1\n"
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(module.__loader__)


def test_a_missing_module_stays_missing() -> None:
    when_imported("qlora_no_such_module", lambda _: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("qlora_no_such_module")


def test_importing_qlora_imports_no_host_and_no_torch() -> None:
    code = "import qlora; print([n for n in ('torch', 'transformers', 'peft', 'bitsandbytes', 'numpy') if n in sys.modules])"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("order", ["import qlora, transformers", "import transformers.modeling_utils, qlora"])
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    code = f"{order}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\nprint(m['qlora'].__name__)"
    assert run_python(code, without=("bitsandbytes",)).strip() == "QloraHfQuantizer"
