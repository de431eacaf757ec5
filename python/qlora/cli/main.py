"""Parses the command line, runs one sub-command and turns every failure into one message and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

COMMANDS = ("train", "generate", "merge", "quantize", "estimate", "info", "bench")

# Optional packages by import name -> what to install. The extra holds all that `qlora train` uses.
EXTRA = "pip install 'qlora-kernels[train]'"
OPTIONAL_PACKAGES = (
    "accelerate", "datasets", "gguf", "matplotlib", "peft", "rich", "safetensors", "tqdm", "transformers", "trl", "yaml",
)  # fmt: skip


class UsageError(Exception):
    """Arguments that cannot be meant: exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qlora ARGV`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = "qlora"
    try:
        modules = [importlib.import_module(f"qlora.cli.{name}") for name in COMMANDS]
        parser = _build_parser(modules)
        arguments, keys = _take_keys(modules, arguments)
        parsed = parser.parse_args(arguments)
        parsed.keys = keys
        command = f"qlora {parsed.command}"
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qlora ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("QLORA_DEBUG") == "1":
            raise
        print(f"{command}: {_describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _build_parser(modules: Sequence[ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora",
        description="4-bit (QLoRA) fine-tuning: train, use, merge and quantise models.",
        epilog="`qlora COMMAND --help` describes a command. With no arguments, `qlora train` fine-tunes a small real model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qlora-kernels {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in modules:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.__doc__,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _version() -> str:
    try:
        return metadata.version("qlora-kernels")
    except metadata.PackageNotFoundError:
        return "(a source tree, not installed)"


def _take_keys(
    modules: Sequence[ModuleType], arguments: list[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Lets a command with free `--key value` pairs (train) take them before argparse sees the rest."""
    for module in modules:
        if arguments and arguments[0] == module.NAME and hasattr(module, "take_keys"):
            own, keys = module.take_keys(arguments[1:])
            return [arguments[0], *own], keys
    return arguments, []


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.split(".")[0]
        if package in OPTIONAL_PACKAGES:
            return f"the package {package!r} is not installed; {EXTRA} installs what this command needs"
    text = str(error).strip()
    if isinstance(error, (UsageError, ValueError, TypeError, OSError, ImportError)) and text:
        return text
    # Not one of the errors that say what was expected: name the class and where to look.
    return f"{type(error).__name__}: {text or 'no message'} (QLORA_DEBUG=1 shows where)"
