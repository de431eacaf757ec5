"""Tokens per second of `generate()` with a static cache; one process per stack, so that memory figures do not mix.

`python -m qlora.bench.generation STACK [MODEL_DIR] [--batches 1,16] ...` prints one JSON line. STACK is `qlora`,
`bitsandbytes`, `bitsandbytes-compiled` or `bf16`. Transformers compiles the decoding step by itself for `qlora` and `bf16`;
for bitsandbytes it does not, since that quantizer does not say that it can be compiled. `bitsandbytes-compiled` says it
in its place. Without MODEL_DIR the weights are random ones of Llama-3-8B's shape, made on the GPU.

Compiling takes a minute for each stack and batch: with `--in-turn` several processes do it at a time and are timed one by
one (processes.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.bench import processes
from qlora.bench.llama import STACKS, llama3_8b_config, load_model

COMPILED = "bitsandbytes-compiled"
WARM_UP = 2


def load(stack: str, source: Any, result: dict[str, Any], device: int | str = "cuda:0") -> Any:
    """The model of the stack, ready to generate; source as for `load_model`."""
    model = load_model(stack.removesuffix("-compiled"), source, result, device).eval()
    if stack == COMPILED:
        type(model.hf_quantizer).is_compileable = property(lambda self: True)
    return model


@dataclass
class Batch:
    """Calls of generate() that make `new_tokens` for each of `size` random prompts of `prompt` tokens."""

    model: Any
    size: int
    prompt: int
    new_tokens: int
    first_s: float = 0.0
    peak: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ids = torch.randint(4, self.model.config.vocab_size, (self.size, self.prompt))
        self._ids = self._ids.to(self.model.device)
        self._is_gpu = self.model.device.type == "cuda"

    def warm_up(self) -> None:
        if self._is_gpu:
            torch.cuda.empty_cache()
        self.first_s = self._seconds(WARM_UP)[0]

    def time(self, repeats: int) -> dict[str, Any]:
        """Median time of a call; tokens_per_s counts new tokens only, the time to read the prompts is in it."""
        seconds = statistics.median(self._seconds(repeats))
        case = {
            "batch": self.size,
            "is_compiled": hasattr(self.model, "_compiled_call"),
            "first_s": round(self.first_s, 2),
            "generate_s": round(seconds, 3),
            "tokens_per_s": round(self.size * self.new_tokens / seconds, 1),
        }
        if self._is_gpu:
            case["peak_gb"] = round(self.peak / 1e9, 2)
        return case

    def _seconds(self, calls: int) -> list[float]:
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            output = self.model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
            if self._is_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        wanted = (self.size, self.prompt + self.new_tokens)
        if output.shape != wanted:
            raise RuntimeError(f"expected {wanted} tokens from generate(), got {tuple(output.shape)}")
        if self._is_gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return times


def time_batches(batches: list[Batch], repeats: int, *, in_turn: bool = False) -> list[dict[str, Any]]:
    """Each warmed up and timed; where in_turn, all are warm before a line says that the first is to be timed."""
    if not in_turn:
        cases = []
        for batch in batches:
            torch._dynamo.reset()  # or what is compiled for a second size is compiled for any
            batch.warm_up()
            cases.append(batch.time(repeats))
        return cases
    for batch in batches:
        batch.warm_up()
    processes.say("warm")
    processes.wait_for_turn()
    return [batch.time(repeats) for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=(*STACKS, COMPILED))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32, help="without MODEL_DIR: of how many layers")
    parser.add_argument("--batches", default="1,16", help="comma-separated batch sizes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-turn", action="store_true", help="load and time at lines on standard input")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"stack": arguments.stack}
    if arguments.in_turn:
        import transformers  # noqa: F401  takes long

        processes.wait_for_turn()
    model = load(arguments.stack, arguments.model or llama3_8b_config(arguments.layers), result)
    if arguments.in_turn:
        processes.say("loaded")
    batches = [
        Batch(model, int(size), arguments.prompt, arguments.new_tokens)
        for size in arguments.batches.split(",")
    ]
    result["cases"] = time_batches(batches, arguments.repeats, in_turn=arguments.in_turn)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
