"""linear_4bit_group on a GPU: one launch of skinny_sm90 for up to three weights, else the weights one after the other."""

from __future__ import annotations

import copy

import c_library
import pytest
import torch
from linear_cases import randn, shifted, tolerance
from torch import Tensor

from assertions import assert_bitwise_equal, assert_within
from qlora import ops
from qlora.nn import link_groups, quantize_

pytestmark = pytest.mark.gpu

NESTED = ("nested_absmax", "nested_quant_map", "nested_offset")
# Rows of the members and k: one row each; tiles and rests; two members; clusters of 2 to 8 blocks, two chunks a warp;
# more turns of a cluster than are exchanged at once, with members that end within them.
CASES = (
    ((1, 1, 1), 256),
    ((7, 16, 33), 512),
    ((1000, 40), 1024),
    ((512, 128, 128), 4096),
    ((264, 17), 5120),
    ((100, 33, 5), 18944),
    ((1000, 900, 700), 32768),
)


class Members:
    """Weights of one k whose scales differ by powers of ten, so that a product with another's scales is far off."""

    def __init__(
        self, rows: tuple[int, ...], k: int, *, is_nested: bool = True, quant_type: str = "nf4"
    ) -> None:
        self.rows, self.k = rows, k
        self.form = {"block_size": 64, "quant_type": quant_type}
        self.packed: list[Tensor] = []
        self.absmax: list[Tensor] = []
        self.nested: list[list[Tensor]] = []
        self.values: list[Tensor] = []
        for i, n in enumerate(rows):
            values = randn(n, k, dtype=torch.float32, seed=n + k + i) * 10.0**i
            packed, absmax = ops.quantize_4bit(values, 64, quant_type)
            nested = []
            if is_nested:
                absmax, *nested = ops.quantize_absmax(absmax)
                nested[1] = nested[1].clone()  # an address of its own
            self.packed.append(packed)
            self.absmax.append(absmax)
            self.nested.append(nested)
            self.values.append(
                ops.dequantize_4bit(
                    packed, absmax, (n, k), **self.form, **self._nested_of(nested), dtype=torch.float32
                )
            )

    @staticmethod
    def _nested_of(nested: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(NESTED, nested, strict=False))

    def group(self, x: Tensor, bias: list[Tensor | None] | None = None) -> list[Tensor]:
        columns = dict(zip(NESTED, map(list, zip(*self.nested, strict=True)), strict=False))
        return ops.linear_4bit_group(
            x, self.packed, self.absmax, self.rows, **self.form, **columns, bias=bias
        )

    def singly(self, x: Tensor, bias: list[Tensor | None] | None = None) -> list[Tensor]:
        return [
            ops.linear_4bit(
                *(x, self.packed[i], self.absmax[i], (n, self.k)),
                **self.form,
                **self._nested_of(self.nested[i]),
                bias=None if bias is None else bias[i],
            )
            for i, n in enumerate(self.rows)
        ]

    def biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """One for each but the second."""
        return [
            None if i == 1 else randn(n, dtype=dtype, seed=n + i) * 10.0**i for i, n in enumerate(self.rows)
        ]

    def assert_products(
        self, outputs: list[Tensor], x: Tensor, bias: list[Tensor | None] | None = None
    ) -> None:
        for i, weight in enumerate(self.values):
            expected = x.double() @ weight.double().T
            slack = torch.zeros_like(expected)
            b = None if bias is None else bias[i]
            if b is not None:
                expected = expected + b.double()
                slack = slack + torch.finfo(torch.float32).eps * b.double().abs()
            # A code value is rounded to dtype, which is a relative error of a weight of at most eps / 2.
            rounding = torch.finfo(x.dtype).eps / 2 * (x.double().abs() @ weight.double().abs().T)
            assert_within(outputs[i], expected, tolerance(x, weight.T, expected) + slack + 2 * rounding)


