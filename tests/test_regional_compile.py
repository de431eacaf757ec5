"""qlora.prepare(compile=True): the same numbers, one graph for all layers, and nothing else changed."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters, pair, tokens  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_same_tensors  # noqa: E402
from qlora.regional_compile import compile_layers, compiled_layers, uncompile_layers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
]
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "num_hidden_layers": 4}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
}


def make_model(
    kind: str = "llama", dtype: torch.dtype = torch.float32, targets: Any = "all-linear", **prepare: Any
) -> Any:
    """A tiny 4-bit model with non-zero adapters, in training mode; the same one at every call."""
    config, model, extra = MODELS[kind]
    torch.manual_seed(0)
    sizes = SIZES | {"use_cache": False} | extra
    base = getattr(transformers, model)(getattr(transformers, config)(**sizes)).to(dtype)
    made = qlora.add_lora(qlora.prepare(qlora.quantize_(base), **prepare), r=4, targets=targets).train()
    fill_adapters(made)
    return made


def loss_and_gradients(model: Any, length: int = 12, **inputs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = tokens(2, length)
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def assert_close(got: tuple[torch.Tensor, Any], expected: tuple[torch.Tensor, Any], bound: float) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=bound, atol=0)
    assert got[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert (got[1][name] - wanted).norm() <= bound * wanted.norm(), name


@contextlib.contextmanager
def counted_graphs() -> Iterator[list[int]]:
    """How many graphs are compiled meanwhile; none of the layers may break one."""
    counters.clear()
    count: list[int] = []
    yield count
    count.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_those_of_eager_layers_by_one_graph_for_a_kind(kind, checkpointing):
    model = make_model(kind, gradient_checkpointing=checkpointing)
    expected = loss_and_gradients(model)
    layers = model.get_base_model().model.layers
    assert compile_layers(model, backend="aot_eager") == {type(layers[0]).__name__: len(layers)}
    with counted_graphs() as graphs:
        got = loss_and_gradients(model)
    assert graphs[0] <= (2 if kind == "gemma2" else 1)  # every other layer attends to a window
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_ten_lengths_and_batches_take_two_graphs_at_most(dynamic):
    model = make_model()
    lengths = [12, 13, 20, 7, 31, 16, 24, 9, 40, 28]
    expected = [loss_and_gradients(model, length) for length in lengths]
    compile_layers(model, dynamic=dynamic, backend="aot_eager")
    with counted_graphs() as graphs:
        got = [loss_and_gradients(model, length) for length in lengths]
    assert graphs == [1 if dynamic else 2]
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-5)


def test_under_autocast_with_padding_and_with_packed_positions():
    model = make_model(dtype=torch.bfloat16)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    packed = torch.tensor([[*range(5), *range(7)]] * 2)
    for inputs, autocast in (({"attention_mask": mask}, True), ({"position_ids": packed}, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            uncompile_layers(model)
            expected = loss_and_gradients(model, **inputs)
            compile_layers(model, backend="aot_eager")
            assert_close(loss_and_gradients(model, **inputs), expected, 2**-6)
        assert compiled_layers(model)


def test_dropout_draws_the_same_numbers_when_a_layer_is_computed_again():
    model = make_model()
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleDict)
            and "default" in module
            and type(module["default"]) is nn.Identity
        ):
            module["default"] = nn.Dropout(0.5)
    compile_layers(model, backend="aot_eager")
    torch.manual_seed(7)
    loss, gradients = loss_and_gradients(model)
    step = 1e-2
    name, gradient = next((n, g) for n, g in gradients.items() if "layers.0.mlp.up_proj.lora_B" in n)
    direction = gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        model.get_parameter(name).data.add_(direction, alpha=sign * step)
        torch.manual_seed(7)
        values.append(loss_and_gradients(model)[0])
        model.get_parameter(name).data.sub_(direction, alpha=sign * step)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, gradient.norm(), rtol=2e-2, atol=1e-4)
    assert torch.isfinite(loss)


def test_any_other_checkpointing_function_is_called_around_the_layer():
    model = make_model()
    expected = loss_and_gradients(model)
    calls = []
    for layer in model.get_base_model().model.layers:
        plain = layer._gradient_checkpointing_func

        def mine(function, *args, plain=plain):
            calls.append(1)
            return plain(function, *args)

        layer._gradient_checkpointing_func = mine
    compile_layers(model, backend="aot_eager")
    with counted_graphs() as graphs:
        got = loss_and_gradients(model)
    assert len(calls) == 3 and graphs == [1]
    assert_close(got, expected, 1e-5)


def test_layers_prepared_again_in_any_order_are_one_graph():
    model = make_model()
    expected = loss_and_gradients(model)
    for checkpointing, budget in (
        ("offload", None),
        (True, "1GB"),
        (True, None),
        (False, None),
        ("offload", "1GB"),
    ):
        qlora.prepare(model, checkpointing, memory_budget=budget)
        compile_layers(model, backend="aot_eager")
        with counted_graphs() as graphs:
            got = [loss_and_gradients(model) for _ in range(3)]
        assert graphs[0] <= 2 and compiled_layers(
            model
        )  # those within a budget keep what others compute again
        for each in got:
            assert_close(each, expected, 1e-5)


def test_layers_that_are_compiled_already_keep_their_one_graph_when_prepared_again():
    model = make_model()
    compile_layers(model, backend="aot_eager")
    expected = loss_and_gradients(model)
    qlora.prepare(model, "offload", memory_budget="1GB")
    with counted_graphs() as graphs:
        got = [loss_and_gradients(model) for _ in range(2)]
    assert graphs[0] <= 2 and compiled_layers(model)
    for each in got:
        assert_close(each, expected, 1e-5)


def test_evaluation_and_generation_run_as_before():
    model = make_model()
    ids = tokens(2, 8)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits, answer = model.eval()(input_ids=ids).logits, model.generate(input_ids=ids, **options)
    compile_layers(model, backend="aot_eager")
    loss_and_gradients(model.train())
    with counted_graphs() as graphs, torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, logits)
        assert torch.equal(model.generate(input_ids=ids, **options), answer)
    assert graphs == [0]


def test_names_hooks_and_classes_stay_and_copies_are_as_before(tmp_path):
    model = make_model()
    names, layers = list(model.state_dict()), model.get_base_model().model.layers
    cls = type(layers[0])
    calls: list[int] = []
    layers[1].register_forward_hook(lambda *_: calls.append(1))
    compile_layers(model, backend="aot_eager")
    loss_and_gradients(model)
    assert list(model.state_dict()) == names and calls == [1]
    assert isinstance(layers[0], cls) and type(layers[0]) is not cls
    assert repr(type(layers[0])) == repr(cls)
    copies = [copy.deepcopy(layers[0])]
    copies += [
        pickle.loads(pickle.dumps(layers[0], protocol)) for protocol in (0, 2, pickle.DEFAULT_PROTOCOL)
    ]
    for copied in copies:
        assert type(copied) is cls
        assert_same_tensors(dict(copied.state_dict()), dict(layers[0].state_dict()))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    uncompile_layers(model)
    assert type(layers[0]) is cls and not compiled_layers(model)


def test_adapters_merge_after_compiled_training():
    model, other = make_model(), make_model()
    compile_layers(model, backend="aot_eager")
    for each in (model, other):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        ids = tokens(2, 12)
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert_close(
        (torch.tensor(0.0), {n: p.data for n, p in model.named_parameters() if p.requires_grad}),
        (torch.tensor(0.0), {n: p.data for n, p in other.named_parameters() if p.requires_grad}),
        1e-5,
    )
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    merged(input_ids=tokens())


def test_layers_that_nobody_trains_are_left_alone():
    model = make_model()
    compile_layers(model, backend="aot_eager")
    model.requires_grad_(False)
    with counted_graphs() as graphs:
        model(input_ids=tokens())
    assert graphs == [0]


def test_a_layer_that_cannot_be_traced_runs_as_before_and_says_so_once():
    model = make_model()
    expected = loss_and_gradients(model)

    class Untraceable(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return self.inner(x)

    for layer in model.get_base_model().model.layers:
        layer.mlp = Untraceable(layer.mlp)
    compile_layers(model, backend="aot_eager")
    with pytest.warns(UserWarning, match=r"layers of class LlamaDecoderLayer run without torch\.compile"):
        _, gradients = loss_and_gradients(model)
    assert compiled_layers(model) == {}
    assert_same_tensors({n.replace(".inner", ""): g for n, g in gradients.items()}, expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_gradients(model)


def test_a_layer_that_multiplies_by_a_4_bit_weight_itself_is_compiled():
    model = make_model(targets=["q_proj", "v_proj"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * F.linear(x, self.up_proj.weight))

    expected = loss_and_gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.get_base_model().model.layers[0].mlp), "forward", forward)
        assert_close(loss_and_gradients(model), expected, 1e-5)
        compile_layers(model, backend="aot_eager")
        assert_close(loss_and_gradients(model), expected, 1e-5)
    assert compiled_layers(model) == {"LlamaDecoderLayer": 3}


def test_a_cache_in_training_is_filled_by_eager_layers_with_a_warning():
    model = make_model(gradient_checkpointing=False)
    compile_layers(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="to fill a cache: pass use_cache=False"):
        output = model(input_ids=tokens(), use_cache=True)
    assert output.past_key_values.get_seq_length() == 12


def test_hooks_inside_a_layer_are_called_by_that_layer_and_keep_it_alone_from_compiled_code():
    expected, model = loss_and_gradients(make_model()), make_model()
    compile_layers(model, backend="aot_eager")
    loss_and_gradients(model)
    calls: list[int] = []
    attention = model.get_base_model().model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="modules inside them have hooks"):
        assert_close(loss_and_gradients(model), expected, 1e-5)
    assert calls == [1, 1] and compiled_layers(model) == {"LlamaDecoderLayer": 3}
    handle.remove()
    with counted_graphs() as graphs:
        assert_close(loss_and_gradients(model), expected, 1e-5)
    assert calls == [1, 1] and graphs == [0]


def test_prepare_takes_it_and_refuses_a_model_without_layers():
    assert compiled_layers(qlora.prepare(pair()[0], compile=True)) == {"LlamaDecoderLayer": 2}
    with pytest.raises(ValueError, match="compile: expected a model with a list of equal layers, got Linear"):
        qlora.prepare(nn.Linear(2, 2), gradient_checkpointing=False, compile=True)


def test_inductor_computes_the_same_and_the_last_product_only_once():
    """Of seven products six come again in the backward graph; what the seventh's gradient needs of it is kept."""
    products, codes = _compiled_products(make_model())
    assert products == {"forward": 7, "backward": 6}
    for code in codes:
        assert "lora_linear_4bit.default" not in code and "lora_linear_4bit_backward.default" not in code
        assert "rng_state" not in code


