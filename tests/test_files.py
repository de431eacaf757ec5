"""Files and checkpoints are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import files
from qlora.train import checkpoints
from qlora.train.config import ConfigError


def make_checkpoint(output_dir: Path, step: int, *, complete: bool = True) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(bytes(100))
    (directory / "state.json").write_text("{}")
    if complete:
        checkpoints.mark_complete(directory)
    return directory


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["file.json"]


def test_directory_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with files.whole_directory(target) as directory:
        (directory / "a").write_text("1")
    with pytest.raises(NotADirectoryError), files.whole_directory(target) as directory:  # noqa: PT012
        (directory / "a").write_text("2")
        (directory / "a" / "b").write_text("2")
    assert (target / "a").read_text() == "1"
    with files.whole_directory(target) as directory:
        (directory / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert os.listdir(tmp_path) == ["model"]


def test_last_complete_skips_unmarked_and_cut_checkpoints(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 5)
    cut = make_checkpoint(tmp_path, 10)
    with (cut / "weights").open("r+b") as file:
        file.truncate(50)
    unmarked = make_checkpoint(tmp_path, 100, complete=False)
    assert checkpoints.last_complete(tmp_path) == (good, [unmarked, cut])


def test_checkpoint_with_a_missing_file_or_a_damaged_marker_is_not_complete(tmp_path: Path) -> None:
    missing = make_checkpoint(tmp_path, 1)
    (missing / "weights").unlink()
    assert not checkpoints.is_complete(missing)
    for content in ("", "[]", '{"files": 3}', '{"files'):
        damaged = (
            make_checkpoint(tmp_path / content.replace("/", ""), 2)
            if content
            else make_checkpoint(tmp_path, 2)
        )
        (damaged / checkpoints.MARKER).write_text(content)
        assert not checkpoints.is_complete(damaged)


def test_resume_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume: no complete checkpoint in"):
        checkpoints.to_resume(tmp_path / "none", "auto")
    broken = make_checkpoint(tmp_path, 3, complete=False)
    with pytest.raises(ConfigError, match=r"only incomplete ones: checkpoint-3"):
        checkpoints.to_resume(tmp_path, "auto")
    with pytest.raises(ConfigError, match="was not written to its end"):
        checkpoints.to_resume(tmp_path, str(broken))


def test_resume_takes_an_output_or_a_checkpoint_directory(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert checkpoints.to_resume(Path("elsewhere"), str(tmp_path))[0] == second
    assert checkpoints.to_resume(Path("elsewhere"), str(first))[0] == first


def test_rotation_keeps_the_newest_whole_ones_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 5, complete=False)
    checkpoints.keep_newest(tmp_path, 2, best="anywhere/checkpoint-1")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
