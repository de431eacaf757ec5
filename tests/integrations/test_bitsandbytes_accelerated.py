"""Accelerator mode: bitsandbytes' own functions and layers give with our kernels what they give with theirs."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes_cases import (
    DTYPES,
    bitsandbytes,
    make_layer,
    random_values,
    sum_tolerance,
)
from torch import Tensor, nn

import qlora
from assertions import assert_bitwise_equal, assert_codes_agree, assert_within
from qlora import reference

pytestmark = pytest.mark.usefixtures("acceleration_ends")

functional = bitsandbytes.functional

HAS_GEMM = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
since_0_50 = pytest.mark.skipif(
    not HAS_GEMM,
    reason="before bitsandbytes 0.50 its CPU backend has no FP4, or another one, and fewer block sizes",
)

FORMATS = list(itertools.product(("nf4", "fp4"), (False, True)))


def values_of(layer: nn.Module) -> Tensor:
    """The layer's weight [n, k] in float64."""
    state = layer.weight.quant_state
    return functional.dequantize_4bit(layer.weight.data, state).cpu().double()


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, dx and, where the layer has a bias, its gradient."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, None if layer.bias is None else layer.bias.grad.clone()


# ---------------------------------------------------------------------------------------------------------------------
@since_0_50
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_quantise_and_dequantise_are_bit_equal(
    quant_type: str, double_quant: bool, dtype: torch.dtype, device: str
) -> None:
    x = random_values(48, 192, dtype=dtype, device=device)
    settings = dict(quant_type=quant_type, compress_statistics=double_quant)
    packed, state = functional.quantize_4bit(x, **settings)
    values = functional.dequantize_4bit(packed, state)
    qlora.accelerate_bitsandbytes()
    our_packed, our_state = functional.quantize_4bit(x, **settings)
    assert_bitwise_equal(our_state.absmax, state.absmax)
    absmax = x.float().reshape(-1, 64).abs().amax(1)
    # bitsandbytes' CPU backend decides FP4 at exact midpoints, we at its CUDA backend's decimals of 8 digits or less.
    differing = assert_codes_agree(
        our_packed,
        packed,
        x.float(),
        absmax,
        block_size=64,
        quant_type=quant_type,
        ulps=8 if quant_type == "fp4" else 2,
    )
    assert differing <= x.numel() / 1000
    assert our_packed.shape == packed.shape and our_state.shape == state.shape
    if double_quant:
        assert_bitwise_equal(our_state.state2.absmax, state.state2.absmax)
        assert_bitwise_equal(our_state.offset, state.offset)
    # + 0: the sign of FP4's negative zero is bitsandbytes' own on CUDA, but not on CPU.
    assert_bitwise_equal(functional.dequantize_4bit(packed, state) + 0, values + 0)


@since_0_50
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_every_block_size_and_storage_is_bit_equal(block_size: int, storage: torch.dtype) -> None:
    x = random_values(40, 256)
    settings = dict(blocksize=block_size, quant_type="nf4", quant_storage=storage)
    packed, state = functional.quantize_4bit(x, **settings)
    values = functional.dequantize_4bit(packed, state)
    qlora.accelerate_bitsandbytes()
    our_packed, our_state = functional.quantize_4bit(x, **settings)
    assert our_packed.dtype == storage and our_packed.shape == packed.shape
    assert_bitwise_equal(our_packed.view(torch.uint8), packed.view(torch.uint8))
    assert_bitwise_equal(our_state.absmax, state.absmax)
    assert_bitwise_equal(functional.dequantize_4bit(packed, state), values)
    assert_bitwise_equal(functional.dequantize_4bit(packed.t(), state), values.t())


@pytest.mark.parametrize("shape", [(8, 48), (5, 96), (3, 5, 7)])
def test_blocks_that_run_over_the_ends_of_rows_dequantise_right(shape: tuple[int, ...], device: str) -> None:
    """Here bitsandbytes' CPU backend alone takes the scale of another block."""
    qlora.accelerate_bitsandbytes()
    packed, state = functional.quantize_4bit(random_values(*shape, device=device), quant_type="nf4")
    expected = reference.dequantize_4bit(
        packed.cpu(), state.absmax.cpu(), shape, block_size=64, quant_type="nf4", dtype=torch.float32
    )
    assert_bitwise_equal(functional.dequantize_4bit(packed, state), expected)


@pytest.mark.usefixtures("accelerated")
def test_results_are_written_to_out() -> None:
    x = random_values(32, 64)
    packed, state = functional.quantize_4bit(x, quant_type="nf4")
    out, absmax = torch.zeros_like(packed), torch.zeros_like(state.absmax)
    returned, state_with_out = functional.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")
    assert returned is out and state_with_out.absmax is absmax
    assert_bitwise_equal(out, packed)
    assert_bitwise_equal(absmax, state.absmax)

    values = torch.zeros_like(x)
    assert functional.dequantize_4bit(packed, state, out=values) is values
    assert_bitwise_equal(values, functional.dequantize_4bit(packed, state))

    product = torch.zeros(3, 32)
    a = random_values(3, 64, seed=1)
    assert bitsandbytes.matmul_4bit(a, packed.t(), state, out=product) is product
    assert_bitwise_equal(product, bitsandbytes.matmul_4bit(a, packed.t(), state))


