"""Zero-shot accuracy of a causal language model on questions with given answers, one process per stack.

`python -m qlora.bench.accuracy STACK MODEL_DIR QUESTIONS_FILE` prints one JSON line. STACK is `qlora`, `bitsandbytes` or
`dense` (the model as it is). The model sees "Question: ...\\nAnswer:", after the bos token where the tokenizer sets one;
each answer, after a blank, has the log-likelihood of its tokens. The choice is the answer with the largest

    accuracy             sum of the log-likelihoods, not normalised by length
    accuracy_per_byte    that sum divided by the bytes of the answer in UTF-8

A question is one row: the context once, then the answers as branches that see the context and themselves.

    context width     answer 1    answer 2    ...
    [pad] c c c c c | a a a     | b b       | [pad]          positions of a and b both go on from c

QUESTIONS_FILE is a JSON list of rows with `instruction` ("...: QUESTION Answer1: ... Answer2: ... Answer format:
answer1/answer2"; any other word in place of "answer") and `answer` ("answer2"), as ARC-Easy and PIQA are spread for the
tuning of adapters.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import stacks

RULES = ("accuracy", "accuracy_per_byte")


@dataclass
class Question:
    """A question, its answers and which of them is right."""

    text: str
    answers: list[str]
    right: int


def parse(row: dict[str, str]) -> Question:
    """One row of the file. Raises ValueError where it does not hold each answer that its format names."""
    body, _, names = row["instruction"].rpartition("Answer format:")
    labels = names.strip().split("/")
    marks = "|".join(re.escape(label.capitalize()) for label in labels)
    text, *answers = (part.strip() for part in re.split(rf"(?:{marks}):\s", body.partition(": ")[2]))
    if len(answers) != len(labels) or row["answer"] not in labels:
        raise ValueError(
            f"instruction: expected the answers {labels} and one of them as the right one, got {row!r}"
        )
    return Question(text, answers, labels.index(row["answer"]))


@torch.no_grad()
def log_likelihoods(
    model: Any, contexts: list[list[int]], answers: list[list[list[int]]]
) -> list[list[float]]:
    """Of each answer to each context, both as tokens: the sum of its tokens' log-likelihoods; softmax in float32."""
    width = max(map(len, contexts))
    length = width + max(sum(map(len, branches)) for branches in answers)
    ids = torch.zeros(len(contexts), length, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    branch = torch.full_like(ids, -1)  # 0 the context, 1 and on the answers, -1 padding
    starts: list[list[int]] = []
    for row, (context, branches) in enumerate(zip(contexts, answers, strict=True)):
        begin, position, starts_of_row = width - len(context), 0, []
        for number, tokens in enumerate([context, *branches]):
            part = slice(begin, begin + len(tokens))
            ids[row, part] = torch.tensor(tokens)
            positions[row, part] = torch.arange(len(tokens)) + position
            branch[row, part] = number
            starts_of_row.append(begin)
            begin, position = part.stop, len(context)
        starts.append(starts_of_row[1:])
    key, query = branch[:, None, :], branch[:, :, None]
    is_seen = ((key == query) | (key == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(is_seen.shape, dtype=model.dtype).masked_fill(~is_seen, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=ids.to(model.device),
        position_ids=positions.to(model.device),
        attention_mask=mask[:, None].to(model.device),
        use_cache=False,
        logits_to_keep=length - width + 1,  # from the last token of the contexts on
    ).logits
    result = []
    for row, branches in enumerate(answers):
        sums = []
        for start, tokens in zip(starts[row], branches, strict=True):
            first = start - width + 1  # where the answer's second token is foretold
            of_tokens = logits[row, [0, *range(first, first + len(tokens) - 1)]].float()
            wanted = torch.tensor(tokens, device=of_tokens.device)
            sums.append(-float(torch.nn.functional.cross_entropy(of_tokens, wanted, reduction="sum")))
        result.append(sums)
    return result


def is_right(model: Any, tokenizer: Any, questions: list[Question], batch_size: int) -> Tensor:
    """bool [num_questions, 2]: whether each question was answered rightly by each of RULES."""
    from qlora.calibration.text import begin_tokens

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    begin = begin_tokens(tokenizer)
    contexts = [begin + tokens(f"Question: {question.text}\nAnswer:") for question in questions]
    answers = [[tokens(f" {answer}") for answer in question.answers] for question in questions]
    # By the longer of the two parts: rows of about the same width need little padding.
    lengths = [max(len(c), sum(map(len, a))) for c, a in zip(contexts, answers, strict=True)]
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    result = torch.zeros(len(questions), len(RULES), dtype=torch.bool)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        sums = log_likelihoods(model, [contexts[i] for i in indices], [answers[i] for i in indices])
        for index, of_answers in zip(indices, sums, strict=True):
            question = questions[index]
            num_bytes = [max(1, len(answer.encode())) for answer in question.answers]
            per_byte = [total / count for total, count in zip(of_answers, num_bytes, strict=True)]
            for rule, scores in enumerate((of_answers, per_byte)):
                result[index, rule] = scores.index(max(scores)) == question.right
    return result


def summary(right: Tensor, other: Tensor | None = None) -> dict[str, Any]:
    """Accuracy and its standard error by each rule; with `other`, the paired difference to another model's.

    Args:
        right, other: bool [num_questions, 2] as of `is_right`, over the same questions.
    """
    count = len(right)
    result: dict[str, Any] = {"questions": count}
    for index, rule in enumerate(RULES):
        share = float(right[:, index].double().mean())
        result[rule] = round(share, 4)
        result[f"{rule}_error"] = round(math.sqrt(share * (1 - share) / count), 4)
        if other is not None:
            gained = int((right[:, index] & ~other[:, index]).sum())
            lost = int((~right[:, index] & other[:, index]).sum())
            variance = gained + lost - (gained - lost) ** 2 / count
            result[f"{rule}_beside"] = {
                "only_this_right": gained,
                "only_other_right": lost,
                "difference": round((gained - lost) / count, 4),
                "difference_error": round(math.sqrt(variance) / count, 4),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stacks.add_arguments(parser)
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, help="so many drawn from the file, all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--batch-size", type=int, default=16, help="questions of a batch")
    parser.add_argument("--save", type=Path, help="write here which questions were answered rightly")
    parser.add_argument("--beside", type=Path, help="what another model's run wrote: the paired difference")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    questions = [parse(row) for row in json.loads(arguments.file.read_text(encoding="utf-8"))]
    wanted = len(questions) if arguments.questions is None else arguments.questions
    if not 0 < wanted <= len(questions):
        parser.error(f"--questions: expected 1 to {len(questions)}, got {wanted}")
    questions = random.Random(arguments.seed).sample(questions, wanted)
    asked = [question.text for question in questions]
    other = None
    if arguments.beside is not None:
        saved = json.loads(arguments.beside.read_text(encoding="utf-8"))
        if saved["questions"] != asked:
            parser.error(f"--beside: expected a run over the same questions, got {arguments.beside}")
        other = torch.tensor(saved["right"])
    model = stacks.load(arguments)
    right = is_right(model, AutoTokenizer.from_pretrained(arguments.model), questions, arguments.batch_size)
    if arguments.save is not None:
        content = {"rules": RULES, "questions": asked, "right": right.tolist()}
        arguments.save.write_text(json.dumps(content), encoding="utf-8")
    print(
        json.dumps(
            {**stacks.describe(arguments, model), "file": arguments.file.name, **summary(right, other)}
        )
    )


if __name__ == "__main__":
    main()
