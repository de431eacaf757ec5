"""The estimate beside torch.cuda.max_memory_allocated of the same step on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qlora

pytest.importorskip("peft")

BATCH, SEQ = 4, 1024


def llama() -> Any:
    """A configuration whose activations, not fixed workspaces, are most of the peak."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )


def measured_peak() -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        dense = AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16)
    model = qlora.add_lora(qlora.prepare(qlora.quantize_(dense)), r=16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(4, 32000, (BATCH, SEQ), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_allocators_peak_is_within_a_tenth() -> None:
    """Workspaces are bounds: a kernel that needs less leaves the estimate above."""
    before = torch.cuda.memory_allocated()
    found = qlora.estimate_memory(llama(), seq=SEQ, batch=BATCH, gradient_accumulation=1)
    assert measured_peak() - before == pytest.approx(found.peak, rel=0.1)
