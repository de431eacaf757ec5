"""Properties that every operator has: opcheck, compile, layouts, streams, graphs, devices, empty inputs, error texts."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from assertions import assert_bitwise_equal
from op_cases import QUANT_TYPES, as_tuple, make_call, make_weight, randn
from qlora import ops

OPS = (
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_absmax",
    "dequantize_absmax",
    "round_columns_nf4",
    "linear_4bit",
    "linear_4bit_grad_input",
    "linear_4bit_group",
    "lora_linear_4bit",
    "lora_linear_4bit_backward",
    "embedding_4bit",
)
WITH_RAW = ("linear_4bit", "linear_4bit_grad_input", "lora_linear_4bit", "lora_linear_4bit_backward")
# Sums over k may be split by the thread count or the kernel, but a repeated call takes the same path: bits are equal.
WITH_SCALES = (
    "dequantize_4bit",
    "linear_4bit",
    "linear_4bit_grad_input",
    "lora_linear_4bit",
    "lora_linear_4bit_backward",
    "embedding_4bit",
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_same(actual: object, expected: object) -> None:
    for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise_equal(one, other)


def test_list_is_complete() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qlora::")}
    assert registered == {f"qlora::{name}" for name in OPS} | {f"qlora::{name}.raw" for name in WITH_RAW}
    assert set(ops.__all__) == set(OPS)


@pytest.mark.parametrize("name", WITH_RAW)
def test_raw_overload_gives_equal_bits_and_has_a_fake_kernel(name: str, device: str) -> None:
    call = make_call(name, device)
    raw = getattr(torch.ops.qlora, name).raw
    assert str(raw._schema).partition("(")[2] == str(call.raw._schema).partition("(")[2]
    assert_same(raw(*call.raw_args), call.raw(*call.raw_args))
    torch.library.opcheck(raw, call.raw_args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # opcheck's own
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_passes(name: str, is_nested: bool, device: str) -> None:
    call = make_call(name, device, is_nested=is_nested)
    torch.library.opcheck(call.raw, call.raw_args)
    if name not in ("dequantize_4bit", "dequantize_absmax", "embedding_4bit"):
        first = call.raw_args[0].clone().requires_grad_()
        torch.library.opcheck(call.raw, (first, *call.raw_args[1:]))


@pytest.mark.parametrize("name", OPS)
def test_compiles_as_one_graph_with_equal_bits(name: str, device: str) -> None:
    call = make_call(name, device)
    expected = call.function(*call.tensors)
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True)
    assert_same(compiled(*call.tensors), expected)


@pytest.mark.parametrize(
    "name",
    ["quantize_4bit", "linear_4bit", "linear_4bit_grad_input", "linear_4bit_group", "embedding_4bit"],
)
def test_compiles_once_for_every_leading_size(name: str, device: str) -> None:
    call = make_call(name, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.function, fullgraph=True, dynamic=True, backend=counter)
    first, *rest = call.tensors
    for repeats in (2, 3, 7):
        larger = first.repeat(repeats, *[1] * (first.dim() - 1))
        assert_same(compiled(larger, *rest), call.function(larger, *rest))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["dequantize_4bit", "quantize_absmax", "dequantize_absmax"])
def test_compiles_with_dynamic_shapes(name: str, device: str) -> None:
    call = make_call(name, device)
    compiled = torch.compile(call.function, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(compiled(*call.tensors), call.function(*call.tensors))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after each; a tensor of one value stays as it is."""
    if tensor.numel() <= 1:
        return tensor
    spread = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    return spread


@pytest.mark.parametrize("name", OPS)
def test_non_contiguous_inputs_give_equal_bits(name: str, device: str) -> None:
    call = make_call(name, device)
    expected = call.function(*call.tensors)
    for position in range(len(call.tensors)):
        tensors = list(call.tensors)
        tensors[position] = strided(tensors[position])
        assert_same(call.function(*tensors), expected)


