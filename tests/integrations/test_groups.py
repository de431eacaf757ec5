"""Groups of siblings in models of transformers: loading, compiling, generation, PEFT, accelerate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import logits, make_model, saved, tokens

import qlora
from assertions import assert_bitwise_equal
from operator_calls import GROUP, SINGLE, calls
from qlora.nn import Linear4bit, group, unlink_groups

LAYERS = 2  # of the tiny models; in each q, k, v and gate, up share an input, o and down have theirs


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "DEVICE_TYPES", ("cpu", "cuda"))
    monkeypatch.setattr(group, "MAX_ROWS", 64)  # the tokens of tiny_models and some
    torch._dynamo.reset()


def groups(model: torch.nn.Module) -> set[group.Group]:
    return {
        module._group[0]
        for module in model.modules()
        if isinstance(module, Linear4bit) and module._group is not None
    }


def load(directory: Path, name: str = "llama", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    path = saved(directory, name)
    config = qlora.QuantConfig(compute_dtype="float32")
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": "cpu"}, **options
    ).eval()


def without_groups(model: Any, function: Callable[[], Any]) -> Any:
    unlink_groups(model)
    try:
        return function()
    finally:
        qlora.nn.link_groups(model, in_compiled=True)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_a_loaded_decoder_makes_two_group_calls_a_layer(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    expected = without_groups(model, lambda: logits(model, name))
    assert len(groups(model)) == 2 * LAYERS
    assert calls(lambda: assert_bitwise_equal(logits(model, name), expected)) == (2 * LAYERS, 2 * LAYERS)
    assert not any(each.is_off or each.pending for each in groups(model))


@pytest.mark.usefixtures("enabled")
def test_a_saved_and_loaded_4bit_checkpoint_is_linked(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(tmp_path)
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"}).eval()
    assert calls(lambda: assert_bitwise_equal(logits(again), expected)) == (2 * LAYERS, 2 * LAYERS)


@pytest.mark.parametrize("name", ["t5", "gpt2", "phi", "mixtral"])
def test_models_whose_siblings_do_not_always_share_are_right(name: str) -> None:
    """T5's cross-attention gives key and value another input than query, and keeps them from the second token on."""
    model = qlora.quantize_(make_model(name))
    expected = without_groups(model, lambda: _generate(model))
    for _ in range(2):
        assert torch.equal(_generate(model), expected)
    if name == "t5":
        assert {each.is_off for each in groups(model)} == {True, False}


def _generate(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(
        input_ids=tokens(), do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options
    )


def test_generation_is_the_same_with_groups(tmp_path: Path) -> None:
    model = load(tmp_path)
    expected = without_groups(model, lambda: _generate(model))
    for cache in ("dynamic", "static"):
        assert torch.equal(_generate(model, cache_implementation=cache), expected)
    assert not any(each.is_off or each.pending for each in groups(model))


def test_a_decoding_step_compiles_once_to_two_nodes_a_layer(tmp_path: Path) -> None:
    from transformers import StaticCache

    model = load(tmp_path)
    nodes: list[Counter[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def decode(step: Callable[..., Any]) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids, results = tokens(), []
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            for position in range(20, 24):
                results.append(
                    step(
                        input_ids=ids[:, :1],
                        past_key_values=cache,
                        position_ids=torch.tensor([[position]]),
                        use_cache=True,
                    ).logits
                )
        return results

    expected = without_groups(model, lambda: decode(model))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    decode(compiled)  # dynamo learns that the position changes
    num_graphs = len(nodes)
    for actual, wanted in zip(decode(compiled), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert len(nodes) == num_graphs <= 2
    assert all((each[GROUP], each[SINGLE]) == (2 * LAYERS, 2 * LAYERS) for each in nodes)
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------------------------------------------------------------
def _with_lora(model: Any, targets: str | list[str] = "all-linear") -> Any:
    adapted = qlora.add_lora(model, r=4, targets=targets).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_compute_as_without_groups(targets: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = load(tmp_path)
    plain = logits(model)
    adapted = _with_lora(model, targets)
    expected = without_groups(model, lambda: logits(adapted))
    assert not torch.equal(expected, plain)
    for _ in range(2):
        assert_bitwise_equal(logits(adapted), expected)
    with adapted.disable_adapter():
        for _ in range(2):
            assert_bitwise_equal(logits(adapted), plain)


def test_disabled_and_merged_adapters_use_the_groups(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = load(tmp_path)
    plain = logits(model)
    adapted = _with_lora(model)
    assert calls(lambda: logits(adapted))[0] == 0
    counts = (2 * LAYERS, 2 * LAYERS)
    with adapted.disable_adapter():
        assert calls(lambda: assert_bitwise_equal(logits(adapted), plain)) == counts
    adapted.merge_adapter()
    expected = without_groups(model, lambda: logits(adapted))
    assert not torch.equal(expected, plain)
    assert calls(lambda: assert_bitwise_equal(logits(adapted), expected)) == counts
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert calls(lambda: assert_bitwise_equal(logits(adapted), plain)) == counts
    merged = adapted.merge_and_unload()
    assert calls(lambda: assert_bitwise_equal(logits(merged), expected)) == counts


def test_a_training_step_has_the_gradients_of_single_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = load(tmp_path)
    adapted = _with_lora(model, ["q_proj", "v_proj"]).train()

    def gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in adapted.named_parameters()
            if parameter.grad is not None
        }

    expected = without_groups(model, gradients)
    for name, gradient in gradients().items():
        assert_bitwise_equal(gradient, expected[name])


def test_dequantised_models_compute_without_groups(tmp_path: Path) -> None:
    model = load(tmp_path)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert calls(lambda: logits(model)) == (0, 0)


def test_hooks_of_accelerate_see_every_layer(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = load(tmp_path)
    expected = logits(model)
    for module in list(model.modules()):
        if isinstance(module, Linear4bit):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert calls(lambda: assert_bitwise_equal(logits(model), expected)) == (2 * LAYERS, 2 * LAYERS)
