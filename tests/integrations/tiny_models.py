"""Tiny random models of many architectures, their inputs, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

#: Decoders that stand for what differs in loading and saving: biases and tied weights, Conv1D, experts.
NAMES = ("llama", "qwen2", "gpt2", "mixtral")

#: The models of docs/models.md.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "t5", "qwen2_vl")

# Rows are whole blocks: the CPU code of bitsandbytes, compared with, takes the scales of others wrong.
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    **_ENDS,
}
_IMAGE_TOKEN, _VISION_START, _VISION_END = 250, 251, 252
_QWEN2_VL = {
    "text_config": {
        **_DECODER,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "image_token_id": _IMAGE_TOKEN,
    "vision_start_token_id": _VISION_START,
    "vision_end_token_id": _VISION_END,
}
# Name -> prefix of the configuration's class, the model's class, settings.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", _DECODER),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "mistral": ("Mistral", "MistralForCausalLM", _DECODER),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    "gemma": ("Gemma", "GemmaForCausalLM", {**_DECODER, "head_dim": 16}),
    "phi": ("Phi", "PhiForCausalLM", {**_DECODER, "num_key_value_heads": 4}),
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, **_ENDS},
    ),
    "t5": (
        "T5",
        "T5ForConditionalGeneration",
        {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "qwen2_vl": ("Qwen2VL", "Qwen2VLForConditionalGeneration", _QWEN2_VL),
}


def model_class(name: str) -> Any:
    import transformers

    return getattr(transformers, _MODELS[name][1])


def make_model(name: str = "llama", **settings: Any) -> Any:
    """A model with the same weights on every call, no bias of them zero."""
    import transformers

    prefix, _, common = _MODELS[name]
    torch.manual_seed(0)
    model = model_class(name)(getattr(transformers, f"{prefix}Config")(**{**common, **settings})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.normal_(std=0.02)
    return model


def tokens(device: str = "cpu") -> torch.Tensor:
    return torch.arange(3, 23, device=device)[None]


def inputs(name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What the model's generate takes; an image of 4 x 4 patches for a vision-language model."""
    ids = tokens(device)
    if name != "qwen2_vl":
        return {"input_ids": ids}
    image = torch.tensor([[_VISION_START, *[_IMAGE_TOKEN] * 4, _VISION_END]], device=device)
    ids = torch.cat([ids[:, :3], image, ids[:, 3:]], 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == _IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)).to(device),
        "image_grid_thw": torch.tensor([[1, 4, 4]], device=device),
    }


def training_inputs(name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The same with labels, as the model's forward takes it."""
    given = inputs(name, device)
    labels = given["input_ids"]
    return {**given, "labels": torch.where(labels == _IMAGE_TOKEN, -100, labels)}


def logits(model: Any, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**training_inputs(name, model.device.type)).logits


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
