"""Writes bitsandbytes_golden_<device>.npz: inputs, and the bytes that the installed bitsandbytes makes of them.

    python tests/data/make_golden.py --device cpu
    python tests/data/make_golden.py --device cuda

Its CPU and CUDA backends differ from each other: on ties and within a few ulp of a threshold (CUDA multiplies by an
approximate reciprocal, CPU divides in a partial last block), in FP4's thresholds (rounded decimals on CUDA, midpoints
on CPU), in zero blocks and in code 8 of FP4, -0, which CPU never writes. Hence one file for each; none of the inputs
has a zero block or a value that is not finite.

Contents: x (float16 [n], odd n), absmax (float32 [700]), versions (text), and for each case
    <quant_type>-<block_size>-<dtype>-packed    uint8 [ceil(n / 2)]
    <quant_type>-<block_size>-<dtype>-absmax    float32 [num_blocks]
    <quant_type>-<block_size>-<dtype>-digest    SHA-256 of the dequantised values as float32, -0 made +0
    nested-codes, nested-absmax, nested-map, nested-offset, nested-decoded    of the 700 scales
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (64, 128, 256, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUM_VALUES = 4807
# Fills the mantissas of float32 from float16 values, in one exactly defined rounding.
STRETCH = 1.2345678


def path_of(device: str) -> Path:
    """Where the golden bytes of a device lie."""
    return Path(__file__).with_name(f"bitsandbytes_golden_{device}.npz")


def input_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The input of a case from the stored float16 values."""
    return x if dtype is torch.float16 else (x.float() * STRETCH).to(dtype)


def digest_of(values: torch.Tensor) -> str:
    """SHA-256 of the float32 values, with -0 made +0."""
    return hashlib.sha256((values.detach().float().cpu() + 0.0).numpy().tobytes()).hexdigest()


def make(device: str) -> dict[str, np.ndarray]:
    """All arrays of the file."""
    import bitsandbytes
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(20261124)
    x = torch.randn(NUM_VALUES, generator=generator) * torch.exp(
        torch.randn(NUM_VALUES, generator=generator) / 4
    )
    x = x.half()
    absmax = torch.randn(700, generator=generator).abs() + 1.5
    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, {device}"
    arrays = {"x": x.numpy(), "absmax": absmax.numpy(), "versions": np.array(versions)}
    for quant_type, block_size, name in itertools.product(QUANT_TYPES, BLOCK_SIZES, DTYPES):
        case = f"{quant_type}-{block_size}-{name}"
        values = input_of(x, DTYPES[name]).to(device)
        packed, state = functional.quantize_4bit(values, blocksize=block_size, quant_type=quant_type)
        arrays[f"{case}-packed"] = packed.flatten().cpu().numpy()
        arrays[f"{case}-absmax"] = state.absmax.cpu().numpy()
        arrays[f"{case}-digest"] = np.array(digest_of(functional.dequantize_4bit(packed, state)))
    scales = absmax.to(device)
    offset = scales.mean()
    codes, state = functional.quantize_blockwise(scales - offset, blocksize=256)
    decoded = functional.dequantize_blockwise(codes, state) + offset
    for key, tensor in {
        "codes": codes,
        "absmax": state.absmax,
        "map": state.code,
        "offset": offset,
        "decoded": decoded,
    }.items():
        arrays[f"nested-{key}"] = tensor.cpu().numpy()
    return arrays


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, help="instead of beside this script")
    arguments = parser.parse_args()
    path = arguments.out or path_of(arguments.device)
    np.savez_compressed(path, **make(arguments.device))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
