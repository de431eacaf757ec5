"""Fine-tunes a model with QLoRA.

With no arguments: SmolLM2-135M learns to write docstrings from the Python standard library. With a dataset:

  qlora train --model_name_or_path MODEL --dataset_name data.jsonl --output_dir out
  qlora train config.yaml --learning_rate 1e-4

Keys are those of TRL's SFTConfig and transformers' TrainingArguments and the few of qlora's own below; the command
line wins over the file. Datasets: prompt/completion, messages, sharegpt, alpaca or text, recognised by their columns.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from qlora.cli.main import UsageError

NAME = "train"
HELP = "fine-tune a model (with no arguments: a small real model on real data)"

# Options of the command itself -> how many values may follow. All other options are keys.
OWN_OPTIONS = {"--resume": 1, "--dry-run": 0, "--help-keys": 0, "--help": 0, "-h": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _own_keys()
    parser.usage = "qlora train [CONFIG.yaml] [--KEY VALUE ...] [--resume [auto|DIR]] [--dry-run]"
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="file of `key: value` lines"
    )
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="DIR", help="continue from the last complete checkpoint"
    )
    parser.add_argument("--dry-run", action="store_true", help="load and check everything, train nothing")
    parser.add_argument(
        "--help-keys", action="store_true", help="list every key with its meaning and default"
    )


def _own_keys() -> str:
    from qlora.train.config import QloraArguments

    lines = ["keys of qlora's own, beside those of SFTConfig and TrainingArguments (--help-keys):"]
    for field in dataclasses.fields(QloraArguments):
        lines.append(f"  --{field.name:<22}{field.metadata['help']}")
    return "\n".join(lines)


def take_keys(words: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    from qlora.train.config import take_keys

    return take_keys(words, OWN_OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    from qlora.cli.quiet import quiet_libraries
    from qlora.train import config as configuration

    if arguments.help_keys:
        print(configuration.describe_keys(every=True))
        return 0
    try:
        config = configuration.read(_config_file(arguments), arguments.keys)
        from qlora.train import session

        quiet_libraries()
        return session.run(config, resume=arguments.resume, dry_run=arguments.dry_run)
    except configuration.ConfigError as error:
        raise UsageError(str(error)) from error


def _config_file(arguments: argparse.Namespace) -> Path | None:
    """The configuration: CONFIG, or when resuming without one, that of the run that is resumed."""
    if arguments.config is not None or arguments.resume is None:
        config: Path | None = arguments.config
        return config
    from qlora.train.checkpoints import step_of
    from qlora.train.session import DEFAULT_OUTPUT_DIR

    directory = Path(dict(arguments.keys).get("output_dir", [DEFAULT_OUTPUT_DIR])[0])
    if arguments.resume != "auto":
        directory = Path(arguments.resume)
        directory = directory.parent if step_of(directory) is not None else directory
    saved = directory / "args.yaml"
    return saved if saved.is_file() else None
