"""Groups of layers that share their input: when one call serves all, when not, and that nothing else notices."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from group_cases import Attention, alone, assert_close, group_of, make_attention, unchanged
from layer_cases import make_linear, randn
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from assertions import assert_bitwise_equal
from operator_calls import GROUP, CountCalls, calls
from qlora import QuantConfig
from qlora.nn import Linear4bit, dequantize_, group, link_groups, quantize_, unlink_groups


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "DEVICE_TYPES", ("cpu", "cuda"))


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [{}, {"quant_type": "fp4", "double_quant": False}, {"block_size": 128}])
@pytest.mark.parametrize("lead", [(1,), (2, 8), (0,), ()])
def test_one_call_serves_all_with_the_results_of_each(
    lead: tuple[int, ...], config: dict[str, Any], device: str
) -> None:
    model = make_attention(device, **config)
    x = randn(*lead, 128, seed=4, device=device)
    with torch.no_grad():
        expected = alone(model, x)
        for _ in range(3):
            assert calls(lambda: assert_close(model(x), expected, device)) == (1, 0)
    assert group_of(model).pending is None


@pytest.mark.parametrize("names", group.SIBLINGS)
def test_siblings_are_found_by_name(names: tuple[str, ...]) -> None:
    parent = nn.ModuleDict({name: make_linear(64, 32, seed=i) for i, name in enumerate(names)})
    parent["other"] = make_linear(64, 32)
    model = quantize_(nn.Sequential(parent))
    assert isinstance(model, nn.Sequential)
    groups = {parent[name]._group[0] for name in names}
    assert len(groups) == 1
    assert [parent[name]._group[1] for name in names] == list(range(len(names)))
    assert parent["other"]._group is None


def test_only_layers_that_can_share_an_input_are_linked() -> None:
    parent = nn.ModuleDict({"gate_proj": make_linear(64, 32), "up_proj": make_linear(128, 32)})
    quantize_(parent)
    assert parent["gate_proj"]._group is None
    parent = nn.ModuleDict({name: make_linear(64, 32) for name in ("q_proj", "k_proj", "v_proj")})
    quantize_(parent, QuantConfig(skip_modules=["q_proj"]))
    assert parent["k_proj"]._group[0] is parent["v_proj"]._group[0]
    shared = make_linear(64, 32)
    parent = nn.ModuleDict({"w1": shared, "w3": shared})
    quantize_(parent)
    assert parent["w1"]._group is None


def test_any_order_of_calls_is_served() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        assert calls(lambda: [model.v_proj(x), model.q_proj(x), model.k_proj(x)]) == (1, 0)


def test_another_input_switches_the_group_off_for_good() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    model.change = torch.neg
    with torch.no_grad():
        expected = alone(model, x)
        assert calls(lambda: assert_bitwise_equal(model(x), expected)) == (1, 2)
        assert group_of(model).is_off
        assert group_of(model).pending is None
        assert calls(lambda: assert_bitwise_equal(model(x), expected)) == (0, 3)
    model.change = unchanged
    link_groups(model)
    with torch.no_grad():
        assert calls(lambda: model(x)) == (1, 0)


def test_an_equal_copy_is_another_input() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    model.change = torch.clone
    with torch.no_grad():
        assert calls(lambda: model(x)) == (1, 2)


def test_a_sibling_that_is_not_called_switches_the_group_off() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        assert calls(lambda: model.q_proj(x)) == (1, 0)
        assert calls(lambda: model.q_proj(x)) == (0, 1)
    assert group_of(model).is_off
    assert group_of(model).pending is None


def test_a_write_to_the_input_in_between_is_seen() -> None:
    model = make_attention()
    model.change = lambda x: x.mul_(2)
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        expected = alone(model, x.clone())
        assert_bitwise_equal(model(x), expected)
    assert group_of(model).is_off


def _zero_bias(model: Attention) -> None:
    model.v_proj.bias.zero_()


def _new_bias(model: Attention) -> None:
    model.v_proj.bias = nn.Parameter(torch.ones(40), requires_grad=False)


def _load_weight(model: Attention) -> None:
    model.k_proj.load_state_dict(quantize_(make_linear(128, 32, seed=9, bias=False)).state_dict())


def _new_weight(model: Attention) -> None:
    model.k_proj.weight = quantize_(make_linear(128, 32, seed=9, bias=False)).weight


@pytest.mark.parametrize("change", [_zero_bias, _new_bias, _load_weight, _new_weight])
def test_a_change_of_a_sibling_in_between_is_seen(change: Callable[[Attention], None]) -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        expected_q = alone(model, x)[:, :96]
        q = model.q_proj(x)
        change(model)
        k, v = model.k_proj(x), model.v_proj(x)
        assert_bitwise_equal(torch.cat([q, k, v], -1), torch.cat([expected_q, alone(model, x)[:, 96:]], -1))
    assert group_of(model).is_off


def test_gradients_are_those_of_single_layers() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4).requires_grad_()
    assert calls(lambda: model(x).sum().backward()) == (0, 3)
    assert x.grad is not None
    assert model.v_proj.bias.grad is not None
    assert not group_of(model).is_off
    with torch.no_grad():
        assert calls(lambda: model(x)) == (1, 0)
        model.q_proj(x)
    k = model.k_proj(x)  # what the first kept has no graph
    assert k.requires_grad


def test_a_trainable_bias_of_a_sibling_gets_its_gradient() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    model.q_proj.bias.requires_grad_(False)
    assert calls(lambda: model(x).sum().backward()) == (0, 3)
    assert model.v_proj.bias.grad is not None


def _many_rows(model: Attention) -> None:
    model(randn(17, 128, seed=4))


def _in_inference_mode(model: Attention) -> None:
    with torch.inference_mode():
        model(randn(2, 128, seed=4))


def _in_inference_mode_with_an_input_from_outside(model: Attention) -> None:
    x = randn(2, 128, seed=4)
    with torch.inference_mode():
        model(x)


def _under_a_function_mode(model: Attention) -> None:
    with BaseTorchFunctionMode():
        model(randn(2, 128, seed=4))


def _under_autocast(model: Attention) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(randn(2, 128, seed=4))


def _in_another_dtype_than_the_biases(model: Attention) -> None:
    model(randn(2, 128, seed=4).bfloat16())


def _as_a_subclass(model: Attention) -> None:
    model(nn.Parameter(randn(2, 128, seed=4), requires_grad=False))


@pytest.mark.parametrize(
    "use",
    [
        *(_many_rows, _in_inference_mode, _in_inference_mode_with_an_input_from_outside),
        *(_under_a_function_mode, _under_autocast),
        *(_in_another_dtype_than_the_biases, _as_a_subclass),
    ],
)
def test_layers_compute_alone_and_the_group_stays(use: Callable[[Attention], None]) -> None:
    model = make_attention()
    with torch.no_grad():
        assert calls(lambda: use(model)) == (0, 3)
        assert group_of(model).pending is None
        assert not group_of(model).is_off
        assert calls(lambda: model(randn(2, 128, seed=4))) == (1, 0)


def test_what_a_thread_left_is_dropped() -> None:
    model = make_attention()

    @torch.no_grad()
    def call_the_first() -> None:
        model.q_proj(randn(2, 128, seed=4))

    thread = threading.Thread(target=call_the_first)
    thread.start()
    thread.join()
    assert group_of(model).pending is not None
    with torch.no_grad():
        for _ in range(group.MAX_FOREIGN_CALLS + 1):
            model.k_proj(randn(2, 128, seed=5))
        assert group_of(model).pending is None
        assert calls(lambda: model(randn(2, 128, seed=4))) == (1, 0)


def test_under_vmap_layers_compute_alone() -> None:
    model = make_attention()
    x = randn(2, 3, 128, seed=4)
    with torch.no_grad():
        expected = model(x)
        with CountCalls() as counter:
            actual = torch.func.vmap(model)(x)
    assert counter.names[GROUP] == 0
    assert not group_of(model).is_off
    torch.testing.assert_close(actual, expected)


def test_on_a_device_that_is_not_listed_layers_compute_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "DEVICE_TYPES", ("cuda",))
    model = make_attention()
    with torch.no_grad():
        assert calls(lambda: model(randn(2, 128, seed=4))) == (0, 3)


def _other_block_size(model: Attention) -> None:
    model.k_proj = quantize_(make_linear(128, 32, bias=False), QuantConfig(block_size=32))


def _other_compute_dtype(model: Attention) -> None:
    model.k_proj.compute_dtype = torch.float32


def _not_quantised(model: Attention) -> None:
    model.k_proj = Linear4bit(128, 32, bias=False, quant_type="nf4")


@pytest.mark.parametrize("change", [_other_block_size, _other_compute_dtype, _not_quantised])
def test_siblings_that_differ_compute_alone(change: Callable[[Attention], None]) -> None:
    model = make_attention()
    change(model)
    link_groups(model)
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        assert calls(lambda: [model.q_proj(x), model.v_proj(x)]) == (0, 2)


def test_a_subclass_with_its_own_forward_is_not_linked() -> None:
    class Doubled(Linear4bit):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = make_attention()
    model.k_proj.__class__ = Doubled
    link_groups(model)
    x = randn(2, 128, seed=4)
    with torch.no_grad():
        expected = alone(model, x)
        assert calls(lambda: assert_bitwise_equal(model(x), expected)) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
def test_nothing_is_kept_after_the_last_sibling() -> None:
    model = make_attention()
    with no_collector(), torch.no_grad():
        x = randn(2, 128, seed=4)
        outputs = [model.q_proj(x), model.k_proj(x)]
        kept = group_of(model).pending
        assert kept is not None
        references = [weakref.ref(kept[1]), weakref.ref(kept[-1][2][-1])]
        del kept
        outputs.append(model.v_proj(x))
        references += [weakref.ref(output) for output in outputs]
        del x, outputs
        assert [reference() for reference in references] == [None] * len(references)


def test_a_model_is_freed_without_the_collector() -> None:
    with no_collector(), torch.no_grad():
        model = make_attention()
        model(randn(2, 128, seed=4))
        reference = weakref.ref(model.k_proj.weight)
        del model
        assert reference() is None


def test_another_thread_computes_alone_and_leaves_the_group_on() -> None:
    model = make_attention()
    x, y = randn(2, 128, seed=4), randn(2, 128, seed=5)
    results: dict[str, Tensor] = {}

    def other() -> None:
        with torch.no_grad():
            results["y"] = model(y)

    with torch.no_grad():
        q = model.q_proj(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert calls(lambda: results.update(k=model.k_proj(x), v=model.v_proj(x))) == (0, 0)
    assert not group_of(model).is_off
    assert_bitwise_equal(results["y"], alone(model, y))
    assert_bitwise_equal(torch.cat([q, results["k"], results["v"]], -1), alone(model, x))


def test_threads_that_share_a_model_get_their_own_results() -> None:
    model = make_attention()
    inputs = [randn(2, 128, seed=i) for i in range(4)]
    expected = [alone(model, x) for x in inputs]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(200):
                    assert_bitwise_equal(model(inputs[index]), expected[index])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not group_of(model).is_off


@pytest.mark.gpu
def test_another_stream_takes_nothing() -> None:
    model = make_attention("cuda")
    x = randn(2, 128, seed=4, device="cuda")
    with torch.no_grad():
        expected = alone(model, x)
        q = model.q_proj(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            k = model.k_proj(x)
        torch.cuda.synchronize()
        assert_close(torch.cat([q, k, model.v_proj(x)], -1), expected, "cuda")
    assert group_of(model).is_off


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_group_on_new_inputs() -> None:
    model = make_attention("cuda")
    x = randn(2, 128, seed=4, device="cuda")
    static = torch.zeros_like(x)
    with torch.no_grad():
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)
        static.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
    assert_bitwise_equal(output, expected)


# ---------------------------------------------------------------------------------------------------------------------
def test_copies_and_pickles_are_whole_and_not_linked() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = model(x)
        model.q_proj(x)  # with something pending
        for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert copied.q_proj._group is None
            assert_bitwise_equal(copied(x), expected)
            link_groups(copied)
            assert calls(lambda copied=copied: assert_bitwise_equal(copied(x), expected)) == (1, 0)
        one = copy.copy(model.k_proj)
        assert one._group is None
        assert_bitwise_equal(one(x), expected[:, 96:128])


def test_replicas_that_share_attributes_compute_alone() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    replica = model.k_proj._replicate_for_data_parallel()
    replica.__dict__["_group"] = model.k_proj._group
    replica._parameters = dict(model.k_proj._parameters)
    with torch.no_grad():
        assert calls(lambda: replica(x)) == (0, 1)
    assert not group_of(model).is_off


def test_names_and_state_dicts_are_those_without_groups() -> None:
    model = make_attention()
    other = make_attention()
    unlink_groups(other)
    with torch.no_grad():
        model.q_proj(randn(2, 128, seed=4))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    assert list(model.state_dict()) == list(other.state_dict())
    assert [name for name, _ in model.named_buffers()] == []
    model.load_state_dict(other.state_dict())
    x = randn(2, 128, seed=5)
    link_groups(model)
    with torch.no_grad():
        assert calls(lambda: assert_bitwise_equal(model(x), other(x)))[0] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_keep_the_group(dtype: torch.dtype, device: str) -> None:
    model = make_attention().to(device=device, dtype=dtype)
    x = randn(2, 128, seed=4, dtype=dtype, device=device)
    with torch.no_grad():
        expected = alone(model, x)
        assert calls(lambda: torch.testing.assert_close(model(x), expected)) == (1, 0)


def test_dequantised_layers_have_no_group() -> None:
    model = make_attention()
    x = randn(2, 128, seed=4)
    dequantize_(model)
    assert not any(hasattr(module, "_group") for module in model.modules())
    with torch.no_grad():
        assert calls(lambda: model(x)) == (0, 0)
    model = make_attention()
    model.v_proj = dequantize_(model.v_proj)
    with torch.no_grad():
        model(x)
        link_groups(model)
        assert calls(lambda: model(x)) == (1, 0)


def test_unlinked_layers_compute_alone() -> None:
    model = make_attention()
    unlink_groups(model)
    with torch.no_grad():
        assert calls(lambda: model(randn(2, 128, seed=4))) == (0, 3)


def test_hooks_see_every_layer() -> None:
    model = make_attention()
    seen: list[torch.Size] = []
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        assert calls(lambda: model(randn(2, 128, seed=4))) == (1, 0)
    assert seen == [(2, 96), (2, 32), (2, 40)]
