"""The model to train: loaded, quantised while loading, with an adapter on it."""

from __future__ import annotations

from typing import Any

import torch

from qlora.train.config import ConfigError, QloraArguments


def pick_device(use_cpu: bool) -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    return torch.device("cuda", PartialState().local_process_index % torch.cuda.device_count())


def default_dtype(device: torch.device) -> str:
    """bfloat16 where the device computes in it, float16 on older GPUs, float32 on other CPUs."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if _cpu_computes_bfloat16() else "float32"


def _cpu_computes_bfloat16() -> bool:
    """AVX512-BF16 or AMX; without them torch emulates bfloat16 at a fraction of float32's speed."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_name_or_path: cannot load the tokenizer of {name!r}: {_first_line(error)}"
        ) from error


def load_model(
    name: str, arguments: QloraArguments, *, device: torch.device, dtype: str, trust_remote_code: bool
) -> Any:
    """A causal language model on `device`, its linear layers in 4 bits unless `load_in_4bit` is off."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "revision": arguments.model_revision or "main",
        "dtype": getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if device.type == "cuda":
        options["device_map"] = {"": device.index or 0}
    if arguments.load_in_4bit:
        import qlora

        options["quantization_config"] = qlora.QuantConfig(
            quant_type=arguments.quant_type,
            block_size=arguments.block_size,
            double_quant=arguments.double_quant,
            compute_dtype=dtype,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise ConfigError(f"model_name_or_path: cannot load {name!r}: {_first_line(error)}") from error


def add_adapter(model: Any, arguments: QloraArguments) -> Any:
    """The model with a fresh LoRA adapter; nothing else is trainable."""
    from qlora.lora import add_lora
    from qlora.preparation import prepare

    # Plain checkpointing the trainer enables itself, where its arguments say so.
    checkpointing: Any = arguments.memory_budget is not None
    if arguments.checkpointing_offload:
        checkpointing = "offload"
    try:
        model = prepare(
            model,
            checkpointing,
            memory_budget=arguments.memory_budget,
            embedding_offload=arguments.embedding_offload,
        )
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("qlora.prepare: ")) from error
    targets = arguments.lora_target_modules
    extra: dict[str, Any] = {}
    if arguments.lora_modules_to_save is not None:
        extra["modules_to_save"] = arguments.lora_modules_to_save
    return add_lora(
        model,
        r=arguments.lora_r,
        alpha=arguments.lora_alpha,
        targets="all-linear" if targets == ["all-linear"] else targets,
        dropout=arguments.lora_dropout,
        rslora=arguments.use_rslora,
        dora=arguments.use_dora,
        **extra,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