@pytest.fixture
def skinny(kernel) -> None:
    """skinny_sm90 alone; a skip with the reason where the GPU has not what it needs."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("skinny_sm90 needs compute capability 9.0")
    kernel("skinny_sm90")


def assert_one_launch(members: Members, m: int, dtype: torch.dtype) -> None:
    weights = [c_library.describe_weight(n, members.k) for n in members.rows]
    assert c_library.explain_group(weights, m, dtype).splitlines()[0] == "one launch by skinny_sm90"


@pytest.mark.usefixtures("skinny")
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("m", [1, 8, 9, 16])
def test_one_launch_equals_float64_products_of_the_exact_weights(
    m: int, case: tuple[tuple[int, ...], int], dtype: torch.dtype, is_nested: bool
) -> None:
    members = Members(*case, is_nested=is_nested)
    assert_one_launch(members, m, dtype)
    x = randn(m, members.k, dtype=dtype, seed=1) / 100
    outputs = members.group(x)
    members.assert_products(outputs, x)
    for again, output in zip(members.group(x), outputs, strict=True):
        assert_bitwise_equal(again, output)
    bias = members.biases(dtype)
    members.assert_products(members.group(x, bias), x, bias)
    for flipped, output in zip(members.group(x.flip(0)), outputs, strict=True):
        assert_bitwise_equal(flipped, output.flip(0))


@pytest.mark.usefixtures("skinny")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("m", [1, 16])
def test_members_that_fill_the_gpu_by_themselves_keep_the_bits_of_their_own_launch(
    m: int, is_nested: bool, quant_type: str
) -> None:
    """More tiles than multiprocessors: no split of k with or without the others, hence the same order of sums."""
    rows = tuple(16 * torch.cuda.get_device_properties(0).multi_processor_count + i for i in (7, 16, 1))
    members = Members(rows, 1024, is_nested=is_nested, quant_type=quant_type)
    x = randn(m, 1024, dtype=torch.bfloat16, seed=1)
    bias = members.biases(torch.bfloat16)
    for output, expected in zip(members.group(x, bias), members.singly(x, bias), strict=True):
        assert_bitwise_equal(output, expected)


@pytest.mark.usefixtures("skinny")
def test_a_group_takes_any_addresses() -> None:
    members = Members((100, 64, 33), 1024)
    x = randn(5, 1024, dtype=torch.bfloat16, seed=4)
    bias = members.biases(torch.bfloat16)
    expected = members.group(x, bias)
    for output, wanted in zip(members.group(shifted(x), bias), expected, strict=True):
        assert_bitwise_equal(output, wanted)
    for i in range(3):
        nested = [(members.nested[i], j) for j in range(3)]
        for tensors, j in [(members.packed, i), (members.absmax, i), (bias, i), *nested]:
            kept = tensors[j]
            if kept is None:
                continue
            tensors[j] = shifted(kept)
            for output, wanted in zip(members.group(x, bias), expected, strict=True):
                assert_bitwise_equal(output, wanted)
            tensors[j] = kept


@pytest.mark.usefixtures("skinny")
def test_what_is_not_finite_stays_where_it_is() -> None:
    members = Members((48, 20, 64), 4096, is_nested=False)
    x = randn(4, 4096, dtype=torch.bfloat16, seed=4)
    expected = members.group(x)
    members.absmax[1][5 * 64] = torch.nan  # a block of row 5
    outputs = members.group(x)
    assert outputs[1][:, 5].isnan().all()
    outputs[1][:, 5] = expected[1][:, 5]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_bitwise_equal(output, wanted)
    members = Members((48, 20, 64), 4096)
    expected = members.group(x)
    x[2, 77] = torch.inf
    for output, wanted in zip(members.group(x), expected, strict=True):
        assert not output[2].isfinite().any()
        assert_bitwise_equal(output[[0, 1, 3]], wanted[[0, 1, 3]])


@pytest.mark.usefixtures("skinny")
def test_a_group_reads_what_the_kernels_before_it_wrote() -> None:
    """The kernel may be set up early, while the one before it still runs."""
    members = Members((4096, 1024, 1024), 4096)
    x = randn(1, 4096, dtype=torch.bfloat16, seed=5)
    expected = members.group(x)
    source, target = torch.zeros_like(x), torch.zeros_like(members.packed[2])
    packed, members.packed[2] = members.packed[2], target
    for _ in range(20):
        target.zero_(), source.zero_()
        members.group(source)
        target.copy_(packed), source.copy_(x)
        for output, wanted in zip(members.group(source), expected, strict=True):
            assert_bitwise_equal(output, wanted)
        # What follows reads what the group wrote.
        assert_bitwise_equal(members.group(expected[0] * 1)[0], members.group(members.group(x)[0])[0])


@pytest.mark.usefixtures("skinny")
def test_a_group_runs_on_the_current_stream_and_in_graphs() -> None:
    members = Members((512, 128, 128), 4096)
    x = randn(2, 4096, dtype=torch.bfloat16, seed=5)
    expected = members.group(x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read the zeros
        late.copy_(x)
        outputs = members.group(late)
    stream.synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert_bitwise_equal(output, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = members.group(late)
    for seed in (6, 7):
        late.copy_(randn(2, 4096, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        for output, wanted in zip(outputs, members.group(late.clone()), strict=True):
            assert_bitwise_equal(output, wanted)


@pytest.mark.usefixtures("skinny")
def test_groups_on_several_streams_do_not_disturb_each_other() -> None:
    cases = [(Members((264, 40, 24), 4096), randn(m, 4096, dtype=torch.bfloat16, seed=m)) for m in (1, 4, 12)]
    expected = [members.group(x) for members, x in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[Tensor]] = []
    for _ in range(10):
        results.clear()
        for (members, x), stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(members.group(x))
        torch.cuda.synchronize()
        for outputs, wanted in zip(results, expected, strict=True):
            for output, other in zip(outputs, wanted, strict=True):
                assert_bitwise_equal(output, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "k", "m"), [((64, 32, 16), 1024, 20), ((40, 24), 320, 3), ((5, 6, 7, 8), 256, 2)]
)
def test_what_no_launch_serves_runs_one_after_the_other(
    rows: tuple[int, ...], k: int, m: int, dtype: torch.dtype
) -> None:
    """More rows than skinny_sm90 takes, another k, more members, float32."""
    members = Members(rows, k)
    weights = [c_library.describe_weight(n, k) for n in rows]
    torch.cuda.init()
    assert c_library.explain_group(weights, m, dtype).startswith("one after the other: ")
    x = randn(m, k, dtype=dtype, seed=1)
    bias = members.biases(dtype)
    for output, expected in zip(members.group(x, bias), members.singly(x, bias), strict=True):
        assert_bitwise_equal(output, expected)


@pytest.mark.parametrize("name", ["naive", "dense"])
def test_the_forced_kernel_serves_each_member(kernel, name: str) -> None:
    kernel(name, None if name == "naive" else 300_000)
    members = Members((300, 64), 776)
    x = randn(5, 776, dtype=torch.bfloat16, seed=1)
    bias = members.biases(torch.bfloat16)
    for output, expected in zip(members.group(x, bias), members.singly(x, bias), strict=True):
        assert_bitwise_equal(output, expected)


@pytest.mark.usefixtures("skinny")
def test_explain_says_why_there_is_no_one_launch() -> None:
    torch.cuda.init()
    alike = [c_library.describe_weight(n, 1024) for n in (64, 32, 16)]
    other = c_library.describe_weight(16, 1024, quant_type="fp4")
    dtype = torch.bfloat16

    def first_line(weights: list[c_library.Weight4bit]) -> str:
        return c_library.explain_group(weights, 4, dtype).splitlines()[0]

    assert first_line(alike) == "one launch by skinny_sm90"
    assert first_line(alike[:1]) == "one after the other: expected 2 weights or more, got 1"
    assert first_line([*alike, alike[0]]) == "one after the other: expected 1 to 3 weights, got 4"
    assert first_line([alike[0], other]) == (
        "one after the other: expected one input and one format of all weights"
    )
    lines = c_library.explain_group(alike, 4, dtype).splitlines()
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["skinny_sm90"] * 3


def test_the_workspace_is_the_largest_of_the_members(kernel) -> None:
    kernel("dense", 300_000)
    torch.cuda.init()
    weights = [c_library.describe_weight(n, 1024) for n in (64, 512)]
    sizes = [c_library.workspace_size(weight, 40, torch.bfloat16, has_bias=True) for weight in weights]
    plain = [c_library.workspace_size(weight, 40, torch.bfloat16) for weight in weights]
    assert c_library.group_workspace_size(weights, 40, torch.bfloat16, [True, True]) == max(sizes)
    assert c_library.group_workspace_size(weights, 40, torch.bfloat16) == max(plain)
    mixed = c_library.group_workspace_size(weights, 40, torch.bfloat16, [True, False])
    assert mixed == max(sizes[0], plain[1])


def test_wrong_groups_are_refused() -> None:
    torch.cuda.init()
    with pytest.raises(AssertionError, match="count: expected at least 1, got 0"):
        c_library.group_workspace_size([], 4, torch.bfloat16)
    weights = [c_library.describe_weight(16, 1024), c_library.describe_weight(16, 512)]
    with pytest.raises(AssertionError, match="expected the same cols in all, got 1024 and 512"):
        c_library.group_workspace_size(weights, 4, torch.bfloat16)


class Layers(torch.nn.Module):
    """A gate and an up projection of 4-bit layers that compute in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, rows in (("gate_proj", 2048), ("up_proj", 1000)):
            self.add_module(name, torch.nn.Linear(1024, rows, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)


@pytest.fixture
def layers() -> Layers:
    model = quantize_(Layers().requires_grad_(False), device="cuda")
    link_groups(model, in_compiled=True)
    assert isinstance(model, Layers)
    return model


@pytest.mark.usefixtures("skinny")
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_layers_use_one_launch_eagerly_and_compiled(layers: Layers, mode: str | None) -> None:
    torch._dynamo.reset()
    function = layers if mode is None else torch.compile(layers, fullgraph=True, mode=mode)
    alone = copy.deepcopy(layers)  # not linked
    with torch.no_grad():
        for seed in range(4):
            x = randn(1, 3, 1024, dtype=torch.bfloat16, seed=seed)
            for output, expected in zip(function(x), alone(x), strict=True):
                # Sums in another order, then one rounding each.
                torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-7)
        group = layers.gate_proj._group[0]
        assert not group.is_off
        assert group.pending is None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layers(x)
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "skinny_kernel" in event.key]
    counts = [event.count for event in profile.key_averages() if "skinny_kernel" in event.key]
    assert counts == [1], names
