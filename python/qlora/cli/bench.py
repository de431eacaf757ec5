"""`qlora bench`: kernels, a training step and generation beside cuBLAS and bitsandbytes, as a table and as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "bench"
HELP = "measure kernels, a training step or generation beside cuBLAS and bitsandbytes (GPU only)"
KERNELS = ("quantize", "dequantize", "gemm", "lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=(*KERNELS, "train", "generate"), help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument(
        "--rows",
        default=None,
        metavar="M,M,...",
        help="gemm, lora: rows of the activations (default: 1 to 8192, 512 to 8192)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="train, generate: checkpoint (default: random weights of Llama-3-8B's shape)",
    )
    parser.add_argument(
        "--stacks",
        default="qlora,bitsandbytes,bf16",
        help="train, generate: comma-separated stacks (default: %(default)s)",
    )
    parser.add_argument(
        "--cases",
        help="train: batch x length, ... (default: 1x2048,4x2048); generate: batches (default: 1,16)",
    )
    parser.add_argument("--targets", choices=("all", "qv"), default="all", help="train: adapted layers")
    parser.add_argument("--rank", type=int, default=16, help="train: LoRA rank (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("qlora bench: expected a CUDA GPU, found none", file=sys.stderr)
        return 1
    result: dict[str, Any] = environment()
    if arguments.what == "train":
        _bench_train(arguments, result)
    elif arguments.what == "generate":
        _bench_generate(arguments, result)
    else:
        result["figures"] = _bench_kernels(arguments, result)
        _write(arguments, result)
    print(f"{result['gpu']}, {result['versions']}, {result['date']}")
    return 0


def _write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    from qlora.files import write_json

    if arguments.json is not None:
        write_json(arguments.json, result)


def environment() -> dict[str, Any]:
    """GPU, versions and date: what a figure is worth nothing without."""
    import importlib.metadata

    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("qlora-kernels", "bitsandbytes", "humming-kernels", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["qlora", *sys.argv[1:]]),
    }


def _bench_kernels(arguments: argparse.Namespace, result: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from qlora.bench import gemm, kernels, lora
    from qlora.bench.timing import copy_bandwidth, time_graph

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    limits = kernels.Limits(copy_bandwidth(), 2 * 8192**3 / (time_graph([lambda: a @ a]) * 1e-6))
    result["limits"] = {"bytes_per_s": limits.bandwidth, "bf16_flops": limits.flops}
    if arguments.what == "quantize":
        figures = kernels.bench_quantize(limits)
    elif arguments.what == "dequantize":
        figures = kernels.bench_dequantize(limits)
    else:
        run = lora.bench_lora if arguments.what == "lora" else gemm.bench_gemm
        rows: tuple[int, ...] = lora.ROWS if arguments.what == "lora" else gemm.ROWS
        if arguments.rows is not None:
            rows = tuple(int(part) for part in arguments.rows.split(","))
        figures = run(limits, rows)
    print(
        f"copy {limits.bandwidth / 1e12:.2f} TB/s, 8192^3 bf16 product {limits.flops / 1e12:.0f} TFLOP/s; times in µs"
    )
    for kind in dict.fromkeys(figure.get("kind") for figure in figures):
        _print_table([figure for figure in figures if figure.get("kind") == kind])
    return figures


def _bench_train(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    options = ["--cases", arguments.cases or "1x2048,4x2048"]
    options += ["--targets", arguments.targets, "--rank", str(arguments.rank)]
    _bench_stacks("train_step", arguments, options, result)


def _bench_generate(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    _bench_stacks("generation", arguments, ["--batches", arguments.cases or "1,16"], result)


def _bench_stacks(
    module: str, arguments: argparse.Namespace, options: list[str], result: dict[str, Any]
) -> None:
    """Runs `qlora.bench.<module>` for each stack in a process of its own, over one checkpoint.

    A stack's cases are printed and written with those before it when it is done, so that a run that is cut off has
    shown what it has measured; in the end comes a table of all.
    """
    from qlora.bench.llama import make_llama3_8b

    figures: list[dict[str, Any]] = []
    result["figures"] = figures
    stacks = arguments.stacks.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch)
            make_llama3_8b(model)
            _release_gpu()
        for stack in stacks:
            command = [sys.executable, "-m", f"qlora.bench.{module}", stack, str(model), *options]
            process = subprocess.run(command, check=False, capture_output=True, text=True)
            if process.returncode != 0:
                print(
                    f"qlora bench {arguments.what}: {stack} failed:\n{process.stderr[-2000:]}",
                    file=sys.stderr,
                )
                continue
            run_result = json.loads(process.stdout.splitlines()[-1])
            cases = [{**run_result, **case} for case in run_result.pop("cases")]
            figures += cases
            _print_table(cases)
            _write(arguments, result)
    _write(arguments, result)
    if len(stacks) > 1:
        _print_table(figures)


def _release_gpu() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _print_table(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not figures:
        return
    columns = list(dict.fromkeys(key for figure in figures for key in figure))
    table = Table(*(column.removesuffix("_us") for column in columns))
    for figure in figures:
        table.add_row(*(_format(figure.get(column)) for column in columns))
    Console(width=160).print(table)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)
