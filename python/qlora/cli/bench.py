"""`qlora bench`: kernels, a training step, generation and calibration beside their peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "bench"
HELP = "measure kernels, a training step, generation or calibration beside their peers (GPU only)"
KERNELS = ("quantize", "dequantize", "gemm", "lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=(*KERNELS, "train", "generate", "calibrate"), help="what to measure")
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
        help="train, generate: comma-separated stacks (default: %(default)s); train also: qlora-eager, qlora-liger, "
        "unsloth; generate also: bitsandbytes-compiled",
    )
    parser.add_argument(
        "--cases",
        help="train: batch x length, ... (default: 1x2048,4x2048), for qlora also 4x2048+offload, 4x2048+24GB (a memory "
        "budget) or 4x2048+none (no checkpointing); generate: batches (default: 1,16)",
    )
    parser.add_argument(
        "--no-checkpoint",
        action="store_true",
        help="train, generate: make the random weights on the GPU instead of loading a checkpoint of them (all stacks but "
        "unsloth)",
    )
    parser.add_argument("--targets", choices=("all", "qv"), default="all", help="train: adapted layers")
    parser.add_argument("--rank", type=int, default=16, help="train: LoRA rank (default: %(default)s)")
    parser.add_argument(
        "--profile", action="store_true", help="train: also where the device time of a step goes"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=32,
        help="train, generate, calibrate: of the random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=int, default=32768, help="calibrate: of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        help="train: timed, after 3 that warm up or as many as are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="train: leaves torch what it would have of a GPU of this size, such as 24GiB, once the model is there; a case "
        "that does not fit is said to run out of memory",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="generate: all stacks compile at a time and are timed in turn; the GPU holds all of their models",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    problem = _problem(arguments)
    if problem is not None:
        print(f"qlora bench: {problem}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("qlora bench: expected a CUDA GPU, found none", file=sys.stderr)
        return 1
    result: dict[str, Any] = environment()
    is_complete = True
    if arguments.what == "train":
        is_complete = _bench_train(arguments, result)
    elif arguments.what == "generate":
        is_complete = _bench_generate(arguments, result)
    elif arguments.what == "calibrate":
        is_complete = _bench_calibrate(arguments, result)
    else:
        result["figures"] = _bench_kernels(arguments, result)
        _write(arguments, result)
    print(f"{result['gpu']}, {result['versions']}, {result['date']}")
    return 0 if is_complete else 1


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, before minutes are spent."""
    from qlora.bench.train_step import Case
    from qlora.memory_budget import parse_bytes

    if arguments.at_once and arguments.what != "generate":
        return f"--at-once: expected with generate, got {arguments.what}"
    if arguments.memory_limit is not None and arguments.what != "train":
        return f"--memory-limit: expected with train, got {arguments.what}"
    if arguments.steps < 1 or arguments.tokens < 1 or arguments.layers < 1:
        return "--steps, --tokens, --layers: expected at least 1, got less"
    try:
        if arguments.memory_limit is not None:
            parse_bytes(arguments.memory_limit)
        if arguments.what == "train" and arguments.cases is not None:
            for text in arguments.cases.split(","):
                Case.parse(text)
    except ValueError as error:
        return str(error).replace("memory_budget:", "--memory-limit:")
    return None


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


def _bench_train(arguments: argparse.Namespace, result: dict[str, Any]) -> bool:
    options = ["--cases", arguments.cases or "1x2048,4x2048"]
    options += ["--targets", arguments.targets, "--rank", str(arguments.rank)]
    options += ["--layers", str(arguments.layers)]
    options += ["--steps", str(arguments.steps)]
    options += ["--profile"] if arguments.profile else []
    if arguments.memory_limit is not None:
        options += ["--memory-limit", arguments.memory_limit]
        # Or the longest case would be one that memory is too much in pieces for, not one that it is too small for.
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the newer name and the older one
            os.environ.setdefault(name, "expandable_segments:True")
    return _bench_stacks("train_step", arguments, options, result)


def _bench_calibrate(arguments: argparse.Namespace, result: dict[str, Any]) -> bool:
    options = ["--layers", str(arguments.layers), "--tokens", str(arguments.tokens)]
    command = [sys.executable, "-m", "qlora.bench.calibration", *options]
    return _bench_commands([("qlora bench calibrate", command)], arguments, result)


def _bench_generate(arguments: argparse.Namespace, result: dict[str, Any]) -> bool:
    options = ["--layers", str(arguments.layers), "--batches"]
    batches = arguments.cases or "1,16"
    if arguments.at_once:
        return _bench_stacks("generation", arguments, options, result, batches.split(","))
    return _bench_stacks("generation", arguments, [*options, batches], result)


def _bench_stacks(
    module: str,
    arguments: argparse.Namespace,
    options: list[str],
    result: dict[str, Any],
    at_once: list[str] | None = None,
) -> bool:
    """Runs `qlora.bench.<module>` for each stack in a process of its own, over one checkpoint.

    With at_once there is a process for each of these last options too, and all are there at a time.
    """
    from qlora.bench.llama import make_llama3_8b

    with tempfile.TemporaryDirectory() as scratch:
        model = [] if arguments.model is None else [str(arguments.model)]
        if not model and not arguments.no_checkpoint:
            model = [scratch]
            make_llama3_8b(Path(scratch), arguments.layers)
            _release_gpu()
        start = [sys.executable, "-m", f"qlora.bench.{module}"]
        commands = [
            (f"qlora bench {arguments.what}: {stack}", [*start, stack, *model, *options, *last])
            for stack in arguments.stacks.split(",")
            for last in ([[option] for option in at_once] if at_once else [[]])
        ]
        return _bench_commands(commands, arguments, result, is_at_once=at_once is not None)


def _bench_commands(
    commands: list[tuple[str, list[str]]],
    arguments: argparse.Namespace,
    result: dict[str, Any],
    *,
    is_at_once: bool = False,
) -> bool:
    """The figures of all command lines; whether none of them failed.

    Cases are printed and written with those before them as they are done, so that a run that is cut off has shown what it
    has measured; in the end comes a table of all.
    """
    from qlora.bench import processes

    figures: list[dict[str, Any]] = []
    result["figures"] = figures
    failed: list[str] = []
    run = processes.run_at_once if is_at_once else processes.run_one_by_one
    for cases in run(commands, failed):
        figures += cases
        _print_table([_without_profile(case) for case in cases])
        _print_profiles(cases)
        _write(arguments, result)
    _write(arguments, result)
    if len(commands) > 1 or len(figures) > 1:
        _print_table([_without_profile(figure) for figure in figures])
    return not failed


_PROFILE = ("device_ms", "busy_ms", "idle_share", "kernels")


def _without_profile(figure: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figure.items() if name not in _PROFILE}


def _print_profiles(figures: list[dict[str, Any]]) -> None:
    """Where the device time of a step goes, and what of the step no kernel fills."""
    for figure in figures:
        if "device_ms" not in figure:
            continue
        kinds = [
            {"kind": kind, "ms": ms, "launches": launches}
            for kind, (ms, launches) in figure["device_ms"].items()
        ]
        title = f"{figure['stack']} {figure['case']}: some kernel runs for {figure['busy_ms']} ms"
        print(f"{title}, none for {figure['idle_share']:.0%} of the step")
        _print_table(kinds)


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
