"""The same causal language model in each stack, for what is measured of its answers (perplexity.py, accuracy.py)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

STACKS = ("qlora", "bitsandbytes", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` and `describe` read."""
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="multiply with the 4-bit weights rounded to the compute dtype: the same model up to that, faster on a CPU",
    )


def load(arguments: argparse.Namespace) -> Any:
    """The model in NF4, block 64, on the GPU if there is one; all that is not 4-bit in the compute dtype.

    A checkpoint that is quantised already stays as it is stored.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    compute_dtype = getattr(torch, arguments.compute_dtype)
    double_quant = not arguments.no_double_quant
    quantization_config: Any = None
    if arguments.stack == "qlora":
        import qlora

        quantization_config = qlora.QuantConfig(double_quant=double_quant, compute_dtype=compute_dtype)
    elif arguments.stack == "bitsandbytes":
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=quantization_config,
        dtype=compute_dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    ).eval()
    return model.dequantize() if arguments.dequantize and quantization_config is not None else model


def describe(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What was measured, with the class of the linear layers as they were found."""
    layer = type(model.get_submodule("model.layers.0.self_attn.q_proj"))
    return {
        "stack": arguments.stack,
        "layer": f"{layer.__module__}.{layer.__qualname__}",
        "compute_dtype": arguments.compute_dtype,
        "double_quant": None if arguments.stack == "dense" else not arguments.no_double_quant,
        "dequantized": None if arguments.stack == "dense" else arguments.dequantize,
    }
