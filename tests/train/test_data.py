"""Recognising, reading and converting datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.train import data
from qlora.train.config import ConfigError, QloraArguments
from tiny_run import write_rows

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytestmark = pytest.mark.filterwarnings("default")

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def load(path: Path, columns: list[str] | None = None) -> Any:
    return data.load(str(path), config=None, split="train", columns=columns)


def converted(rows: list[dict[str, Any]], *, has_template: bool = True) -> list[dict[str, Any]]:
    dataset = datasets.Dataset.from_list(rows)
    return data.convert(dataset, data.recognise(dataset.column_names), has_template=has_template).to_list()


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["text"], "text"),
        (["id", "prompt", "completion"], "prompt/completion"),
        (["messages"], "messages"),
        (["conversations", "id"], "sharegpt"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output"], "alpaca"),
    ],
)
def test_formats_are_recognised_by_their_columns(columns: list[str], name: str) -> None:
    assert data.recognise(columns).name == name


def test_unknown_columns_are_named_with_the_known_formats() -> None:
    with pytest.raises(
        ConfigError, match=r"has the columns 'answer', 'question'; expected .*alpaca.*--columns old:new"
    ):
        data.recognise(["answer", "question"])


def test_each_answer_of_a_conversation_becomes_an_example_with_all_before_it() -> None:
    assert converted([{"messages": TURNS}]) == [
        {"prompt": TURNS[:2], "completion": TURNS[2:3]},
        {"prompt": TURNS[:4], "completion": TURNS[4:]},
    ]


def test_sharegpt_is_the_same_conversation_with_other_names() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    assert converted([{"conversations": turns}]) == converted([{"messages": TURNS}])


def test_alpaca_uses_the_chat_template_where_there_is_one() -> None:
    (example,) = converted([ALPACA])
    assert example["prompt"] == [{"role": "user", "content": "Add.\n\n1 2"}]
    assert example["completion"] == [{"role": "assistant", "content": "3"}]
    (plain,) = converted([ALPACA], has_template=False)
    assert plain["prompt"] == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert plain["completion"] == "3"


def test_alpaca_without_input_has_no_empty_section() -> None:
    row = {"instruction": "Hi.", "input": "", "output": "Hello."}
    assert converted([row])[0]["prompt"][0]["content"] == "Hi."
    assert "Input" not in converted([row], has_template=False)[0]["prompt"]


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"row 0 \(messages\): needs a chat template"):
        converted([{"messages": TURNS}], has_template=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": None}], r"row 1 \(text\): column 'text': expected text, got NoneType"),
        ([{"prompt": "a", "completion": " "}], "column 'completion': expected text, got an empty string"),
        ([{"text": 3}], "expected text, got int 3"),
        ([{"messages": "hello"}], "column 'messages': expected a list of messages, got str 'hello'"),
        ([{"messages": [{"speaker": "x"}]}], r"message 0: expected \{role, content\} or \{from, value\}"),
        ([{"messages": TURNS[:2]}], "no row of the dataset .* holds an answer"),
    ],
)
def test_a_wrong_value_is_one_error_with_its_row(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(rows)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    dataset = datasets.Dataset.from_list([ALPACA, ALPACA | {"output": "4"}])
    if suffix == "json":
        path.write_text(json.dumps(dataset.to_list()))
    elif suffix == "jsonl":
        write_rows(path, dataset.to_list())
    elif suffix == "csv":
        dataset.to_csv(str(path))
    else:
        dataset.to_parquet(str(path))
    loaded = load(path)
    assert data.recognise(loaded.column_names).name == "alpaca"
    assert loaded.to_list() == dataset.to_list()


def test_columns_renames(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    renamed = load(path, ["question:prompt", "answer:completion"])
    assert data.recognise(renamed.column_names).name == "prompt/completion"
    with pytest.raises(ConfigError, match=r"has no column 'nothing'; its columns are 'question', 'answer'"):
        load(path, ["nothing:prompt"])
    with pytest.raises(ConfigError, match="columns: expected old:new, got 'question'"):
        load(path, ["question"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", "{'a'", "cannot read .*broken.jsonl"),
        ("rows.txt", "a", r"expected a file ending in \.json"),
        ("missing.csv", None, "no file .*missing.csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name)


def test_a_fraction_is_held_out_and_disjoint(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(n)} for n in range(40)])
    arguments = QloraArguments(dataset_name=str(path), eval_fraction=0.1)
    train, held_out = data.train_and_held_out(arguments, seed=0)
    assert held_out is not None
    assert (len(train), len(held_out)) == (36, 4)
    assert not set(train["text"]) & set(held_out["text"])


def test_an_evaluation_dataset_of_its_own_is_used_whole(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": str(n)} for n in range(4)])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "x"}])
    arguments = QloraArguments(dataset_name=str(path), eval_dataset_name=str(other))
    train, held_out = data.train_and_held_out(arguments, seed=0)
    assert held_out is not None
    assert (len(train), held_out["text"][:]) == (4, ["x"])


def test_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="eval_fraction: .* has 1 row"):
        data.train_and_held_out(QloraArguments(dataset_name=str(path)), seed=0)


def test_optional_message_keys_do_not_split_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a large dataset are converted one by one; a key that only some of them have must not matter."""
    monkeypatch.setattr(data, "ROWS_PER_PART", 2)
    question = {"role": "user", "content": "Q"}
    answer = {"role": "assistant", "content": "A"}
    rows = [{"messages": [question, answer | extra]} for extra in ({}, {}, {}, {"name": "x"})]
    assert converted(rows) == [{"prompt": [question], "completion": [answer]}] * 4


def test_csv_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("\ufeffprompt,completion\nq,7\n", encoding="utf-8")
    assert load(file)[0] == {"prompt": "q", "completion": "7"}
