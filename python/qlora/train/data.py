"""Datasets in the formats people have, turned into the two that TRL trains on.

| format            | columns                          | becomes                                                   |
|-------------------|----------------------------------|-----------------------------------------------------------|
| prompt/completion | prompt, completion               | itself (texts or lists of messages)                       |
| messages          | messages [{role, content}]       | one conversational prompt/completion per assistant turn   |
| sharegpt          | conversations [{from, value}]    | the same                                                  |
| alpaca            | instruction, (input), output     | conversational, or Alpaca's text without a chat template  |
| text              | text                             | itself; the loss is on all of it                          |

Loss is on the answer only. A conversation with k answers becomes k examples, each with all that came before as its
prompt: that is exact for every chat template, also for those that render earlier turns differently, and needs no
generation markers in the template. With `assistant_only_loss: true` TRL trains all answers of a conversation in one
pass instead, where the template allows it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.train.config import ConfigError, QloraArguments

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
CSV_ENCODING = "utf-8-sig"  # with or without the mark that spreadsheets put first
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
ROWS_PER_PART = 10_000
KNOWN = "prompt/completion; messages; conversations (sharegpt); instruction/(input)/output (alpaca); text"

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Format:
    """A recognised format: the columns it reads and how one row becomes examples for TRL."""

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row, bool], list[Row]]  # (row, has a chat template) -> examples


def load(name: str, *, config: str | None, split: str, columns: list[str] | None) -> Dataset:
    """Reads one split of a file, directory or hub dataset and renames its columns.

    Raises ConfigError where nothing of that name, split or column exists or the dataset is empty.
    """
    dataset = _load_split(name, config, split)
    if len(dataset) == 0:
        raise ConfigError(f"dataset_name: {name} is empty (split {split!r})")
    for rename in columns or []:
        old, colon, new = rename.partition(":")
        if not colon or not old or not new:
            raise ConfigError(f"columns: expected old:new, got {rename!r}")
        if old not in dataset.column_names:
            raise ConfigError(
                f"columns: {name} has no column {old!r}; its columns are {_names(dataset.column_names)}"
            )
        if new in dataset.column_names:
            dataset = dataset.remove_columns(new)
        dataset = dataset.rename_column(old, new)
    return dataset


def has_split(name: str, *, config: str | None, split: str) -> bool:
    """Whether a directory or hub dataset has `split`. A single file has only "train"."""
    if _loader_of(name) is not None:
        return split == "train"
    from datasets import get_dataset_split_names

    return split in get_dataset_split_names(name, config)


def recognise(columns: list[str], text_column: str = "text") -> Format:
    """The format that the column names show. Raises ConfigError naming them and the known formats."""
    present = set(columns)
    if {"prompt", "completion"} <= present:
        return Format("prompt/completion", ("prompt", "completion"), _from_prompt_completion)
    if "messages" in present:
        return Format("messages", ("messages",), _from_messages)
    if "conversations" in present:
        return Format("sharegpt", ("conversations",), _from_sharegpt)
    if {"instruction", "output"} <= present:
        return Format(
            "alpaca", tuple(c for c in ("instruction", "input", "output") if c in present), _from_alpaca
        )
    if text_column in present:

        def from_text(row: Row, _: bool) -> list[Row]:
            return [{text_column: _text(row, text_column)}]

        return Format("text", (text_column,), from_text)
    raise ConfigError(
        f"dataset_name: no known format has the columns {_names(columns)}; expected those of one of: {KNOWN}. "
        "`--columns old:new` renames columns"
    )


def convert(dataset: Dataset, format: Format, *, has_template: bool) -> Dataset:
    """Rows of `format` as TRL's examples. Raises ConfigError with the row's number where a value is wrong."""

    def examples_of(row: Row) -> list[Row]:
        examples = format.convert(row, has_template)
        if not has_template and any(isinstance(example.get("prompt"), list) for example in examples):
            raise ValueError(
                "needs a chat template and the model's tokenizer has none; give one with chat_template_path, "
                "or use prompt/completion texts"
            )
        return examples

    return _map_rows(dataset, format, examples_of)


def keep_conversations(dataset: Dataset, format: Format) -> Dataset:
    """Whole conversations as `messages`, for TRL's own assistant_only_loss."""
    if format.name not in ("messages", "sharegpt"):
        raise ConfigError(f"assistant_only_loss: expected messages or sharegpt data, got {format.name}")
    return _map_rows(dataset, format, lambda row: [{"messages": _conversation(row, format.columns[0])}])


