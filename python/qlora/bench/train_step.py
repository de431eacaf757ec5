"""One timed QLoRA training step at Llama-3-8B's shape; one process per stack, so that memory figures do not mix.

`python -m qlora.bench.train_step STACK [MODEL_DIR] [--cases 1x2048,4x2048] ...` prints a JSON line for each case as it is
done, and one with all of them last. STACK is `qlora` (with compiled layers), `qlora-eager`, `qlora-liger` (eager, with
Liger's kernels), `bitsandbytes` (with PEFT's own preparation), `bf16` (LoRA on the 16-bit model) or `unsloth`. Without
MODEL_DIR all but Unsloth take random weights of Llama-3-8B's shape, made on the GPU.

A case is batch x length; with qlora it may say how memory is saved: `4x2048+offload` (checkpoints in host memory),
`4x2048+24GB` (a memory budget) or `4x2048+none` (no checkpointing). Layers are compiled anew for each.
`--memory-limit 24GiB` leaves torch as much of the GPU as it would have on such a card; a case that runs out of memory is
said to do so, and the next one follows.
`--in-turn` is for several stacks on one GPU that compile together and are timed in turn (processes.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STACKS = ("qlora", "qlora-eager", "qlora-liger", "bitsandbytes", "bf16", "unsloth")
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}
COMPILERS = ("qlora", "unsloth")
"""Stacks whose first step takes long."""
WARM_UP = 3  # or as many as are timed, if these are fewer
BUDGET_WARM_UP = 6  # the plan of a memory budget stands by then


class Case(NamedTuple):
    """`memory` is what saves it: "" (checkpointing), "offload", "none" or a budget such as "24GB"."""

    batch: int
    length: int
    memory: str = ""

    @classmethod
    def parse(cls, text: str) -> Case:
        """4x2048, or 4x2048+offload.

        Raises:
            ValueError: it is neither.
        """
        size, plus, memory = text.partition("+")
        batch, times, length = size.partition("x")
        if not (times and batch.isdecimal() and length.isdecimal()) or bool(plus) != bool(memory):
            raise ValueError(f"case: expected batch x length such as 4x2048 or 4x2048+offload, got {text!r}")
        return cls(int(batch), int(length), memory)

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (f"+{self.memory}" if self.memory else "")

    @property
    def has_budget(self) -> bool:
        return self.memory not in ("", "offload", "none")


def load_and_adapt(
    stack: str,
    directory: Path | None,
    rank: int,
    targets: list[str],
    result: dict[str, Any],
    device: int | str = "cuda:0",
    num_layers: int = 32,
) -> Any:
    """The model with adapters as the stack's documentation builds it; load time and memory go into `result`.

    Without a directory it is one of random weights, of num_layers layers.
    """
    if stack == "unsloth":
        if directory is None:
            raise ValueError("unsloth: expected a checkpoint, got none")
        return _load_unsloth(directory, rank, targets, result)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora.bench.llama import llama3_8b_config, load_model

    model = load_model(stack.partition("-")[0], directory or llama3_8b_config(num_layers), result, device)
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


def save_memory(model: Any, stack: str, case: Case) -> None:
    """Prepares the model of a stack of qlora again, for the case; others are refused what is not their default."""
    if not stack.startswith("qlora"):
        if case.memory:
            raise ValueError(f"{stack}: expected cases of batch x length, got {case}")
        return
    import torch

    import qlora

    torch._dynamo.reset()  # or a second batch size is compiled for any
    checkpointing: Any = "offload" if case.memory == "offload" else case.memory != "none"
    if not checkpointing:
        model.get_base_model().gradient_checkpointing_disable()
    budget = case.memory if case.has_budget else None
    qlora.prepare(model, checkpointing, memory_budget=budget, compile=stack == "qlora")


def make_step(model: Any, batch: int, length: int) -> Callable[[], Any]:
    """A training step on random tokens, which returns the loss."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = min(128000, model.config.vocab_size)

    def step() -> Any:
        ids = torch.randint(4, vocabulary, (batch, length), device=device, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_case(model: Any, case: Case, steps: int, *, profile: bool = False) -> dict[str, Any]:
    """Median and fastest time of `steps` steps after those that warm up, tokens/s, peak memory, last loss.

    `launch_s` is how long Python was busy with the fastest step: where it is the step's time, the GPU waits for Python.
    `first_s` is the first step, in which compilers work.
    """
    import torch

    step = make_step(model, case.batch, case.length)
    warm_up = BUDGET_WARM_UP if case.has_budget else min(WARM_UP, steps)
    is_gpu = model.device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, launches = [], []
    loss = torch.zeros(())
    for _ in range(steps + warm_up):
        if is_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        launches.append(time.perf_counter() - start)
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[warm_up:])
    figures = {
        "case": str(case),
        "step_s": round(median, 4),
        "fastest_s": round(min(times[warm_up:]), 4),
        "launch_s": round(min(launches[warm_up:]), 4),
        "first_s": round(times[0], 1),
        "tokens_per_s": round(case.batch * case.length / median),
        "loss": round(float(loss), 4),
    }
    if is_gpu:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if profile:
        from qlora.bench.device_time import profile_step

        figures |= profile_step(step, median)
    return figures


