"""Input embeddings in host memory: the same rows, saved and generated from as ever."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import pair, tiny_model, tokens

import qlora

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")


def test_on_a_cpu_nothing_moves() -> None:
    model = pair()[0]
    weight = model.model.embed_tokens.weight
    address = weight.data_ptr()
    qlora.prepare(model, embedding_offload=True)
    assert model.model.embed_tokens.weight is weight and weight.data_ptr() == address


def test_tied_trained_and_4_bit_embeddings_are_refused() -> None:
    tied = tiny_model()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(ValueError, match="expected a head of its own, got one tied to the input embeddings"):
        qlora.prepare(tied, embedding_offload=True)
    trained = qlora.add_lora(tiny_model(), r=2)
    trained.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="expected frozen input embeddings, got trained ones"):
        qlora.prepare(trained, embedding_offload=True)
    with_adapter = qlora.add_lora(tiny_model(), r=2, targets=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="without an adapter and not in 4 bits, got Embedding"):
        qlora.prepare(with_adapter, embedding_offload=True)
    quantized = tiny_model()
    quantized.model.embed_tokens = qlora.nn.Embedding4bit(160, 64)
    with pytest.raises(ValueError, match="got Embedding4bit"):
        qlora.prepare(quantized, embedding_offload=True)


def on_gpu(**kwargs: Any) -> Any:
    return qlora.prepare(pair(dtype=torch.bfloat16)[0].to("cuda"), **kwargs)


@pytest.mark.gpu
def test_the_gpu_reads_the_rows_and_holds_no_table() -> None:
    plain, model = on_gpu(), on_gpu()
    held = torch.cuda.memory_allocated()
    assert qlora.prepare(model, embedding_offload=True) is model
    table = 160 * 64 * 2
    assert held - torch.cuda.memory_allocated() == -(-table // 512) * 512
    weight = model.model.embed_tokens.weight
    assert weight.is_cuda and not weight.requires_grad
    ids = tokens(4, 40).to("cuda")
    for each in (model, qlora.prepare(model, embedding_offload=True)):
        assert torch.equal(each.model.embed_tokens(ids), plain.model.embed_tokens(ids))
        assert torch.equal(each(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.gpu
def test_saving_generating_and_training_are_as_before(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain, model = on_gpu(), on_gpu(embedding_offload=True)
    ids = tokens().to("cuda")
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.embed_tokens.weight.cpu(), plain.model.embed_tokens.weight.cpu())
    moved = model.state_dict()["model.embed_tokens.weight"].to("cpu")
    assert torch.equal(moved, plain.model.embed_tokens.weight.cpu())
    adapted = qlora.add_lora(model, r=4).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.gpu
def test_the_table_is_unlocked_when_the_model_goes() -> None:
    from qlora.embedding_offload import _HostTable

    before = set(_HostTable.addresses)
    model = on_gpu(embedding_offload=True)
    assert len(_HostTable.addresses) == len(before) + 1
    del model
    import gc

    gc.collect()
    assert _HostTable.addresses == before
