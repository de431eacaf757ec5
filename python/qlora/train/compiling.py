"""Whether a run's decoder layers are compiled (`compile_layers`), and the line that says so."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from qlora import regional_compile
from qlora.train.config import QloraArguments

# Compiling takes 10 to 25 s of the first steps; a pass of a Llama-3-8B is 0.2 s faster afterwards (H100, 2,048 to 8,192
# tokens), one of a smaller model less.
MIN_PASSES = 150
MIN_MINUTES = 3.0


def compile_layers(trainer: Any, arguments: QloraArguments, device: torch.device) -> str:
    """Has the layers of the trainer's model compiled where the arguments say so; returns what was decided and why."""
    reason = _reason_against(trainer, arguments, device)
    if arguments.compile_layers == "false":
        return "layers: eager (compile_layers false)"
    if arguments.compile_layers == "auto" and reason is not None:
        return f"layers: eager (compile_layers auto: {reason})"
    # Rows that packing cuts to max_length are all of one length; the graphs for one are a little faster than those for
    # any. Other packings fill rows with whole examples, as far as they fit.
    is_one_length = trainer.args.packing and trainer.args.packing_strategy == "wrapped"
    counts = regional_compile.compile_layers(
        trainer.model.get_base_model(), dynamic=None if is_one_length else True
    )
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"layers: {what} compiled at the first step, which takes 10 to 25 s longer"


def _reason_against(trainer: Any, arguments: QloraArguments, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if trainer.args.torch_compile:
        return "torch_compile compiles the whole model"
    if trainer.args.use_liger_kernel:
        return "use_liger_kernel has kernels of its own"
    if not regional_compile.repeated_layers(trainer.model.get_base_model()):
        return "the model has no list of equal layers"
    if arguments.max_minutes is not None and arguments.max_minutes < MIN_MINUTES:
        return f"max_minutes is less than {MIN_MINUTES:g}"
    passes = num_passes(trainer)
    if passes < MIN_PASSES:
        return f"{passes} forward passes are less than {MIN_PASSES}"
    return None


def num_passes(trainer: Any) -> int:
    """Forward and backward passes of the whole run on this process."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps * args.gradient_accumulation_steps)
    batch = args.per_device_train_batch_size * args.world_size
    return math.ceil(len(trainer.train_dataset) / batch * args.num_train_epochs)
