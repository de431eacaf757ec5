"""Tiny random models of four architectures, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

NAMES = ("llama", "qwen2", "gpt2", "mixtral")

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_model(name: str = "llama", **settings: Any) -> Any:
    """A model with the same weights on every call."""
    import transformers

    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_COMMON, **settings})).eval()
    if name == "qwen2":
        config = transformers.Qwen2Config(**{**_COMMON, "tie_word_embeddings": True, **settings})
        return transformers.Qwen2ForCausalLM(config).eval()
    if name == "gpt2":
        small = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**small, **ends, **settings})).eval()
    assert name == "mixtral"
    config = transformers.MixtralConfig(**{**_COMMON, "num_local_experts": 4, **settings})
    return transformers.MixtralForCausalLM(config).eval()


def tokens(device: str = "cpu") -> torch.Tensor:
    return torch.arange(3, 23, device=device)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(model.device.type)).logits


def saved(directory: Path, name: str = "llama", **settings: Any) -> str:
    """A checkpoint of such a model; its path."""
    path = directory / f"dense-{name}"
    make_model(name, **settings).save_pretrained(path)
    return str(path)


def run_python(code: str, *arguments: str, without: tuple[str, ...] = (), check: bool = True) -> str:
    """Output of `code` in a fresh interpreter that cannot import the packages in `without`."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    sources = [str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*sources, *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}{code}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout if check else done.stdout + done.stderr
