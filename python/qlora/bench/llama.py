"""The model that `qlora bench train` and `qlora bench generate` measure, as each stack loads it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

STACKS = ("qlora", "bitsandbytes", "bf16")


def llama3_8b_config(num_layers: int = 32) -> Any:
    """transformers' configuration of Llama-3-8B's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def make_llama3_8b(directory: Path, num_layers: int = 32) -> None:
    """Writes a random bf16 checkpoint of Llama-3-8B's shape (16 GB with 32 layers) through transformers itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(llama3_8b_config(num_layers), dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="2GB")


def load_model(stack: str, source: Any, result: dict[str, Any], device: int | str = "cuda:0") -> Any:
    """A model as the stack loads it, in NF4 with double quantisation but for "bf16".

    Args:
        stack: one of STACKS.
        source: a checkpoint's directory; or a configuration, whose model of random weights is loaded from the device.
        result: load time, memory and the class of a linear layer go into it; memory only where `device` is a GPU.
        device: where the model is to be.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization_config: Any = None
    if stack == "qlora":
        import qlora

        quantization_config = qlora.QuantConfig()
    elif stack == "bitsandbytes":
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    settings = {
        "quantization_config": quantization_config,
        "dtype": torch.bfloat16,
        "device_map": {"": device},
        "attn_implementation": "sdpa",
    }
    is_gpu = torch.device(device).type == "cuda"
    if not isinstance(source, Path):
        model = _random_model(source, device, settings)
    else:
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
        if is_gpu:
            torch.cuda.synchronize()
            result["load_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["load_s"] = round(time.perf_counter() - start, 2)
    if is_gpu:
        torch.cuda.empty_cache()
        result["model_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    layer = type(model.get_submodule("model.layers.0.self_attn.q_proj"))
    result["layer"] = f"{layer.__module__}.{layer.__qualname__}"
    return model


def _random_model(config: Any, device: int | str, settings: dict[str, Any]) -> Any:
    """Made on the device, and where it is to be quantised loaded from there by the stack's own from_pretrained."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=settings["dtype"], attn_implementation=settings["attn_implementation"]
        )
    if settings["quantization_config"] is None:
        return model
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **settings)
