"""The lean feed-forward part: the same gradients, tile by tile, with less computed and less held."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters, pair, tokens
from torch import Tensor, nn

import qlora
from qlora.checkpointing import layer_checkpoints, use_checkpoints
from qlora.estimate.timeline import Timeline
from qlora.lean_mlp import LeanMlps
from qlora.nn.linear import Linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")


def adapted(base: Any, lean: LeanMlps | None, **lora: Any) -> Any:
    base = qlora.prepare(base)
    if lean is not None:
        use_checkpoints(base, partial(layer_checkpoints, is_offloaded=False, lean=lean))
    model = qlora.add_lora(base, r=4, **lora).train()
    fill_adapters(model)
    return model


def gradients(model: Any, ids: Tensor | None = None, retain_graph: bool = False) -> dict[str, Tensor]:
    ids = tokens() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    if retain_graph:
        loss.backward(retain_graph=True)
        model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], factor: int = 64) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        bound = factor * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (found[name] - expected).abs().max() <= bound, name


@pytest.mark.parametrize("lora", [{}, {"targets": ["q_proj", "v_proj"]}, {"alpha": 9}], ids=str)
@pytest.mark.parametrize("tile", [4096, 24, 7, 1])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_are_those_of_plain_checkpointing(kind: str, tile: int, lora: dict[str, Any]) -> None:
    wanted = gradients(adapted(pair(kind)[0], None, **lora))
    lean = LeanMlps(tile)
    model = adapted(pair(kind)[0], lean, **lora)
    for each in (model, copy.deepcopy(model)):
        for retain_graph in (False, True):
            assert_close(gradients(each, retain_graph=retain_graph), wanted)
    assert lean.is_useful


def test_each_part_is_computed_twice_and_the_last_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(pair()[0], LeanMlps(8))
    mlp = model.base_model.model.model.layers[0].mlp
    activations: list[int] = []
    mlp.act_fn.register_forward_hook(lambda _, __, result: activations.append(len(result)))
    results: list[bool] = []
    product = Linear4bit.forward_with_lora

    def spy(layer: Linear4bit, *args: Any) -> Tensor:
        if layer is mlp.down_proj.base_layer:
            results.append(layer.has_result)
        return product(layer, *args)

    monkeypatch.setattr(Linear4bit, "forward_with_lora", spy)
    gradients(model)
    assert activations == [8, 8, 8] * 2
    assert results == [True] * 3 + [False] * 3
    assert mlp.down_proj.base_layer.has_result


def test_a_model_with_a_norm_behind_it_goes_back_to_ordinary_recomputation() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    def gemma() -> Any:
        torch.manual_seed(0)
        config = Gemma2Config(
            **dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16),
            **dict(num_attention_heads=4, num_key_value_heads=2),
        )
        return qlora.quantize_(Gemma2ForCausalLM(config))

    wanted, lean = gradients(adapted(gemma(), None)), LeanMlps()
    model = adapted(gemma(), lean)
    assert_close(gradients(model), wanted, 256)
    assert not lean.is_useful
    assert_close(gradients(model), wanted, 256)


def test_dropout_leaves_it_as_it_is() -> None:
    lean = LeanMlps(8)
    plain, model = (adapted(pair()[0], each, dropout=0.5) for each in (None, lean))
    found = []
    for each in (plain, model):
        torch.manual_seed(5)
        found.append(gradients(each))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("name", ["DoRA", "IA3", "PVeRA"])
def test_adapters_that_read_the_result_or_draw_are_recomputed_in_the_ordinary_way(name: str) -> None:
    import peft

    targets = ["up_proj", "down_proj"]
    configs = {
        "DoRA": lambda: peft.LoraConfig(r=4, target_modules=targets, use_dora=True),
        "IA3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=targets),  # draws in every pass
    }
    found = []
    for lean in (None, LeanMlps(8)):
        base = qlora.prepare(pair()[0])
        if lean is not None:
            use_checkpoints(base, partial(layer_checkpoints, is_offloaded=False, lean=lean))
        torch.manual_seed(3)
        model = peft.get_peft_model(base, configs[name]()).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
        torch.manual_seed(5)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


def test_dropout_that_is_no_module_leaves_it_as_it_is() -> None:
    from transformers import SeedOssConfig, SeedOssForCausalLM

    def seed_oss() -> Any:
        torch.manual_seed(0)
        config = SeedOssConfig(
            **dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16),
            **dict(num_attention_heads=4, num_key_value_heads=2, residual_dropout=0.5),
        )
        return qlora.quantize_(SeedOssForCausalLM(config))

    found = []
    for lean in (None, LeanMlps(8)):
        model = adapted(seed_oss(), lean)
        torch.manual_seed(5)
        found.append(gradients(model))
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


def test_merged_adapters_have_no_gradient() -> None:
    found = []
    for lean in (None, LeanMlps(8)):
        model = adapted(pair()[0], lean)
        model.base_model.model.model.layers[1].mlp.up_proj.merge()
        found.append(gradients(model))
    assert not any("1.mlp.up_proj" in name for name in found[1])
    assert_close(found[1], found[0])


def test_hooks_see_the_result_and_a_replaced_forward_stays() -> None:
    model = adapted(pair()[0], LeanMlps(8))
    seen: list[Tensor] = []
    layer = model.base_model.model.model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda _, __, result: seen.append(result.detach().clone()))
    gradients(model)
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert torch.allclose(first, again, rtol=1e-5, atol=1e-5)
    replaced = layer.mlp.forward = lambda x: x
    LeanMlps().take([layer])
    assert layer.mlp.forward is replaced


def test_tiles_hold_less() -> None:
    """Of six tensors as wide as the feed-forward part, a twentieth, and the narrow ones beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def peak(lean: LeanMlps | None) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            **dict(vocab_size=32, hidden_size=32, intermediate_size=512, num_hidden_layers=2),
            **dict(num_attention_heads=2, num_key_value_heads=2),
        )
        model = adapted(qlora.quantize_(LlamaForCausalLM(config)), lean)
        with Timeline() as timeline:
            gradients(model, torch.arange(640).view(1, 640) % 32)
        return timeline.peak().num_bytes

    wide = 640 * 512 * 4
    assert peak(None) > 6 * wide
    assert peak(LeanMlps(32)) < 2 * wide


def test_only_gated_parts_under_a_checkpoint_are_touched() -> None:
    lean = LeanMlps()
    other = nn.Module()
    other.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    lean.take([other])
    assert "forward" not in other.mlp.__dict__
    model = adapted(pair()[0], lean)
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
    assert torch.equal(found, adapted(pair()[0], None)(input_ids=tokens()).logits)
    model.get_base_model().gradient_checkpointing_disable()
    assert_close(gradients(model), gradients(adapted(pair()[0], None)))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [4096, 128])
def test_gradients_on_a_gpu(tile: int) -> None:
    """In bfloat16, where the adapter's product is rounded by another kernel and sums are split."""

    def on_gpu(lean: LeanMlps | None) -> Any:
        model = adapted(pair(dtype=torch.bfloat16)[0].to("cuda"), lean)
        return model.to("cuda")

    ids = tokens(4, 64).to("cuda")
    wanted, found = gradients(on_gpu(None), ids), gradients(on_gpu(LeanMlps(tile)), ids)
    for name, expected in wanted.items():
        bound = 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert (found[name] - expected).abs().max() <= bound, name
