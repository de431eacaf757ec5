"""Tokens per second of `generate()` with a static cache; one process per stack, so that memory figures do not mix.

`python -m qlora.bench.generation STACK MODEL_DIR [--batches 1,16] ...` prints one JSON line. STACK is `qlora`,
`bitsandbytes`, `bitsandbytes-compiled` or `bf16`. Transformers compiles the decoding step by itself for `qlora` and `bf16`;
for bitsandbytes it does not, since that quantizer does not say that it can be compiled. `bitsandbytes-compiled` says it
in its place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from qlora.bench.llama import STACKS, load_model

COMPILED = "bitsandbytes-compiled"


def load(stack: str, directory: Path, result: dict[str, Any], device: int | str = "cuda:0") -> Any:
    """The model of the stack, ready to generate."""
    model = load_model(stack.removesuffix("-compiled"), directory, result, device).eval()
    if stack == COMPILED:
        type(model.hf_quantizer).is_compileable = property(lambda self: True)
    return model


def time_batch(model: Any, batch: int, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Median time of a call that makes `new_tokens` for each of `batch` random prompts, after two to warm up.

    tokens_per_s counts new tokens only; the time to read the prompts is in it.
    """
    ids = torch.randint(4, model.config.vocab_size, (batch, prompt), device=model.device)
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
    }
    is_gpu = model.device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        output = model.generate(ids, **arguments)
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if output.shape != (batch, prompt + new_tokens):
        raise RuntimeError(
            f"expected {(batch, prompt + new_tokens)} tokens from generate(), got {tuple(output.shape)}"
        )
    seconds = statistics.median(times[2:])
    case = {
        "batch": batch,
        "is_compiled": hasattr(model, "_compiled_call"),
        "first_s": round(times[0], 2),
        "generate_s": round(seconds, 3),
        "tokens_per_s": round(batch * new_tokens / seconds, 1),
    }
    if is_gpu:
        case["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=(*STACKS, COMPILED))
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", default="1,16", help="comma-separated batch sizes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"stack": arguments.stack}
    model = load(arguments.stack, arguments.model, result)
    result["cases"] = [
        time_batch(model, int(batch), arguments.prompt, arguments.new_tokens, arguments.repeats)
        for batch in arguments.batches.split(",")
    ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
