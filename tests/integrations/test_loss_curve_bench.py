"""`python -m qlora.bench.loss_curve`: the same batches and adapters in every stack, and the picture of the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import tiny_run
from qlora.bench import loss_curve, stacks

EXAMPLE = {
    "prompt": [{"role": "user", "content": "def f(): ..."}],
    "completion": [{"role": "assistant", "content": "Does."}],
}


def arguments(stack: str, model: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    stacks.add_arguments(parser)
    parsed = parser.parse_args([stack, str(model), "--compute-dtype", "float32"])
    parsed.steps, parsed.batch, parsed.seed, parsed.learning_rate = 30, 2, 0, 1e-2
    return parsed


def curve(stack: str, directory: Path) -> tuple[list[float], float, float]:
    given = arguments(stack, directory)
    model = stacks.load(given)
    adapted = loss_curve.adapt(stack, model, rank=4, seed=0)
    rows = [loss_curve.tokenize(EXAMPLE, tiny_run.make_tokenizer())] * 4
    before = loss_curve.held_out_loss(adapted, rows, 2, model.device)
    losses = loss_curve.train(adapted, rows, given, model.device)
    return losses, before, loss_curve.held_out_loss(adapted, rows, 2, model.device)


def test_labels_are_on_the_completion_alone() -> None:
    tokenizer = tiny_run.make_tokenizer()
    ids, labels = loss_curve.tokenize(EXAMPLE, tokenizer)
    trained = [token for token, label in zip(ids, labels, strict=True) if label != loss_curve.IGNORED]
    assert tokenizer.decode(trained).startswith("Does.")
    assert len(ids) == len(labels)


def test_batches_are_those_of_the_seed_and_take_every_row_once_an_epoch() -> None:
    rows = list(range(8))
    first = list(loss_curve.batches(rows, 4, 5, seed=3))
    assert first == list(loss_curve.batches(rows, 4, 5, seed=3))
    assert first != list(loss_curve.batches(rows, 4, 5, seed=4))
    assert sorted(first[0] + first[1]) == rows == sorted(first[2] + first[3])


def test_padding_is_masked_and_carries_no_loss() -> None:
    batch = loss_curve.collate([([5, 6, 7], [-100, 6, 7]), ([8], [8])], torch.device("cpu"))
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_stacks_train_the_same_adapters_on_the_same_batches(tmp_path: Path) -> None:
    model = tiny_run.write_model(tmp_path / "model")
    losses, before, after = curve("qlora", model)
    dense_losses, dense_before, _ = curve("dense", model)
    assert len(losses) == 30
    assert losses[0] == pytest.approx(before, abs=1e-4)
    assert after < 0.9 * before
    assert dense_before == pytest.approx(
        before, rel=0.05
    )  # a random model: its loss hardly depends on its weights
    assert dense_losses[-1] == pytest.approx(losses[-1], rel=0.15)


def test_the_picture_shows_every_result(tmp_path: Path) -> None:
    files = []
    for stack in ("qlora", "dense"):
        result: dict[str, Any] = {
            "stack": stack,
            "held_out_before": 2.0,
            "held_out_after": 1.0,
            "losses": [2.0, 1.5],
        }
        files.append(tmp_path / f"{stack}.json")
        files[-1].write_text(json.dumps(result))
    loss_curve.plot(tmp_path / "picture.png", files)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