@pytest.mark.usefixtures("accelerated")
def test_an_out_of_another_shape_is_refused() -> None:
    packed, state = functional.quantize_4bit(random_values(32, 64), quant_type="nf4")
    arguments = (packed, state.absmax, 64, "nf4", (32, 64), torch.float32)
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \[32, 64\] on cpu, got .* \[64, 32\]"):
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=torch.empty(64, 32))


@pytest.mark.usefixtures("accelerated")
def test_a_storage_that_the_bytes_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a dtype whose items 15 bytes fill, got torch.float32"):
        functional.quantize_4bit(random_values(30), quant_type="nf4", quant_storage=torch.float32)


@pytest.mark.usefixtures("accelerated")
def test_a_one_dimensional_tensor_keeps_its_shape() -> None:
    packed, state = functional.quantize_4bit(random_values(128), quant_type="nf4")
    assert functional.dequantize_4bit(packed, state).shape == (128,)


# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (5, 128), (2, 3, 128), (0, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_a_layers_products_agree(
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bias: bool,
    device: str,
) -> None:
    qlora.accelerate_bitsandbytes()
    layer = make_layer(dtype, quant_type=quant_type, double_quant=double_quant, bias=bias, device=device)
    x, grad = (random_values(*shape[:-1], size, dtype=dtype, device=device, seed=2) for size in (128, 96))
    y, dx, dbias = run(layer, x, grad)
    w = values_of(layer)
    expected = x.cpu().double() @ w.t()
    if bias:
        expected = expected + layer.bias.detach().cpu().double()
    # The values W themselves are rounded to the dtype that the weight was quantised from.
    assert_within(y, expected, sum_tolerance(x, w.t(), dtype) + sum_of_bias(layer, dtype))
    assert_within(dx, grad.cpu().double() @ w, sum_tolerance(grad, w, dtype))
    assert y.dtype is dtype and dx.dtype is dtype
    if bias:
        rows = grad.cpu().double().reshape(-1, 96)
        ones = torch.ones(1, len(rows))
        assert_within(dbias[None], ones.double() @ rows, sum_tolerance(ones, rows, dtype))


