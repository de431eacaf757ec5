"""LoRA layers as one operator a pass: with dropout, with several adapters, and what the operator does not serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft", reason="peft is not installed")

from lora_models import fill_adapters  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_close_by_depth  # noqa: E402

K, N = 64, 96
FORWARD, BACKWARD = "qlora::lora_linear_4bit", "qlora::lora_linear_4bit_backward"


class Operators(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def layers(*adapters: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    """The same LoRA layer with these adapters, all active, over 4 bits and over the dequantised weight."""
    torch.manual_seed(0)
    quantized = qlora.quantize_(nn.Sequential(nn.Linear(K, N, dtype=dtype)))
    dense = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    dense[0].weight.data.copy_(quantized[0].dequantize(dtype))
    dense[0].bias.data.copy_(quantized[0].bias.data)
    made = []
    for model in (quantized, dense):
        names = [f"adapter{index}" for index in range(len(adapters))]
        settings = [
            LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0"], **adapter})
            for adapter in adapters
        ]
        wrapped = get_peft_model(model, settings[0], adapter_name=names[0])
        for name, setting in zip(names[1:], settings[1:], strict=True):
            wrapped.add_adapter(name, setting)
        fill_adapters(wrapped)
        wrapped.base_model.set_adapter(names)
        made.append(wrapped.base_model.model[0].train())
    return made


def results(layer: Any, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, int]]:
    """Output, gradients of input and adapters, and how often each operator was called; always the same masks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, K, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, N, generator=generator).to(dtype)
    parameters = [parameter for _, parameter in sorted(layer.named_parameters()) if parameter.requires_grad]
    torch.manual_seed(2)
    with Operators() as called:
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *parameters], grad)
    return [y, *gradients], called.counts


CASES = {
    "plain": [{}],
    "rslora": [{"use_rslora": True, "r": 9}],
    "dropout": [{"lora_dropout": 0.3}],
    "two": [{}, {"r": 7, "lora_alpha": 3}],
    "dropout, plain, plain": [{"lora_dropout": 0.3}, {"r": 2}, {"r": 7, "lora_alpha": 3}],
    "dropout twice": [{"lora_dropout": 0.3}, {"lora_dropout": 0.6, "r": 3}],
    "more than the operator takes together": [{"r": 200}, {"r": 100}],
    "more than the operator takes": [{"r": 300}],
    "bias": [{"lora_bias": True}, {}],
}
UNSERVED = ("more than the operator takes",)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_equal_peft_on_the_dequantised_weight(name: str) -> None:
    ours, theirs = layers(*CASES[name])
    got, counts = results(ours)
    expected, _ = results(theirs)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close_by_depth(one, other, factor=4)
    is_served = name not in UNSERVED
    assert counts.get(FORWARD, 0) == counts.get(BACKWARD, 0) == int(is_served)


@pytest.mark.parametrize("name", ["plain", "two", "dropout"])
def test_a_bfloat16_layer_makes_no_products_of_its_own(name: str) -> None:
    ours, theirs = layers(*CASES[name], dtype=torch.bfloat16)
    got, counts = results(ours, torch.bfloat16)
    assert not {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"} & counts.keys()
    for one, other in zip(got, results(theirs, torch.bfloat16)[0], strict=True):
        assert_close_by_depth(one, other, torch.bfloat16)


def test_gradients_of_float32_adapters_are_not_rounded_to_the_dtype_of_the_layer() -> None:
    ours, _ = layers({}, dtype=torch.bfloat16)
    ours.float()  # the adapter; the weight is bytes
    _, *gradients = results(ours, torch.bfloat16)[0]
    for gradient in gradients[1:]:
        assert gradient.dtype is torch.float32
        assert (gradient != gradient.bfloat16().float()).any()


def test_the_compiled_layer_has_the_operator_in_its_graph() -> None:
    ours, _ = layers({"lora_dropout": 0.0})
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(2, 5, K)
    expected = ours(x)
    got = torch.compile(ours, fullgraph=True, backend=keep)(x)
    torch.testing.assert_close(got, expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count("qlora.lora_linear_4bit.default") == 1
    assert not any("matmul" in target or "addmm" in target for target in targets)
