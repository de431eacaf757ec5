"""One timed QLoRA training step at Llama-3-8B's shape; one process per stack, so that memory figures do not mix.

`python -m qlora.bench.train_step STACK MODEL_DIR [--cases 1x2048,4x2048] ...` prints a JSON line for each case as it is
done, and one with all of them last. STACK is `qlora` (with compiled layers), `qlora-eager`, `qlora-liger` (eager, with
Liger's kernels), `bitsandbytes` (with PEFT's own preparation), `bf16` (LoRA on the 16-bit model) or `unsloth`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STACKS = ("qlora", "qlora-eager", "qlora-liger", "bitsandbytes", "bf16", "unsloth")
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}


def load_and_adapt(stack: str, directory: Path, rank: int, targets: list[str], result: dict[str, Any]) -> Any:
    """The model with adapters as the stack's documentation builds it; load time and memory go into `result`."""
    if stack == "unsloth":
        return _load_unsloth(directory, rank, targets, result)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora.bench.llama import load_model

    model = load_model(stack.partition("-")[0], directory, result)
    if stack.startswith("qlora"):
        import qlora

        if stack == "qlora-liger":
            _apply_liger(model)
        model = qlora.prepare(model, compile=stack == "qlora")
        return qlora.add_lora(model, r=rank, alpha=16, targets=targets)
    checkpointing = {"use_reentrant": False}
    if stack == "bitsandbytes":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _apply_liger(model: Any) -> None:
    """Liger's norms, rotary embeddings and SwiGLU; the loss stays qlora's."""
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        _apply_liger_kernel_to_instance,
    )

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def _load_unsloth(directory: Path, rank: int, targets: list[str], result: dict[str, Any]) -> Any:
    """As Unsloth's notebooks do, with its offloading gradient checkpointing."""
    import torch
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(directory), max_seq_length=8192, load_in_4bit=True, dtype=torch.bfloat16
    )
    torch.cuda.synchronize()
    result["load_s"] = round(time.perf_counter() - start, 2)
    result["load_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    result["model_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        use_gradient_checkpointing="unsloth",
        max_seq_length=8192,
    )


def make_step(model: Any, batch: int, length: int) -> Callable[[], Any]:
    """A training step on random tokens, which returns the loss."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator(device="cuda").manual_seed(0)

    def step() -> Any:
        ids = torch.randint(4, 128000, (batch, length), device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_case(model: Any, batch: int, length: int, steps: int, *, profile: bool = False) -> dict[str, Any]:
    """Median and fastest time of `steps` steps after three warm-up steps, tokens/s, peak memory, last loss.

    `launch_s` is how long Python was busy with the fastest step: where it is the step's time, the GPU waits for Python.
    `first_s` is the first step, in which compilers work.
    """
    import torch

    step = make_step(model, batch, length)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times, launches = [], []
    loss = torch.zeros(())
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        launches.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[3:])
    figures = {
        "case": f"{batch}x{length}",
        "step_s": round(median, 4),
        "fastest_s": round(min(times[3:]), 4),
        "launch_s": round(min(launches[3:]), 4),
        "first_s": round(times[0], 1),
        "tokens_per_s": round(batch * length / median),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss": round(float(loss), 4),
    }
    if profile:
        from qlora.bench.device_time import profile_step

        figures |= profile_step(step, median)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--cases", default="1x2048,4x2048", help="comma-separated batch x length")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--profile", action="store_true", help="also the device time of a step by kind of kernel"
    )
    arguments = parser.parse_args()
    if arguments.stack == "unsloth":  # before torch and transformers, which it patches; and it asks a hub
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import unsloth  # type: ignore[import-not-found]  # noqa: F401
    result: dict[str, Any] = {"stack": arguments.stack, "rank": arguments.rank, "targets": arguments.targets}
    model = load_and_adapt(
        arguments.stack, arguments.model, arguments.rank, TARGETS[arguments.targets], result
    )
    model.train()
    result["cases"] = []
    for case in arguments.cases.split(","):
        batch, length = (int(part) for part in case.split("x"))
        figures = time_case(model, batch, length, arguments.steps, profile=arguments.profile)
        print(json.dumps(result | {"cases": [figures], "partial": True}), flush=True)
        result["cases"].append(figures)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
