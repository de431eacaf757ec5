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


def random_model(stack: str, result: dict[str, Any], config: Any = None, device: int | str = "cuda:0") -> Any:
    """A model of random weights, made on its device without a checkpoint and converted there; of llama3_8b_config if None.

    Raises:
        ValueError: stack is neither "qlora" nor "bf16": the others load checkpoints.
    """
    from transformers import AutoModelForCausalLM

    if stack not in ("qlora", "bf16"):
        raise ValueError(
            f"random_model: stack: expected 'qlora' or 'bf16', got {stack!r}, which needs a checkpoint"
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config or llama3_8b_config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if stack == "qlora":
        import qlora

        qlora.quantize_(model)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        result["model_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    return model


def load_model(stack: str, directory: Path, result: dict[str, Any], device: int | str = "cuda:0") -> Any:
    """The checkpoint as the stack loads it, in NF4 with double quantisation but for "bf16".

    Load time, memory and the class of a linear layer go into `result`; memory only where `device` is a GPU.
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
    is_gpu = torch.device(device).type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantization_config,
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation="sdpa",
    )
    if is_gpu:
        torch.cuda.synchronize()
        result["load_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["model_gb"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    result["load_s"] = round(time.perf_counter() - start, 2)
    layer = type(model.get_submodule("model.layers.0.self_attn.q_proj"))
    result["layer"] = f"{layer.__module__}.{layer.__qualname__}"
    return model