def test_a_last_product_without_an_adapter_is_not_computed_again():
    products, _ = _compiled_products(make_model(targets=["q_proj", "v_proj"]))
    assert products == {"forward": 7, "backward": 6}


def _compiled_products(model: Any) -> tuple[dict[str, int], list[str]]:
    """How many 4-bit products the two graphs of a layer call, and inductor's code, once the numbers are as in eager."""
    expected = loss_and_gradients(model)
    with counted_graphs() as graphs, torch._inductor.config.patch(fx_graph_cache=False):
        compile_layers(model)
        got, codes = run_and_get_code(loss_and_gradients, model)
    assert graphs == [1]
    assert_close(got, expected, 1e-5)
    forward, backward = sorted(codes, key=lambda code: "_backward.raw" in code or "_grad_input.raw" in code)
    counts = [
        len(re.findall(r"ops\.qlora\.(?:lora_)?linear_4bit\.raw\(", code)) for code in (forward, backward)
    ]
    return dict(zip(("forward", "backward"), counts, strict=True)), codes


def test_in_bfloat16_compiled_layers_are_no_farther_from_float32_than_eager_ones():
    model = make_model(dtype=torch.bfloat16)
    reference = make_model(dtype=torch.bfloat16).to(torch.float32)  # of the same rounded weights
    exact = loss_and_gradients(reference, length=32)
    distances = []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = loss_and_gradients(model, length=32)
        each = [(gradients[name] - wanted).norm() / wanted.norm() for name, wanted in exact[1].items()]
        distances.append(torch.stack(each).mean())
    assert distances[1] < 1.2 * distances[0] < 0.05
