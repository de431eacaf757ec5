"""Groups of layers that share their input, under torch.compile."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from group_cases import Attention, alone, assert_close, group_of, make_attention
from layer_cases import randn
from torch import Tensor

from assertions import assert_bitwise_equal
from operator_calls import GROUP, SINGLE
from qlora.nn import group, link_groups, unlink_groups


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "DEVICE_TYPES", ("cpu", "cuda"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make_linked(device: str = "cpu") -> Attention:
    model = make_attention(device)
    link_groups(model, in_compiled=True)
    return model


def _names(graph: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def test_compiles_to_one_node_in_one_graph_that_is_not_compiled_again(device: str) -> None:
    model = make_linked(device)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for seed in range(3):
            x = randn(2, 128, seed=seed, device=device)
            assert_close(compiled(x), alone(model, x), device)
            assert_close(model(x), alone(model, x), device)  # eager calls in between
    assert len(graphs) == 1
    names = _names(graphs[0])
    assert (names[GROUP], names[SINGLE]) == (1, 0)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert group_of(model).pending is None


def test_compiles_for_training_to_single_nodes() -> None:
    model = make_linked()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = randn(2, 128, seed=4).requires_grad_()
    compiled(x).sum().backward()
    actual, x.grad = x.grad, None
    unlink_groups(model)
    model(x).sum().backward()
    assert actual is not None
    assert_bitwise_equal(actual, x.grad)


def test_a_graph_break_between_siblings_changes_no_result() -> None:
    model = make_linked()

    @torch.compiler.disable
    def change(x: Tensor) -> Tensor:
        return x

    model.change = change
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            x = randn(2, 128, seed=seed)
            assert_bitwise_equal(compiled(x), alone(model, x))


def test_compiled_siblings_with_other_inputs_compute_alone() -> None:
    model = make_linked()
    model.change = torch.neg
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            x = randn(2, 128, seed=seed)
            assert_bitwise_equal(compiled(x), alone(model, x))
    assert group_of(model).is_off


def test_unless_asked_for_compiled_layers_compute_alone() -> None:
    """A write to the input between siblings is not seen there, in one graph or between two."""
    model = make_attention()
    model.change = lambda x: x.mul_(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_bitwise_equal(compiled(randn(2, 128, seed=1)), alone(model, randn(2, 128, seed=1)))
    first, second = (torch.compile(layer, backend="aot_eager") for layer in (model.q_proj, model.k_proj))
    unlinked = copy.deepcopy(model)
    x = randn(2, 128, seed=2)
    with torch.no_grad():
        first(x)
        assert_bitwise_equal(second(x.mul_(3)), unlinked.k_proj(x))
    assert group_of(model).pending is None


def test_exports_with_a_dynamic_batch() -> None:
    model = make_linked()
    with torch.no_grad():
        exported = torch.export.export(
            model, (randn(2, 128, seed=1),), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},)
        )
        x = randn(40, 128, seed=2)
        assert_bitwise_equal(exported.module()(x), alone(model, x))
