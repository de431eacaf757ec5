"""`python -m qlora.bench.accuracy`: answers scored by tiny models, one of which does what it does by construction."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import make_model

import tiny_run
from qlora.bench import accuracy

WIDTH = 320  # at least one coordinate a token


def row(question: str, answers: list[str], right: int) -> dict[str, str]:
    body = " ".join(f"Answer{number}: {answer}" for number, answer in enumerate(answers, 1))
    names = "/".join(f"answer{number + 1}" for number in range(len(answers)))
    text = f"Please choose the correct answer to the question: {question}\n\n{body}\n\nAnswer format: {names}"
    return {"instruction": text, "answer": f"answer{right + 1}"}


# By the sum of the log-likelihoods "ab" wins against eight times a, by the mean a byte the other way round.
ROWS = [
    row("one?", ["aa", "bc", "cd"], 0),
    row("two: three?", ["bc", "dd"], 1),
    row("four?", ["ee", "fg"], 1),
    row("five?", ["ab", "aaaaaaaa"], 0),
]


def repeater(strength: float) -> Any:
    """A Llama whose layers add nothing and whose head foretells the token just seen: its logit is `strength`, others' 0."""
    tokenizer = tiny_run.make_tokenizer()
    model = make_model("llama", vocab_size=len(tokenizer), hidden_size=WIDTH, head_dim=16, rms_norm_eps=1e-12)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1.0)
    unit = torch.eye(len(tokenizer), WIDTH)
    model.model.embed_tokens.weight.data = unit
    model.lm_head.weight.data = unit * (
        strength / math.sqrt(WIDTH)
    )  # the norm makes a unit vector sqrt(WIDTH) long
    return model, tokenizer


def test_a_row_is_taken_apart_into_question_answers_and_the_right_one() -> None:
    assert accuracy.parse(ROWS[1]) == accuracy.Question("two: three?", ["bc", "dd"], 1)
    solutions = {
        "instruction": "Choose the solution to the question: Fix it\n\nSolution1: Glue it. \n\nSolution2: Don't\n\n"
        "Answer format: solution1/solution2",
        "answer": "solution2",
    }
    assert accuracy.parse(solutions) == accuracy.Question("Fix it", ["Glue it.", "Don't"], 1)
    with pytest.raises(
        ValueError, match=r"expected the answers \['answer1', 'answer2'\].*got \{'instruction'"
    ):
        accuracy.parse({**ROWS[1], "answer": "answer3"})


def test_a_model_that_repeats_scores_as_computed_by_hand() -> None:
    model, tokenizer = repeater(3.0)
    context, answers = (list(tokenizer(text).input_ids) for text in ("x:", " aab"))
    (sums,) = accuracy.log_likelihoods(model, [context], [[answers]])
    log_sum = math.log(math.exp(3.0) + len(tokenizer) - 1)
    assert sums == pytest.approx([3.0 - 4 * log_sum], rel=1e-5)  # ":", " ", "a" -> other tokens; "a" -> "a"


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_repeating_model_is_right_where_the_right_answer_repeats(batch_size: int) -> None:
    model, tokenizer = repeater(3.0)
    questions = [accuracy.parse(entry) for entry in ROWS]
    right = accuracy.is_right(model, tokenizer, questions, batch_size)
    assert right.tolist() == [[True, True], [True, True], [False, False], [True, False]]
    result = accuracy.summary(right)
    assert (result["accuracy"], result["accuracy_per_byte"]) == (0.75, 0.5)
    assert result["accuracy_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2"])
def test_answers_in_one_row_score_as_each_alone(name: str) -> None:
    model = make_model(name)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(256, (length,), generator=generator).tolist()

    contexts = [draw(5), draw(9)]
    answers = [[draw(4), draw(1), draw(7)], [draw(2), draw(3)]]
    found = accuracy.log_likelihoods(model, contexts, answers)
    for context, branches, sums in zip(contexts, answers, found, strict=True):
        for tokens, total in zip(branches, sums, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + tokens])).logits[0].double().log_softmax(-1)
            alone = sum(float(logits[len(context) - 1 + at, token]) for at, token in enumerate(tokens))
            assert total == pytest.approx(alone, abs=1e-4)


def test_the_error_of_a_paired_difference_comes_from_the_questions_that_differ() -> None:
    this = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    other = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    result = accuracy.summary(this, other)
    assert result["accuracy_beside"] == {
        "only_this_right": 1,
        "only_other_right": 2,
        "difference": -0.25,
        "difference_error": round(
            float((this[:, 0].double() - other[:, 0].double()).std(correction=0)) / 2, 4
        ),
    }
    assert result["accuracy_per_byte_beside"]["difference_error"] == 0.0


def test_the_command_compares_two_runs_over_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = repeater(3.0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))

    def run(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(
            sys, "argv", ["accuracy", words[0], str(tmp_path / "model"), str(file), *words[1:]]
        )
        accuracy.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    saved = str(tmp_path / "saved.json")
    dense = run("dense", "--compute-dtype=float32", f"--save={saved}")
    assert dense["layer"] == "torch.nn.modules.linear.Linear"
    assert (dense["questions"], dense["accuracy"], dense["accuracy_per_byte"]) == (4, 0.75, 0.5)
    # The head, which alone decides here, stays as it is.
    quantised = run("qlora", "--compute-dtype=float32", f"--beside={saved}")
    assert quantised["layer"] == "qlora.nn.linear.Linear4bit"
    assert quantised["accuracy_beside"]["difference"] == 0
    plain = run("qlora", "--compute-dtype=float32", "--dequantize", f"--beside={saved}")
    assert plain["layer"] == "torch.nn.modules.linear.Linear"
    assert plain["accuracy_beside"]["difference"] == 0
    assert run("dense", "--questions=2", "--seed=1")["questions"] == 2
    with pytest.raises(SystemExit):
        run("dense", "--questions=2", "--seed=1", f"--beside={saved}")
    assert "expected a run over the same questions" in capsys.readouterr().err
