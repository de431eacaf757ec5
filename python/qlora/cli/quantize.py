"""Writes a 4-bit checkpoint of a model, in the layout that transformers, vLLM and bitsandbytes read.

Layers are quantised one by one while they are read: the peak is the 4-bit model and one layer in 16 bit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qlora.cli.main import UsageError

NAME = "quantize"
HELP = "write a 4-bit checkpoint of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub name, in 16 or 32 bit")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where to write; must not exist"
    )
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4", help="default: %(default)s")
    parser.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="weights a scale; default: %(default)s"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32")
    parser.add_argument(
        "--skip", action="append", metavar="NAME", help="module left in 16 bit; may be given several times"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="of what is not quantised; default: %(default)s")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise UsageError(f"--out: {arguments.out} exists already")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora
    from qlora import files
    from qlora.cli.quiet import quiet_libraries
    from qlora.train.model import pick_device

    try:
        config = qlora.QuantConfig(
            quant_type=arguments.quant_type,
            block_size=arguments.block_size,
            double_quant=not arguments.no_double_quant,
            skip_modules=arguments.skip,
            compute_dtype=arguments.dtype,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    quiet_libraries()
    device = pick_device(use_cpu=False)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=config,
        dtype=getattr(torch, arguments.dtype),
        device_map={"": device} if device.type == "cuda" else None,
    )
    print(qlora.report(model).summary())
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        tokenizer = None
        print(f"no tokenizer in {arguments.model} to copy: {str(error).splitlines()[0]}")
    with files.whole_directory(arguments.out) as directory:
        model.save_pretrained(str(directory))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"written to {arguments.out}: {size / 1e6:,.0f} MB in {time.perf_counter() - began:.0f} s")
    return 0
