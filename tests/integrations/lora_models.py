"""Tiny random language models for the PEFT tests: a 4-bit one and the 16- or 32-bit one with the same values."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import qlora
from qlora.integrations.peft import LoraLinear4bit

VOCABULARY = 160
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32):
    """Random weights; Qwen2's attention has biases, which are made non-zero."""
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.02)
    return model.to(dtype).eval()


def pair(kind: str = "llama", dtype: torch.dtype = torch.float32, **config):
    """(4-bit model, dense model of the dequantised values), both of `dtype`."""
    quantized = qlora.quantize_(tiny_model(kind, dtype), qlora.QuantConfig(**config))
    dense = qlora.dequantize_(copy.deepcopy(quantized), dtype)
    return quantized, dense


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def fill_adapters(model, seed: int = 2, scale: float = 0.05) -> None:
    """Non-zero values in every adapter weight, the same for models with the same parameter names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in ("lora_A", "lora_B", "lora_embedding_")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def lora_layers(model) -> dict[str, LoraLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}


def packed_weights(model) -> dict[str, torch.Tensor]:
    """Every tensor of every 4-bit layer, copied."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and (".weight" in name or ".bias" in name)
    }
