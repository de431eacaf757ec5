"""Writes a 4-bit checkpoint of a model, in the layout that transformers, vLLM and bitsandbytes read.

Layers are quantised one by one while they are read: the peak is the 4-bit model and one layer in 16 bit. With
--calibrate, scales and codes are fitted to a text, decoder layer by decoder layer, over the 16-bit model; what is
finished waits beside DIR, in DIR.calibration, for the same command to go on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from qlora.cli.main import UsageError

NAME = "quantize"
HELP = "write a 4-bit checkpoint of a model"
# Options that say how to calibrate, by their names in the parsed arguments.
OF_CALIBRATION = ("calibrate_tokens", "budget", "seed")


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
        "--calibrate",
        metavar="TEXT",
        help="fit the NF4 codes and scales to this plain text file, or to the column text of a .jsonl, .json, .parquet or "
        ".csv file",
    )
    parser.add_argument(
        "--calibrate-tokens", type=int, metavar="N", help="tokens of it that are used; default: 32768"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of which part of it is used; default: 0")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="BITS",
        help="with --calibrate: mean bits a weight of the linear layers; those that harm most stay in 16 bit",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise UsageError(f"--out: {arguments.out} exists already")
    import torch

    import qlora
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
    alone = [name for name in OF_CALIBRATION if getattr(arguments, name) is not None]
    if arguments.calibrate is None and alone:
        raise UsageError(f"--{alone[0].replace('_', '-')}: expected with --calibrate TEXT, got it alone")
    quiet_libraries()
    device = pick_device(use_cpu=False)
    began = time.perf_counter()
    write = _write_plain if arguments.calibrate is None else _write_calibrated
    write(arguments, config, device, getattr(torch, arguments.dtype))
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"written to {arguments.out}: {size / 1e6:,.0f} MB in {time.perf_counter() - began:.0f} s")
    return 0


def _write_plain(arguments: argparse.Namespace, config: Any, device: Any, dtype: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora
    from qlora.integrations.transformers_save import save_model

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=config,
        dtype=dtype,
        device_map={"": device} if device.type == "cuda" else None,
    )
    print(qlora.report(model).summary())
    try:
        others = [AutoTokenizer.from_pretrained(arguments.model)]
    except (OSError, ValueError) as error:
        others = []
        print(f"no tokenizer in {arguments.model} to copy: {str(error).splitlines()[0]}")
    save_model(model, arguments.out, *others)


def _write_calibrated(arguments: argparse.Namespace, config: Any, device: Any, dtype: Any) -> None:
    from transformers import AutoTokenizer

    import qlora
    from qlora.calibration import mean_ratio
    from qlora.integrations.transformers_calibration import dense_config, read_windows, write_calibrated
    from qlora.train import data

    options = {"num_tokens": arguments.calibrate_tokens, "seed": arguments.seed, "budget": arguments.budget}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        text: Any = Path(arguments.calibrate)
        if text.suffix.lower() in data.LOADERS:
            text = data.load(arguments.calibrate, config=None, split="train", columns=None)
        calibration = qlora.Calibration(text, **given)
        config = dataclasses.replace(config, calibration=calibration)
        calibration.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        calibration.text = read_windows(calibration, dense_config(arguments.model))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    about = {"model": arguments.model, "text": Path(arguments.calibrate).name}
    model, done = write_calibrated(
        arguments.model, arguments.out, config, device=device, about=about, dtype=dtype
    )
    print(qlora.report(model).summary())
    ratio = mean_ratio(done.errors)
    print(f"output error of the layers: {ratio:.2f} of that with absmax scales (geometric mean)")
