"""Time and memory of calibrating a model of Llama-3-8B's shape beside those of quantising it plainly.

`python -m qlora.bench.calibration [--layers N] [--tokens N]` prints a JSON line for each of the two as it is done, and one
with both last. The weights are random ones in bfloat16 and begin in host memory, the tokens random too: neither time nor
memory depends on their values. Reading and writing checkpoints, which `qlora quantize` does besides, is not in it.

The model is made anew for the second, in the same process, since what is measured is the device's memory above what was
held before. `extra_gb` is how much higher the peak of calibrating is than that of quantising plainly.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.bench.llama import llama3_8b_config
from qlora.calibration import calibrate_, mean_ratio
from qlora.calibration.text import WINDOW
from qlora.config import QuantConfig
from qlora.nn import quantize_

METHODS = ("plain", "calibrated")


def make_model(config: Any, device: torch.device) -> Any:
    """A causal language model of random bfloat16 weights in host memory, made on `device`, where that is fast."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.cpu().eval()


def make_windows(num_tokens: int, vocabulary: int) -> Tensor:
    """int64 [num_windows, length] of random tokens, as long as `qlora quantize` cuts a text.

    Raises:
        ValueError: there are none.
    """
    if num_tokens < 1:
        raise ValueError(f"--tokens: expected at least 1, got {num_tokens}")
    length = min(WINDOW, num_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (num_tokens // length, length), generator=generator)


def quantize(method: str, model: Any, windows: Tensor, device: torch.device) -> list[Any]:
    """Has the model in NF4 on the device; the output error of each layer where it is calibrated."""
    if method == "plain":
        quantize_(model, QuantConfig(), device=device)
        return []
    errors = calibrate_(model, windows, QuantConfig(), device=device).errors
    model.to(device)
    return errors


def measure(run: Callable[[], Any], device: torch.device) -> tuple[dict[str, Any], Any]:
    """Seconds of a call and, on a GPU, the most memory that torch had allocated; and what it returned."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    returned = run()
    if is_gpu:
        torch.cuda.synchronize(device)
    figures: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
    if is_gpu:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        figures["model_gb"] = round(torch.cuda.memory_allocated(device) / 1e9, 3)
    return figures, returned


def bench_calibration(config: Any, num_tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures of each method as they are there."""
    windows = make_windows(num_tokens, config.vocab_size)
    plain_peak: float | None = None
    for method in METHODS:
        model = make_model(config, device)
        _give_memory_back(device)
        figures, errors = measure(partial(quantize, method, model, windows, device), device)
        case: dict[str, Any] = {"method": method, "layers": config.num_hidden_layers, **figures}
        if errors:
            case["tokens"] = windows.numel()
            case["s_per_layer"] = round(figures["seconds"] / config.num_hidden_layers, 2)
            # Output errors beside those at scales max |w|: whether it did what it is for.
            case["error_ratio"] = round(mean_ratio(errors), 3)
        peak = figures.get("peak_gb")
        if peak is not None:
            plain_peak = peak if plain_peak is None else plain_peak
            case["extra_gb"] = round(peak - plain_peak, 3)
        del model
        _give_memory_back(device)
        yield case


def _give_memory_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    arguments = parser.parse_args()
    cases = []
    for case in bench_calibration(llama3_8b_config(arguments.layers), arguments.tokens, arguments.device):
        print(json.dumps({"cases": [case], "partial": True}), flush=True)
        cases.append(case)
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