def compile_case(model: Any, case: Case) -> float:
    """The steps that warm up, ahead of `time_case`, and the memory that they took given back: seconds of the first."""
    import torch

    step = make_step(model, case.batch, case.length)
    times = []
    for _ in range(WARM_UP):
        start = time.perf_counter()
        float(step())
        times.append(time.perf_counter() - start)
    del step
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return round(times[0], 1)


def limit_memory(model: Any, num_bytes: int) -> None:
    """From here on torch has as much memory as on a GPU of num_bytes, of which the CUDA context and libraries take theirs.

    Raises:
        ValueError: the model alone takes more, or the GPU has less.
    """
    import torch

    # A step, after which libraries and kernels are loaded and AdamW's state is as large as it gets.
    float(make_step(model, 1, 256)())
    _give_memory_back()
    free, total = torch.cuda.mem_get_info()
    room = num_bytes - (total - free - torch.cuda.memory_reserved())
    taken = torch.cuda.memory_reserved()
    if room <= taken or num_bytes > total:
        what = f"between what the model takes, {(num_bytes - room + taken) / 1e9:.1f} GB, and {total / 1e9:.1f} GB"
        raise ValueError(f"--memory-limit: expected a size {what}, got {num_bytes / 1e9:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(room / total)


def _give_memory_back() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def try_case(model: Any, case: Case, steps: int, *, profile: bool = False) -> dict[str, Any]:
    """`time_case`, or that the case ran out of memory."""
    import torch

    try:
        return time_case(model, case, steps, profile=profile)
    except torch.OutOfMemoryError:
        pass  # the error, which holds the step's tensors, is gone when memory is given back
    model.zero_grad(set_to_none=True)
    _give_memory_back()
    return {"case": str(case), "error": "out of memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32, help="without MODEL_DIR: of how many layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--cases", default="1x2048,4x2048", help="comma-separated, as above")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--memory-limit", help="of the GPU that is played, such as 24GiB")
    parser.add_argument(
        "--profile", action="store_true", help="also the device time of a step by kind of kernel"
    )
    parser.add_argument(
        "--in-turn", action="store_true", help="load, compile and time at lines on standard input"
    )
    arguments = parser.parse_args()
    stack = arguments.stack
    cases = [Case.parse(text) for text in arguments.cases.split(",")]
    if arguments.in_turn and stack == "qlora" and len(cases) > 1:
        parser.error("--in-turn: expected one case of qlora, for each of which layers are compiled anew")
    if stack == "unsloth":  # before torch and transformers, which it patches; and it asks a hub
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import unsloth  # type: ignore[import-not-found]  # noqa: F401
    from qlora.bench import processes

    if arguments.in_turn:
        processes.wait_for_turn()
    result: dict[str, Any] = {"stack": stack, "rank": arguments.rank, "targets": arguments.targets}
    targets = TARGETS[arguments.targets]
    model = load_and_adapt(
        stack, arguments.model, arguments.rank, targets, result, num_layers=arguments.layers
    )
    model.train()
    if arguments.memory_limit is not None:
        from qlora.memory_budget import parse_bytes

        limit = parse_bytes(arguments.memory_limit)
        limit_memory(model, limit)
        result["limit_gb"] = round(limit / 1e9, 2)
    first_s = {}
    if arguments.in_turn:
        processes.say("loaded")
        if stack in COMPILERS:
            for case in cases:
                save_memory(model, stack, case)
                first_s[case] = compile_case(model, case)
        processes.say("warm")
        processes.wait_for_turn()
    result["cases"] = []
    for case in cases:
        if case not in first_s:
            save_memory(model, stack, case)
        figures = try_case(model, case, arguments.steps, profile=arguments.profile)
        if case in first_s:
            figures["first_s"] = first_s[case]
        print(json.dumps(result | {"cases": [figures], "partial": True}), flush=True)
        result["cases"].append(figures)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
