"""Writes a 4-bit checkpoint of a model, in the layout that transformers, vLLM and bitsandbytes read.

Layers are quantised one by one while they are read: the peak is the 4-bit model and one layer in 16 bit. With
--calibrate, scales and codes are fitted to a text, decoder layer by decoder layer, over the 16-bit model; what is
finished waits beside DIR, in DIR.calibration, for the same command to go on from there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from qlora.cli.main import UsageError

NAME = "quantize"
HELP = "write a 4-bit checkpoint of a model"
CALIBRATE_TOKENS = 32768


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
    parser.add_argument(
        "--calibrate", type=Path, metavar="TEXT_FILE", help="fit the NF4 codes and scales to this plain text"
    )
    parser.add_argument(
        "--calibrate-tokens",
        type=int,
        metavar="N",
        help=f"tokens of it that are used; default: {CALIBRATE_TOKENS}",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise UsageError(f"--out: {arguments.out} exists already")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora
    from qlora import files
    from qlora.calibration.report import mean_ratio, write_report
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
    if arguments.calibrate is None and arguments.calibrate_tokens is not None:
        raise UsageError("--calibrate-tokens: expected with --calibrate TEXT_FILE, got it alone")
    quiet_libraries()
    device = pick_device(use_cpu=False)
    began = time.perf_counter()
    errors = None
    if arguments.calibrate is None:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model,
            quantization_config=config,
            dtype=getattr(torch, arguments.dtype),
            device_map={"": device} if device.type == "cuda" else None,
        )
    else:
        model, errors, about = _calibrated(arguments, config, device)
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
        if errors is not None:
            write_report(directory, errors, about)
    if errors is not None:
        shutil.rmtree(_work_directory(arguments.out))
        print(
            f"output error of the layers: {mean_ratio(errors):.2f} of that with absmax scales (geometric mean)"
        )
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"written to {arguments.out}: {size / 1e6:,.0f} MB in {time.perf_counter() - began:.0f} s")
    return 0


def _work_directory(out: Path) -> Path:
    return out.with_name(f"{out.name}.calibration")


def _calibrated(
    arguments: argparse.Namespace, config: Any, device: Any
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The model in calibrated NF4, the errors of its layers and what the report says about it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora.calibration import calibrate_
    from qlora.calibration.text import read_text

    if config.quant_type != "nf4":
        raise UsageError(f"--calibrate: expected --quant-type nf4, got {config.quant_type}")
    model_config = AutoConfig.from_pretrained(arguments.model)
    if getattr(model_config, "quantization_config", None) is not None:
        raise UsageError(
            f"MODEL: expected a model in 16 or 32 bit to calibrate, got a quantised one: {arguments.model}"
        )
    longest = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    num_tokens = CALIBRATE_TOKENS if arguments.calibrate_tokens is None else arguments.calibrate_tokens
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        text = read_text(arguments.calibrate, tokenizer, num_tokens, longest)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    errors = calibrate_(model, text.windows, config, work=_work_directory(arguments.out), device=device)
    about = {
        "model": arguments.model,
        "text": arguments.calibrate.name,
        "text_sha256": text.sha256,
        "windows": list(text.windows.shape),
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "torch": torch.__version__,
    }
    return model, errors, about