def train_and_held_out(arguments: QloraArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """The raw training rows and the held-out rows that the arguments name; None where nothing is held out."""
    assert arguments.dataset_name is not None
    name, config = arguments.dataset_name, arguments.dataset_config
    train = load(name, config=config, split=arguments.dataset_train_split, columns=arguments.columns)
    held_out: Dataset | None = None
    if arguments.eval_dataset_name is not None:
        split = arguments.dataset_test_split or _first_split(arguments.eval_dataset_name, None)
        held_out = load(arguments.eval_dataset_name, config=None, split=split, columns=arguments.columns)
    elif arguments.dataset_test_split is not None:
        held_out = load(name, config=config, split=arguments.dataset_test_split, columns=arguments.columns)
    elif arguments.eval_fraction > 0:
        if not arguments.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction: expected a number from 0 to below 1, got {arguments.eval_fraction}"
            )
        if len(train) < 2:
            raise ConfigError(f"eval_fraction: {name} has 1 row and none to hold out; set eval_fraction to 0")
        count = min(max(1, round(len(train) * arguments.eval_fraction)), len(train) - 1)
        parts = train.train_test_split(test_size=count, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return train, held_out


def _map_rows(dataset: Dataset, format: Format, examples_of: Callable[[Row], list[Row]]) -> Dataset:
    """All rows' examples, a part at a time, so that only one part is ever held as Python objects."""
    from datasets import Dataset, concatenate_datasets

    parts: list[Dataset] = []
    examples: list[Row] = []
    for index, row in enumerate(dataset.select_columns(list(format.columns))):
        try:
            examples += examples_of(row)
        except ValueError as error:
            raise ConfigError(f"dataset_name: row {index} ({format.name}): {error}") from error
        if len(examples) >= ROWS_PER_PART or (index == len(dataset) - 1 and examples):
            parts.append(Dataset.from_list(examples))
            examples = []
    if not parts:
        raise ConfigError(f"dataset_name: no row of the dataset ({format.name}) holds an answer to train on")
    return concatenate_datasets(parts)


def _first_split(name: str, config: str | None) -> str:
    if _loader_of(name) is not None:
        return "train"
    return next(
        (split for split in ("test", "validation") if has_split(name, config=config, split=split)), "train"
    )


def _loader_of(name: str) -> str | None:
    return LOADERS.get(Path(name).suffix.lower())


def _load_split(name: str, config: str | None, split: str) -> Dataset:
    import datasets

    path = Path(name).expanduser()
    loader = _loader_of(name)
    if loader is not None and not path.is_file():
        raise ConfigError(f"dataset_name: no file {name}")
    if loader is None and path.is_file():
        raise ConfigError(f"dataset_name: expected a file ending in {', '.join(LOADERS)}, got {name}")
    if loader is not None and path.stat().st_size == 0:
        raise ConfigError(f"dataset_name: {name} is empty")
    try:
        if loader is not None:
            options = {}
            if loader == "csv":  # every column is text: "7" is an answer, an empty field an empty text
                text = datasets.Value("string")
                options = {
                    "keep_default_na": False,
                    "encoding": CSV_ENCODING,
                    "features": datasets.Features(dict.fromkeys(_csv_columns(path), text)),
                }
            return datasets.load_dataset(loader, data_files=str(path), split=split, **options)
        return datasets.load_dataset(str(path) if path.exists() else name, config, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ConfigError(f"dataset_name: cannot read {name}: {_first_line(cause)}") from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"dataset_name: cannot load {name!r}, split {split!r}: {_first_line(error)}"
        ) from error


def _csv_columns(path: Path) -> list[str]:
    with path.open(encoding=CSV_ENCODING, newline="") as file:
        return next(csv.reader(file), [])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _names(columns: list[str]) -> str:
    return ", ".join(map(repr, columns)) or "(none)"


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: expected text, got {_describe(value)}")  # noqa: TRY004
    if not value.strip():
        raise ValueError(f"column {column!r}: expected text, got an empty string")
    return value


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _conversation(row: Row, column: str) -> list[Message]:
    """The messages of one row with TRL's names, whether {role, content} or {from, value}."""
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r}: expected a list of messages, got {_describe(turns)}")
    return [_message(turn, f"column {column!r}, message {position}") for position, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    """One message as {role, content}. Further keys go: some messages of a dataset have them, others do not."""
    given = turn if isinstance(turn, dict) else {}
    if given.get("from") is not None and given.get("value") is not None:
        given = {"role": ROLES.get(given["from"], given["from"]), "content": given["value"]}
    if given.get("role") is None or given.get("content") is None:
        raise ValueError(f"{where}: expected {{role, content}} or {{from, value}}, got {_describe(turn)}")
    if not isinstance(given["content"], str):  # a ValueError all the same: the row is wrong
        raise ValueError(f"{where}: content: expected text, got {_describe(given['content'])}")  # noqa: TRY004
    return {"role": given["role"], "content": given["content"]}


def _answers(messages: list[Message]) -> list[Row]:
    """One example per assistant turn that answers something."""
    return [
        {"prompt": messages[:position], "completion": [message]}
        for position, message in enumerate(messages)
        if message["role"] == "assistant" and position > 0
    ]


def _from_messages(row: Row, _: bool) -> list[Row]:
    return _answers(_conversation(row, "messages"))


def _from_sharegpt(row: Row, _: bool) -> list[Row]:
    return _answers(_conversation(row, "conversations"))


def _from_prompt_completion(row: Row, _: bool) -> list[Row]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return [{"prompt": _conversation(row, "prompt"), "completion": _conversation(row, "completion")}]
    return [{"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}]


def _from_alpaca(row: Row, has_template: bool) -> list[Row]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise ValueError(f"column 'input': expected text, got {_describe(context)}")  # noqa: TRY004
    if has_template:
        content = f"{instruction}\n\n{context}" if context.strip() else instruction
        return [
            {
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": output}],
            }
        ]
    middle = f"### Input:\n{context}\n\n" if context.strip() else ""
    return [{"prompt": f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", "completion": output}]
