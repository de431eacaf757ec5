"""One timed QLoRA training step at Llama-3-8B's shape; one process per stack, so that memory figures do not mix.

`python -m qlora.bench.train_step STACK MODEL_DIR [--cases 1x2048,4x2048] ...` prints one JSON line. STACK is `qlora`,
`bitsandbytes` (with PEFT's own preparation) or `bf16` (LoRA on the 16-bit model).
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

TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}


def load_and_adapt(
    stack: str, directory: Path, rank: int, targets: list[str], result: dict[str, Any]
) -> torch.nn.Module:
    """The model with adapters as the stack's documentation builds it; load time and memory go into `result`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = load_model(stack, directory, result)
    if stack == "qlora":
        import qlora

        return qlora.add_lora(qlora.prepare(model), r=rank, alpha=16, targets=targets)
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


def time_case(model: torch.nn.Module, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Median and fastest time of `steps` steps after three warm-up steps, tokens/s, peak memory, last loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    generator = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(steps + 3):
        ids = torch.randint(4, 128000, (batch, length), device="cuda", generator=generator)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    step = statistics.median(times[3:])
    return {
        "case": f"{batch}x{length}",
        "step_s": round(step, 4),
        "fastest_s": round(min(times[3:]), 4),
        "tokens_per_s": round(batch * length / step),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss": round(float(loss.detach()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--cases", default="1x2048,4x2048", help="comma-separated batch x length")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"stack": arguments.stack, "rank": arguments.rank, "targets": arguments.targets}
    model = load_and_adapt(
        arguments.stack, arguments.model, arguments.rank, TARGETS[arguments.targets], result
    )
    model.train()
    result["cases"] = []
    for case in arguments.cases.split(","):
        batch, length = (int(part) for part in case.split("x"))
        result["cases"].append(time_case(model, batch, length, arguments.steps))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