def sum_of_bias(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The rounding of a bias [n] that is added."""
    if layer.bias is None:
        return torch.zeros(layer.out_features, dtype=torch.float64)
    return 2 * torch.finfo(dtype).eps * layer.bias.detach().cpu().double().abs()


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_a_layer_of_another_storage_gives_the_same(storage: torch.dtype, device: str) -> None:
    """As FSDP asks for it: the same bytes, viewed."""
    layers = [
        make_layer(torch.float32, device=device, quant_storage=dtype) for dtype in (torch.uint8, storage)
    ]
    assert layers[1].weight.dtype is storage
    x, grad = random_values(4, 128, device=device), random_values(4, 96, device=device, seed=3)
    for a, b in zip(*(run(layer, x, grad) for layer in layers), strict=True):
        assert_bitwise_equal(a, b)


@since_0_50
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_a_training_pass_agrees_with_bitsandbytes_alone(
    quant_type: str, double_quant: bool, dtype: torch.dtype, device: str
) -> None:
    layer = make_layer(dtype, quant_type=quant_type, double_quant=double_quant, device=device)
    x = random_values(6, 128, dtype=dtype, device=device)
    grad = random_values(6, 96, dtype=dtype, device=device, seed=3)
    theirs = run(layer, x, grad)
    qlora.accelerate_bitsandbytes()
    ours = run(layer, x, grad)
    w = values_of(layer)
    assert_within(ours[0], theirs[0], sum_tolerance(x, w.t(), dtype) + sum_of_bias(layer, dtype))
    assert_within(ours[1], theirs[1], sum_tolerance(grad, w, dtype))
    assert_within(ours[2][None], theirs[2][None], sum_tolerance(torch.ones(1, 6), grad, dtype))


@pytest.mark.usefixtures("accelerated")
def test_no_dense_weight_is_made() -> None:
    layer = make_layer(torch.bfloat16)
    x = random_values(4, 128, dtype=torch.bfloat16).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"qlora::linear_4bit", "qlora::linear_4bit_grad_input"} <= names
    assert not {name for name in names if "dequantize" in name}


@pytest.mark.gpu
@pytest.mark.usefixtures("accelerated")
def test_the_memory_of_a_dense_weight_is_not_taken() -> None:
    layer = make_layer(torch.bfloat16, device="cuda", n=4096, k=4096)
    x = random_values(4, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096


@pytest.mark.gpu
def test_quantising_keeps_to_the_callers_stream() -> None:
    """bitsandbytes alone quantises on the default stream, beside whatever fills the tensor on another."""
    qlora.accelerate_bitsandbytes()
    source = random_values(4096, 4096, device="cuda")
    expected, _ = functional.quantize_4bit(source, quant_type="nf4")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros_like(source)
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        packed, _ = functional.quantize_4bit(x, quant_type="nf4")
    torch.cuda.synchronize()
    assert_bitwise_equal(packed, expected)


@pytest.mark.usefixtures("accelerated")
def test_the_result_may_be_written_to_under_autograd() -> None:
    layer = make_layer(torch.float32)
    x = random_values(4, 128).requires_grad_()
    y = layer(x)
    y += 1
    y.mul_(2).sum().backward()
    w = values_of(layer)
    twos = torch.full((4, 96), 2.0)
    assert_within(x.grad, twos.double() @ w, sum_tolerance(twos, w, torch.float32))


@pytest.mark.usefixtures("accelerated")
def test_a_layer_trains_after_it_was_evaluated() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes alone reorders the weight in eval mode, and has no gradient then."""
    layer = make_layer(torch.float32)
    x, grad = random_values(4, 128), random_values(4, 96, seed=3)
    before = run(layer, x, grad)
    with torch.no_grad():
        assert_bitwise_equal(layer.eval()(x), before[0])
    after = run(layer.train(), x, grad)
    for a, b in zip(before, after, strict=True):
        assert_bitwise_equal(a, b)


def test_gemv_of_a_vector_agrees_with_the_layer(device: str) -> None:
    if device == "cpu" and getattr(functional, "has_avx512bf16", bool)():
        pytest.skip(
            "this CPU has AVX512-BF16: bitsandbytes' gemv_4bit takes only weights in its own order there"
        )
    layer = make_layer(torch.float32, bias=False, device=device)
    x = random_values(1, 128, device=device)
    qlora.accelerate_bitsandbytes()
    y = functional.gemv_4bit(x, layer.weight.data.t(), state=layer.weight.quant_state)
    w = values_of(layer)
    assert_within(y, x.cpu().double() @ w.t(), sum_tolerance(x, w.t(), torch.float32))


@pytest.mark.usefixtures("accelerated")
def test_a_weight_quantised_as_k_by_n_goes_to_bitsandbytes() -> None:
    w = random_values(128, 96)
    packed, state = functional.quantize_4bit(w, quant_type="nf4")
    x = random_values(5, 128, seed=2)
    dense = functional.dequantize_4bit(packed, state).double()
    with pytest.warns(DeprecationWarning, match="quantized from a") if HAS_GEMM else nullcontext():
        y = bitsandbytes.matmul_4bit(x, packed, state)
    assert_within(y, x.double() @ dense, sum_tolerance(x, dense, torch.float32))


@pytest.mark.usefixtures("accelerated")
def test_a_16_bit_offset_of_an_old_checkpoint_is_read() -> None:
    layer = make_layer(torch.float32)
    layer.weight.quant_state.offset = layer.weight.quant_state.offset.half()
    x = random_values(4, 128).requires_grad_()
    layer(x).sum().backward()
    w = values_of(layer)
    ones = torch.ones(4, 96)
    assert_within(x.grad, ones.double() @ w, sum_tolerance(ones, w, torch.float32))
    assert layer.weight.quant_state.offset.dtype is torch.float16


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.usefixtures("accelerated")
def test_a_layer_compiles_without_a_break_in_the_graph(double_quant: bool) -> None:
    layer = make_layer(torch.float32, double_quant=double_quant)
    x, grad = random_values(4, 128), random_values(4, 96, seed=3)
    eager = run(layer, x, grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    xc = x.clone().requires_grad_()
    y = compiled(xc)
    y.backward(grad)
    assert_bitwise_equal(y.detach(), eager[0])
    assert_bitwise_equal(xc.grad, eager[1])


@pytest.mark.parametrize(
    "name", ["quantize_4bit", "dequantize_4bit", pytest.param("gemm_4bit", marks=since_0_50)]
)
@pytest.mark.usefixtures("accelerated")
def test_operators_pass_opcheck(name: str, device: str) -> None:
    x = random_values(96, 128, device=device)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(x, 64, "nf4", torch.uint8)
    a = random_values(3, 128, device=device, seed=4)
    arguments = {
        "quantize_4bit": (x, 64, "nf4", torch.uint8),
        "dequantize_4bit": (packed, absmax, 64, "nf4", (96, 128), torch.bfloat16),
        "gemm_4bit": (a, packed, (96, 128), absmax, 64, "nf4"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.bitsandbytes, name).default, arguments)
