"""What `qlora train` does with no arguments: SmolLM2-135M learns to write Python docstrings."""

from __future__ import annotations

import random
from typing import Any

import torch

from qlora.train import docstrings

# Sequences up to this length are used: 70 % of the pairs, and two thirds of the compute a pair of all of them.
MAX_TOKENS = 128
HELD_OUT_EXAMPLES = 96
SEED = 0


def settings(device: torch.device) -> dict[str, Any]:
    """Defaults of the built-in data, by device."""
    common = {
        "max_length": 256,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 8,
        "lora_r": 16,
        "lora_alpha": 32,
        "eval_samples": HELD_OUT_EXAMPLES,
        "num_samples": 4,
        "sample_tokens": 32,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "group_by_length",
        "weight_decay": 0.0,
        "seed": SEED,
    }
    if device.type == "cuda":
        return common | {
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 32,
            "max_steps": 120,
            "logging_steps": 10,
            "save_steps": 60,
            "max_minutes": 0.9,
        }
    return common | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 8,
        "max_steps": 40,
        "logging_steps": 4,
        "save_steps": 20,
        "max_minutes": 5.5,
    }


def examples(tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out examples for TRL, in a fixed shuffled order.

    A held-out pair whose docstring also occurs in a training module is left out: it could be learnt by heart.
    """
    pairs = docstrings.pairs()
    learnt = {pair.docstring for pair in pairs if not pair.held_out}
    train = [pair for pair in pairs if not pair.held_out]
    held_out = [pair for pair in pairs if pair.held_out and pair.docstring not in learnt]
    chosen = []
    for part in (train, held_out):
        fitting = [pair for pair in part if _fits(pair, tokenizer)]
        random.Random(SEED).shuffle(fitting)
        has_template = bool(tokenizer.chat_template)
        chosen.append([docstrings.as_example(pair, has_template=has_template) for pair in fitting])
    return chosen[0], chosen[1]


def _fits(pair: docstrings.Pair, tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return len(tokenizer(pair.source + pair.docstring)["input_ids"]) <= MAX_TOKENS
    example = docstrings.as_example(pair)
    text = tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= MAX_TOKENS
