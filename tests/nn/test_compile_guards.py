"""What torch.compile looks at before it runs a compiled layer again, and that it sees every change of one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from layer_cases import randn
from torch import Tensor
from torch._dynamo.guards import CheckFunctionManager

from assertions import assert_bitwise_equal
from qlora.nn import Linear4bit, Params4bit, function
from qlora.nn.tensor import quantize_tensor

SHAPE = (64, 128)

Change = Callable[[Linear4bit], object]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make(seed: int = 0) -> Linear4bit:
    layer = Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type="nf4")
    layer.weight = Params4bit(randn(*SHAPE, seed=seed), quant_type="nf4")
    return layer.to("cpu")


def _replace_scales(layer: Linear4bit) -> None:
    layer.weight.quant_state.absmax = make(1).weight.quant_state.absmax


def _replace_nested_scales(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2.absmax = layer.weight.quant_state.state2.absmax * 3


def _replace_offset(layer: Linear4bit) -> None:
    layer.weight.quant_state.offset = layer.weight.quant_state.offset + 1


def _write_nested_scales(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2.absmax.mul_(3)


def _replace_nested_state(layer: Linear4bit) -> None:
    layer.weight.quant_state.state2 = make(1).weight.quant_state.state2


def _replace_state(layer: Linear4bit) -> None:
    layer.weight.quant_state = make(1).weight.quant_state


def _replace_weight(layer: Linear4bit) -> None:
    layer.weight = make(1).weight


def _replace_weight_behind_its_back(layer: Linear4bit) -> None:
    layer._parameters["weight"] = make(1).weight


def _load(layer: Linear4bit) -> None:
    layer.load_state_dict(make(1).state_dict())


def _load_values(layer: Linear4bit) -> None:
    layer.load_state_dict({"weight": randn(*SHAPE, seed=2)})


def _other_blocks(layer: Linear4bit) -> None:
    layer.weight = Params4bit(randn(*SHAPE, seed=3), quant_type="fp4", blocksize=128).to("cpu")


def _plain_scales(layer: Linear4bit) -> None:
    layer.weight = Params4bit(randn(*SHAPE, seed=3), quant_type="nf4", compress_statistics=False).to("cpu")


CHANGES = (
    _replace_scales,
    _replace_nested_scales,
    _replace_offset,
    _write_nested_scales,
    _replace_nested_state,
    _replace_state,
    _replace_weight,
    _replace_weight_behind_its_back,
    _load,
    _load_values,
    _other_blocks,
    _plain_scales,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_compiled_layer_sees_every_change_of_its_weight(change: Change) -> None:
    layer, x = make(), randn(3, SHAPE[1], seed=9)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            before = compiled(x)
        change(layer)
        expected = layer(x)
        assert not torch.equal(before, expected)
        for _ in range(3):
            assert_bitwise_equal(compiled(x), expected)


def test_another_layer_of_the_same_form_is_not_compiled_again() -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(inputs)
        return graph

    x = randn(3, SHAPE[1], seed=9)
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=backend)
    with torch.no_grad():
        for seed in (0, 1, 0, 1):
            layer = make(seed)
            assert_bitwise_equal(compiled(layer, x), layer(x))
    assert len(graphs) == 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons cannot watch a dictionary")
@pytest.mark.skipif(
    not torch._dynamo.config.use_recursive_dict_tags_for_guards, reason="this torch watches no dictionaries"
)
def test_the_state_is_looked_into_only_after_it_was_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    managers = []
    original = CheckFunctionManager.__init__

    def init(self: CheckFunctionManager, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        managers.append(self.guard_manager)

    monkeypatch.setattr(CheckFunctionManager, "__init__", init)
    layer = make()
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="eager")(randn(3, SHAPE[1], seed=9))
    lines = [line for line in str(managers[-1]).splitlines() if "GuardManager: source=" in line]
    (state,) = [line for line in lines if "quant_state, accessed_by" in line]
    assert "tag_safe=(True, True)" in state


def test_a_state_becomes_no_child_of_a_module() -> None:
    other = torch.nn.Module()
    weight = Params4bit(randn(*SHAPE, seed=0), quant_type="nf4", module=other).to("cpu")
    assert other.quant_state is weight.quant_state
    assert not list(other.children())
    assert not list(make().children())


def test_a_weight_may_be_quantised_and_used_within_one_graph() -> None:
    def run(values: Tensor, x: Tensor) -> Tensor:
        packed, state = quantize_tensor(values, block_size=64, quant_type="nf4", double_quant=True)
        return function.linear(x, packed, state, None)

    values, x = randn(*SHAPE, seed=0), randn(3, SHAPE[1], seed=9)
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_bitwise_equal(compiled(values, x), run(values, x))
