"""The keys of `qlora train`: TRL's SFTConfig (which holds transformers' TrainingArguments) and the few of our own.

Keys come from a YAML file and from the command line (which wins). Both go through one parser that transformers makes
from the dataclasses, so a key has the same type and the same error in both. Which keys were given is kept apart from
their defaults: defaults depend on the device and, without a dataset, on the built-in task.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

# The spelling of other tools -> ours. Named in the error, not accepted: one key, one name.
OTHER_NAMES = {
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "dataset": "dataset_name",
    "datasets": "dataset_name",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "lora_target": "lora_target_modules",
    "quantization_bit": "load_in_4bit",
    "quant_bits": "load_in_4bit",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "use_bnb_nested_quant": "double_quant",
    "double_quantization": "double_quant",
    "val_set_size": "eval_fraction",
    "split_dataset_ratio": "eval_fraction",
    "resume_from_checkpoint": "resume",
}

_NULL = "\0"  # YAML's null on its way through the parser


class ConfigError(ValueError):
    """A key, a value or a combination that cannot be meant."""


@dataclass
class QloraArguments:
    """The keys that SFTConfig does not have; names as in TRL's own command where it has them."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model directory or hub name. Without it: the built-in SmolLM2-135M-Instruct."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the model."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: sdpa, eager, flash_attention_2, ..."}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Type of all that is not 4-bit, and of the compute: bfloat16, float16 or float32."},
    )
    load_in_4bit: bool = field(
        default=True, metadata={"help": "Quantise the model's linear layers to 4 bits."}
    )
    quant_type: str = field(
        default="nf4", metadata={"help": "4-bit code: nf4 or fp4.", "choices": ["nf4", "fp4"]}
    )
    block_size: int = field(default=64, metadata={"help": "Weights that share a scale: 32, 64, ... 4096."})
    double_quant: bool = field(default=True, metadata={"help": "Store the scales in 8 bits as well."})
    calibrate: bool = field(
        default=False,
        metadata={"help": "Fit the NF4 codes and scales to the training data first; kept in output_dir."},
    )
    calibrate_tokens: int = field(
        default=32768, metadata={"help": "Tokens of the training data that calibrate uses."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "The adapter is scaled by alpha / r (rsLoRA: / sqrt(r))."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get an adapter, by name."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised scaling."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    checkpointing_offload: bool = field(
        default=False,
        metadata={"help": "Gradient checkpointing whose checkpoints wait in host memory."},
    )
    memory_budget: str | None = field(
        default=None,
        metadata={"help": "GPU memory to use, as 24GB: only as many layers are recomputed as it needs."},
    )
    embedding_offload: bool = field(
        default=False, metadata={"help": "Keep the frozen input embeddings in host memory."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "JSON, JSONL, Parquet or CSV file, directory, or hub name. Without it: the built-in task."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Hub configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to hold out."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of its own to hold out."}
    )
    eval_fraction: float = field(
        default=0.05,
        metadata={"help": "Part of the training data to hold out where no other is named; 0 for none."},
    )
    eval_samples: int = field(
        default=200, metadata={"help": "At most so many held-out examples are used; 0 for all."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Renames dataset columns: old:new old:new ..."}
    )
    num_samples: int = field(
        default=3, metadata={"help": "Held-out prompts answered before and after; 0 for none."}
    )
    sample_tokens: int = field(default=64, metadata={"help": "Longest sample answer, in tokens."})
    compile_layers: str = field(
        default="auto",
        metadata={
            "help": "Compile the decoder layers: true, false, or auto: on a GPU, for runs long enough.",
            "choices": ["auto", "true", "false"],
        },
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop training after so many minutes, as after the last step."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an unfinished earlier run in output_dir."}
    )


@dataclass(frozen=True)
class Config:
    """Given keys, apart from defaults. `ours` and `sft` hold only what the user gave."""

    ours: dict[str, Any]
    sft: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        return {**self.ours, **self.sft}

    def arguments(self, defaults: dict[str, Any]) -> QloraArguments:
        """Our own keys over `defaults` (which may hold SFTConfig's keys too)."""
        names = {f.name for f in dataclasses.fields(QloraArguments)}
        return QloraArguments(**{key: value for key, value in defaults.items() if key in names} | self.ours)

    def sft_config(self, defaults: dict[str, Any]) -> SFTConfig:
        """SFTConfig's keys over `defaults` (which may hold our own keys too)."""
        from trl.trainer.sft_config import SFTConfig

        names = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
        try:
            return SFTConfig(**{key: value for key, value in defaults.items() if key in names} | self.sft)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def read(path: Path | None, keys: list[tuple[str, list[str]]]) -> Config:
    """Merges the YAML file at `path` (if any) with command-line `keys` [(key, words), ...], which win.

    Raises ConfigError for an unknown key (with the nearest known one), a value of the wrong type, keys that
    exclude each other, or an unreadable file.
    """
    pairs = [] if path is None else _yaml_pairs(path)
    pairs += keys
    parser = _make_parser()
    known = _known_keys(parser)
    optional = _optional_keys()
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    words: list[str] = []
    nones: set[str] = set()
    for key, values in pairs:
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(_unknown_key(key, sorted(known)))
        if len(values) == 1 and (
            values[0] == _NULL or (name in optional and values[0].lower() in ("none", "null"))
        ):
            nones.add(name)
            continue
        if len(values) > 1 and name not in lists:
            raise ConfigError(
                f"{name}: expected one value, got {len(values)}: {' '.join(values)!r} "
                "(a configuration file comes before the first --key)"
            )
        nones.discard(name)
        words += _option(name, values)
    given = {**vars(parser.parse_args(words)), **dict.fromkeys(nones)}
    names = {f.name for f in dataclasses.fields(QloraArguments)}
    config = Config(
        {key: value for key, value in given.items() if key in names},
        {key: value for key, value in given.items() if key not in names},
    )
    _check_checkpointing(config)
    return config


def _check_checkpointing(config: Config) -> None:
    """Raises ConfigError where what needs checkpointing is asked for and checkpointing ruled out."""
    asking = [key for key in ("checkpointing_offload", "memory_budget") if config.ours.get(key)]
    if asking and config.sft.get("gradient_checkpointing") is False:
        names = " and ".join(asking)
        raise ConfigError(
            f"gradient_checkpointing: expected true, or not to be given, beside {names}, got false"
        )


def take_keys(words: list[str], own: dict[str, int]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Splits a command line into the command's own words and free `--key value ...` / `--key=value` pairs.

    `own` maps the command's own options to how many values may follow. Words before the first option are its own.
    """
    own_words: list[str] = []
    keys: list[tuple[str, list[str]]] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--"):
            own_words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        limit = own.get(word.partition("=")[0])
        values = [value] if equals else []
        while not equals and index < len(words) and not words[index].startswith("--"):
            if limit is not None and len(values) == limit:
                break
            values.append(words[index])
            index += 1
        if limit is None:
            keys.append((name, values))
        else:
            own_words += [word, *([] if equals else values)]
    return own_words, keys


def describe_keys(*, every: bool) -> str:
    """Help text: our own keys, or every key."""
    parser = _make_parser(ours_only=not every, help=True)
    return parser.format_help()


def dump(config: Config) -> str:
    """The given keys as YAML that `read` takes back."""
    import yaml

    return str(yaml.safe_dump(config.given, sort_keys=True, allow_unicode=True, default_flow_style=False))


def _make_parser(*, ours_only: bool = False, help: bool = False) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser
    from trl.trainer.sft_config import SFTConfig

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(re.sub(r"^argument --(\w+)[^:]*", r"\1", message))

    classes: Any = [QloraArguments] if ours_only else [QloraArguments, SFTConfig]
    parser: argparse.ArgumentParser = Parser(
        classes, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    if not help:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    return parser


def _known_keys(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions if action.dest != "resume_from_checkpoint"}


def _optional_keys() -> set[str]:
    """Keys for which the word "none" means None. Where text is allowed, "none" is text (report_to)."""
    from trl.trainer.sft_config import SFTConfig

    hints = {**get_type_hints(SFTConfig), **get_type_hints(QloraArguments)}
    types = {name: getattr(hint, "__args__", ()) for name, hint in hints.items()}
    return {name for name, arguments in types.items() if type(None) in arguments and str not in arguments}


def _option(name: str, values: list[str]) -> list[str]:
    """Words for argparse. A single value is joined by `=`, so that it may begin with a dash."""
    if len(values) == 1:
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def _unknown_key(key: str, known: list[str]) -> str:
    name = key.replace("-", "_")
    if name in OTHER_NAMES:
        return f"unknown key {key!r}: here it is called {OTHER_NAMES[name]!r}"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`qlora train --help-keys` lists every key"
    return f"unknown key {key!r}: {hint}"


def _yaml_pairs(path: Path) -> list[tuple[str, list[str]]]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"CONFIG: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"CONFIG: {path} is not valid YAML: {error}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"CONFIG: expected `key: value` lines in {path}, got a {type(content).__name__}")
    return [(str(key), _yaml_words(value)) for key, value in content.items()]


def _yaml_words(value: Any) -> list[str]:
    if value is None:
        return [_NULL]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(value)]