def test_non_contiguous_bias_gives_equal_bits(device: str) -> None:
    weight = make_weight(12, 64, device=device)
    x, bias = randn(3, 64, seed=1, device=device), randn(12, seed=2, device=device)
    expected = ops.linear_4bit(x, *weight.args, **weight.kwargs, bias=bias)
    assert_same(ops.linear_4bit(x, *weight.args, **weight.kwargs, bias=strided(bias)), expected)


def test_transposed_input_is_quantised_in_its_logical_order(device: str) -> None:
    x = randn(40, 36, seed=1, device=device)
    assert_same(ops.quantize_4bit(x.t()), ops.quantize_4bit(x.t().contiguous()))


@pytest.mark.parametrize("name", OPS)
def test_a_repeated_call_gives_equal_bits(name: str, device: str) -> None:
    call = make_call(name, device)
    assert_same(call.function(*call.tensors), call.function(*call.tensors))


@pytest.mark.parametrize("name", OPS)
def test_outputs_live_on_meta_with_the_same_sizes(name: str) -> None:
    call = make_call(name, "cpu")
    expected = as_tuple(call.raw(*call.raw_args))
    meta_args = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call.raw_args)
    for one, other in zip(as_tuple(call.raw(*meta_args)), expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert one.device.type == "meta"


@pytest.mark.parametrize("name", ["quantize_4bit", "quantize_absmax"])
def test_outputs_of_quantisation_carry_no_gradient(name: str, device: str) -> None:
    call = make_call(name, device)
    outputs = as_tuple(call.function(call.tensors[0].clone().requires_grad_()))
    assert not any(output.requires_grad for output in outputs)


def test_a_packed_weight_that_requires_grad_gets_none(device: str) -> None:
    weight = make_weight(8, 64, device=device)
    packed = weight.packed.view(-1).view(torch.float32).clone().requires_grad_()
    x = randn(2, 64, seed=1, device=device).requires_grad_()
    ops.linear_4bit(x, packed, weight.absmax, weight.shape, **weight.kwargs).sum().backward()
    assert packed.grad is None
    assert x.grad is not None
    output = ops.dequantize_4bit(packed, weight.absmax, weight.shape, **weight.kwargs, dtype=torch.float32)
    assert not output.requires_grad


def test_empty_inputs_give_empty_outputs(device: str) -> None:
    packed, absmax = ops.quantize_4bit(torch.empty(0, 5, device=device))
    assert packed.shape == (0, 1)
    assert absmax.shape == (0,)
    form = {"block_size": 64, "quant_type": "nf4"}
    assert ops.dequantize_4bit(packed, absmax, (0, 5), **form, dtype=torch.float16).shape == (0, 5)
    codes, nested_absmax, quant_map, offset = ops.quantize_absmax(absmax)
    assert codes.shape == nested_absmax.shape == (0,)
    assert offset.item() == 0.0
    assert ops.dequantize_absmax(codes, nested_absmax, quant_map, offset).shape == (0,)
    weight = make_weight(6, 64, device=device)
    empty = torch.empty(2, 0, 64, device=device, requires_grad=True)
    output = ops.linear_4bit(empty, *weight.args, **weight.kwargs)
    assert output.shape == (2, 0, 6)
    output.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    indices = torch.empty(0, dtype=torch.int64, device=device)
    assert ops.embedding_4bit(indices, *weight.args, **weight.kwargs, dtype=torch.bfloat16).shape == (0, 64)


def test_a_weight_without_columns_or_rows_gives_zeros(device: str) -> None:
    packed, absmax = ops.quantize_4bit(torch.empty(0, device=device))
    form = {"block_size": 64, "quant_type": "nf4"}
    bias = randn(3, seed=1, device=device)
    x = torch.empty(2, 0, device=device)
    assert_same(ops.linear_4bit(x, packed, absmax, (3, 0), **form, bias=bias), bias.expand(2, 3))
    assert_same(ops.linear_4bit(x, packed, absmax, (3, 0), **form), torch.zeros(2, 3, device=device))
    assert ops.linear_4bit(torch.ones(2, 4, device=device), packed, absmax, (0, 4), **form).shape == (2, 0)
    dx = ops.linear_4bit_grad_input(torch.empty(2, 0, device=device), packed, absmax, (0, 4), **form)
    assert_same(dx, torch.zeros(2, 4, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name: str) -> None:
    call = make_call(name, "cuda")
    expected = call.function(*call.tensors)
    first, *rest = call.tensors
    stale = torch.zeros_like(first)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read the zeros
        stale.copy_(first)
        output = call.function(stale, *rest)
    stream.synchronize()
    assert_same(output, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_replays_in_a_cuda_graph_on_new_inputs(name: str) -> None:
    call = make_call(name, "cuda")
    expected = call.function(*call.tensors)
    first, *rest = call.tensors
    static = torch.zeros_like(first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.function(static, *rest)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call.function(static, *rest)
    static.copy_(first)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(output, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second cuda gpu")
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_device_of_its_inputs(name: str) -> None:
    expected = make_call(name, "cuda:0")
    call = make_call(name, "cuda:1")
    output = call.function(*call.tensors)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in as_tuple(output))
    assert_same(output, expected.function(*expected.tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_SCALES)
def test_a_weight_on_another_device_is_named(name: str) -> None:
    call = make_call(name, "cuda")
    tensors = list(call.tensors)
    position = 1 if name == "dequantize_4bit" else 2
    tensors[position] = tensors[position].cpu()
    with pytest.raises(
        TypeError, match=rf"qlora\.{name}: absmax: expected a tensor on cuda:0, got .* on cpu"
    ):
        call.function(*tensors)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_packed_bytes_may_have_any_dtype(quant_type: str, device: str) -> None:
    weight = make_weight(16, 64, device=device, quant_type=quant_type)
    x = randn(3, 64, seed=1, device=device)
    expected = ops.linear_4bit(x, *weight.args, **weight.kwargs)
    for dtype in (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        packed = weight.packed.view(-1).view(dtype).unsqueeze(1)
        assert_same(ops.linear_4bit(x, packed, weight.absmax, weight.shape, **weight.kwargs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nested_offset_may_have_any_float_dtype_and_one_dimension(dtype: torch.dtype, device: str) -> None:
    weight = make_weight(16, 64, device=device, is_nested=True)
    offset = weight.nested["nested_offset"].to(dtype)
    expected = ops.dequantize_absmax(
        weight.absmax, weight.nested["nested_absmax"], weight.nested["nested_quant_map"], offset.float()
    )
    for given in (offset, offset.reshape(1)):
        weight.nested["nested_offset"] = given
        assert_same(ops.dequantize_absmax(weight.absmax, *weight.nested.values()), expected)


def test_direct_calls_do_not_read_out_of_bounds() -> None:
    weight = make_weight(16, 64)
    x = randn(3, 64, seed=1)
    raw = torch.ops.qlora.linear_4bit
    with pytest.raises(
        RuntimeError, match=r"qlora\.linear_4bit: packed: expected at least 512 values, got 100"
    ):
        raw(x, weight.packed[:100], weight.absmax, None, None, None, None, (16, 64), 64, "nf4")
    with pytest.raises(RuntimeError, match=r"qlora\.linear_4bit: absmax: expected at least 16 values, got 3"):
        raw(x, weight.packed, weight.absmax[:3], None, None, None, None, (16, 64), 64, "nf4")
    with pytest.raises(
        RuntimeError, match=r"qlora\.linear_4bit: input: expected a last dimension of 64, got 63"
    ):
        raw(x[:, :63], weight.packed, weight.absmax, None, None, None, None, (16, 64), 64, "nf4")
    with pytest.raises(
        RuntimeError, match=r"qlora\.quantize_4bit: block_size: expected a power of two .*, got 48"
    ):
        torch.ops.qlora.quantize_4bit(x, 48, "nf4")
    with pytest.raises(
        RuntimeError, match=r"qlora\.quantize_4bit: quant_type: expected nf4 or fp4, got int4"
    ):
        torch.ops.qlora.quantize_4bit(x, 64, "int4")
    with pytest.raises(
        RuntimeError, match=r"qlora\.quantize_4bit: input: expected float32, float16 or bfloat16"
    ):
        torch.ops.qlora.quantize_4bit(x.double(), 64, "nf4")
