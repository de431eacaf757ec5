"""Merges an adapter into its base model and writes an ordinary 16-bit checkpoint, with a report of what that cost.

  qlora merge qlora-output --out merged

The adapter was trained on the base after quantisation. Merging into the original weights gives what every other tool
expects; `--mode dequantized` merges into the quantised weights, as they were in training. The report compares both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora.cli.main import UsageError
from qlora.cli.trained import base_of, quantisation_of

NAME = "merge"
HELP = "merge an adapter into its base: a 16-bit checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory or hub name")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--mode",
        choices=("original", "dequantized"),
        default="original",
        help="weights to merge into: those of the base, or those after quantisation; default: %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not measure the quantisation error of each layer"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def run(arguments: argparse.Namespace) -> int:
    directory = Path(arguments.adapter)
    if directory.exists() and not (directory / "adapter_config.json").is_file():
        raise UsageError(f"ADAPTER: expected a directory with adapter_config.json, got {directory}")
    if arguments.out.exists() and not arguments.overwrite:
        raise UsageError(f"--out: {arguments.out} exists; --overwrite replaces it")

    import torch

    import qlora
    from qlora.cli.quiet import quiet_libraries

    quantisation = quantisation_of(directory)
    was_quantised = quantisation.pop("load_in_4bit", True)
    if arguments.mode == "dequantized" and not was_quantised:
        raise UsageError(
            f"--mode dequantized: {directory} was trained with load_in_4bit false, on the base as it is"
        )
    quiet_libraries()
    report = qlora.merge(
        arguments.adapter,
        arguments.base or base_of(directory),
        out=arguments.out,
        dtype=getattr(torch, arguments.dtype),
        mode=arguments.mode,
        check=was_quantised and not arguments.no_check,
        quant_config=qlora.QuantConfig(**quantisation),
        overwrite=arguments.overwrite,
    )
    print(report.summary())
    return 0
