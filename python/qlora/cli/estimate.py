"""Says what a training step needs of a GPU's memory, from the model's configuration: no GPU, no weights.

  qlora estimate MODEL --seq 4096 --batch 1
  qlora estimate MODEL --gpu 24              also the longest sequence and the largest batch that fit

Defaults are those of `qlora train`. docs/estimate.md says what each term is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qlora.cli.main import UsageError

NAME = "estimate"
CHECKPOINTING: dict[str, bool | str] = {"recompute": True, "offload": "offload", "none": False}
HELP = "say what a training step needs of a GPU's memory (no GPU needed)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model directory or hub name; only config.json is read"
    )
    parser.add_argument(
        "--seq", type=int, default=1024, metavar="N", help="tokens of a sequence; default: %(default)s"
    )
    parser.add_argument(
        "--batch", type=int, default=4, metavar="N", help="sequences of a batch; default: %(default)s"
    )
    parser.add_argument("--r", type=int, default=16, help="rank of the adapter; default: %(default)s")
    parser.add_argument(
        "--targets",
        default="all-linear",
        metavar="NAME,NAME",
        help="layers that get an adapter; default: all-linear",
    )
    parser.add_argument(
        "--gpu", type=float, metavar="GIB", help="also look for what fits a card of so many GiB"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="of all that is not in 4 bits; default: %(default)s"
    )
    parser.add_argument(
        "--checkpointing",
        choices=sorted(CHECKPOINTING),
        default="recompute",
        help="recompute layers, offload their inputs to the host as well, or none; default: %(default)s",
    )
    parser.add_argument(
        "--memory-budget", metavar="SIZE", help="recompute only as many layers as such a budget needs: 24GB"
    )
    parser.add_argument(
        "--embedding-offload", action="store_true", help="input embeddings are in host memory"
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        default=4,
        metavar="N",
        help="batches of an optimizer step; default: %(default)s",
    )
    parser.add_argument(
        "--padded", action="store_true", help="batches have padding, so that attention takes a mask"
    )
    parser.add_argument(
        "--autocast", action="store_true", help="under autocast (bf16: true in other trainers)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the model code of a hub repository"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")


def run(arguments: argparse.Namespace) -> int:
    from qlora.cli.quiet import quiet_libraries
    from qlora.estimate import estimate_memory
    from qlora.files import write_json

    quiet_libraries()
    targets = arguments.targets.split(",") if "," in arguments.targets else arguments.targets
    try:
        found = estimate_memory(
            arguments.model,
            seq=arguments.seq,
            batch=arguments.batch,
            r=arguments.r,
            targets=targets,
            dtype=arguments.dtype,
            gradient_checkpointing=CHECKPOINTING[arguments.checkpointing],
            memory_budget=arguments.memory_budget,
            embedding_offload=arguments.embedding_offload,
            gradient_accumulation=arguments.accumulation,
            autocast=arguments.autocast,
            padded=arguments.padded,
            gpu=arguments.gpu,
            trust_remote_code=arguments.trust_remote_code,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print_estimate(found)
    if arguments.json is not None:
        write_json(arguments.json, found.to_dict())
    return 0


def print_estimate(found: Any) -> None:
    """A table of the terms, and what fits."""
    from rich.console import Console
    from rich.table import Table

    from qlora.estimate.search import STEP

    title = f"{found.model}, {found.batch} x {found.seq} tokens"
    table = Table("at the peak of a training step", "GB", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for term, size in found.terms.items():
        table.add_row(term, f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row(f"peak of the allocator (in {found.phase})", f"{found.peak / 1e9:.3f}")
    table.add_row("CUDA context (assumed)", f"{found.context / 1e9:.3f}")
    table.add_row("slack of the allocator (assumed)", f"{found.slack / 1e9:.3f}")
    table.add_section()
    table.add_row("in all", f"{found.total / 1e9:.3f}")
    Console(width=100).print(table)
    if found.num_recomputed is not None:
        print(f"{found.num_recomputed} of {found.num_layers} layers recomputed")
    if found.gpu is None:
        return
    verdict = "fits" if found.fits else "does not fit"
    print(f"{verdict} {found.gpu:g} GiB ({found.gpu * 2**30 / 1e9:.2f} GB)")
    length = (
        f"{found.longest_seq} tokens (a multiple of {STEP})"
        if found.longest_seq
        else f"fewer than {STEP} tokens"
    )
    if found.seq_limit is not None and found.longest_seq + STEP > found.seq_limit:
        length = f"{found.longest_seq} tokens, all that the model is made for"
    print(f"longest sequence at batch {found.batch}: {length}")
    print(f"largest batch at {found.seq} tokens: {found.largest_batch or 'none'}")
