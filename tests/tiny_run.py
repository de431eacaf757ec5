"""A tiny random Llama with a byte tokenizer, data for it and runs of the command on both; no hub, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def write_model(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Saves a 2-layer Llama of random weights and a tokenizer with one token a byte."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return directory


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = chat_template
    return fast


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def additions(count: int) -> list[dict[str, str]]:
    """prompt/completion rows of several lengths."""
    return [{"prompt": f"{n} plus {n * n} is ", "completion": f"{n + n * n}"} for n in range(count)]


def run_in_process(*arguments: str | Path) -> int:
    from qlora.cli import main

    return main([str(argument) for argument in arguments])


def run_script(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, with the same package and a single thread."""
    source = str(Path(__file__).parent.parent / "python")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if any(Path(entry).resolve() == Path(source) for entry in sys.path if entry):
        environment["PYTHONPATH"] = source
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
