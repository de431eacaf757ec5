"""Checkpoints in host memory: the same gradients as torch's checkpoint, and on a GPU the memory and streams of it."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters, pair, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora
from assertions import assert_same_tensors
from qlora.checkpointing import OffloadedCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")


class HostOfTests:
    """Stands for a host on the CPU; every value that is sent is spoilt where it was, as reused memory would be."""

    def __init__(self) -> None:
        self.sent, self.fetched, self.recycled = 0, 0, 0

    def send(self, value: Tensor) -> tuple[Tensor, None]:
        self.sent += 1
        return value.clone(), None

    def fetch(self, place: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, None]:
        self.fetched += 1
        assert (place.shape, place.dtype) == (shape, dtype)
        return place.clone(), None

    def wait(self, copy: None) -> None:
        pass

    def recycle(self, place: Tensor) -> None:
        self.recycled += 1


def offloaded(host: HostOfTests | None = None) -> OffloadedCheckpoint:
    return OffloadedCheckpoint(lambda _: host or HostOfTests(), min_bytes=1)


class Layer(nn.Module):
    """Takes a hidden state and, by name, a nested structure; drops at random; can fail."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)
        self.fails = 0

    def forward(self, hidden: Tensor, extra: Any = None) -> tuple[Tensor, Tensor]:
        if self.fails:
            self.fails -= 1
            raise KeyError("on purpose")
        inner = torch.tanh(self.first(hidden))
        if extra is not None:
            inner = inner * extra["scales"][0] + extra["shift"]
        return hidden + self.dropout(self.second(inner)), inner


def layers(count: int = 4, dropout: float = 0.0) -> list[Layer]:
    torch.manual_seed(0)
    return [Layer(dropout) for _ in range(count)]


def gradients(parts: list[Layer], run: Any, hidden: Tensor, extra: Any = None) -> list[Tensor]:
    """Of the layers' parameters, after a pass through all of them by `run` (None: no checkpoints)."""
    for part in parts:
        part.zero_grad()
    torch.manual_seed(1)
    for part in parts:
        function = lambda x, part=part: part(x, extra=extra)
        hidden, inner = function(hidden) if run is None else run(function, hidden)
    (hidden.sum() + inner.pow(2).sum()).backward()
    return [parameter.grad.clone() for part in parts for parameter in part.parameters()]


def torchs(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_gradients_are_those_of_torchs_checkpoint(dropout: float, needs_grad: bool) -> None:
    """With dropout too; a frozen input, as of embeddings, and one with a gradient; tensors and lists by name."""
    hidden = torch.randn(3, 8, requires_grad=needs_grad)
    scale = torch.tensor([0.5], requires_grad=True)
    extra = {"scales": [scale], "shift": torch.randn(16)}
    parts, host = layers(dropout=dropout), HostOfTests()
    found = gradients(parts, offloaded(host), hidden, extra), hidden.grad, scale.grad
    hidden.grad = scale.grad = None
    wanted = gradients(parts, torchs, hidden, extra), hidden.grad, scale.grad
    assert all(map(torch.equal, found[0], wanted[0]))
    assert torch.equal(found[2], wanted[2])
    assert not needs_grad or torch.equal(found[1], wanted[1])
    assert (host.sent, host.fetched, host.recycled) == (4, 3, 4)  # the last one is still there


def test_only_the_first_argument_leaves() -> None:
    host = HostOfTests()
    run = offloaded(host)
    weight, mask = torch.randn(8, 8, requires_grad=True), torch.ones(3, 8)
    hidden = torch.randn(3, 8, requires_grad=True)
    for _ in range(2):
        hidden = run(lambda x, mask: torch.tanh(x @ weight) * mask, hidden, mask)
    hidden.sum().backward()
    assert host.sent == 2


def test_another_view_of_the_input_is_not_taken_for_it() -> None:
    hidden, host = torch.randn(8, 8, requires_grad=True), HostOfTests()
    found = []
    for run in (torchs, offloaded(host)):
        hidden.grad = None
        run(lambda x, other: torch.tanh(x @ other) * x, hidden, hidden.t()).sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found) and host.sent == 1


def test_small_strided_and_unmoved_tensors_stay() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    host = HostOfTests()
    for run, hidden in (
        (OffloadedCheckpoint(lambda _: host, min_bytes=1 << 20), torch.randn(3, 8)),
        (OffloadedCheckpoint(lambda _: host, min_bytes=1), torch.randn(8, 3).t()),
        (OffloadedCheckpoint(min_bytes=1), torch.randn(3, 8)),  # on a CPU
    ):
        run(lambda x: torch.tanh(x @ weight), hidden).sum().backward()
    with torch.no_grad():
        offloaded(host)(lambda x: x @ weight, torch.randn(3, 8))
    assert host.sent == 0


def test_a_second_backward_pass_brings_everything_again() -> None:
    parts, host = layers(3), HostOfTests()
    run, hidden = offloaded(host), torch.randn(3, 8)
    for part in parts:
        hidden, _ = run(part, hidden)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    first = torch.autograd.grad(hidden.sum(), parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(hidden.sum(), parameters, allow_unused=True)
    assert all(map(torch.equal, first, second))
    assert host.fetched == 2 + 3


def test_double_backward_is_that_of_torch() -> None:
    def twice(run: Any) -> Tensor:
        parts, hidden = layers(2), torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        result = hidden
        for part in parts:
            result, _ = run(part, result)
        (gradient,) = torch.autograd.grad(result.pow(2).sum(), hidden, create_graph=True)
        gradient.pow(2).sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    assert torch.equal(twice(offloaded()), twice(torchs))


def fails(step: Callable[[], Any]) -> bool:
    """Whether it raises what it is to raise; nothing of that is kept, as pytest.raises would."""
    try:
        step()
    except KeyError:
        failed = True
    else:
        failed = False
    gc.collect()
    return failed


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_error_in_the_middle_leaves_nothing_behind(when: str) -> None:
    parts, host, hidden = layers(), HostOfTests(), torch.randn(3, 8)
    run = offloaded(host)
    wanted = gradients(parts, run, hidden)
    host.recycled = host.sent = 0
    if when == "forward":
        parts[2].fails = 1

    def step() -> None:
        value = hidden
        for part in parts:
            value, _ = run(part, value)
        parts[1].fails = 1
        value.sum().backward()

    assert fails(step)
    assert host.recycled == host.sent > 0
    for part in parts:
        part.fails = 0
    assert all(map(torch.equal, gradients(parts, run, hidden), wanted))


def test_passes_may_be_nested() -> None:
    """Two forward passes before a backward pass, in both orders, and a pass that never has one."""
    parts, run = layers(), offloaded()
    first, second = torch.randn(3, 8), torch.randn(5, 8)
    wanted = [gradients(parts, torchs, hidden) for hidden in (first, second)]
    for order in ((0, 1), (1, 0)):
        losses = []
        for hidden in (first, second):
            for part in parts:
                hidden, inner = run(part, hidden)  # noqa: PLW2901
            losses.append(hidden.sum() + inner.pow(2).sum())
        for index in order:
            for part in parts:
                part.zero_grad()
            losses[index].backward()
            found = [parameter.grad for part in parts for parameter in part.parameters()]
            assert all(map(torch.equal, found, wanted[index]))
    run(parts[0], first)


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    run, (one, two) = offloaded(), layers(2)
    hidden = torch.randn(3, 8)
    result, _ = run(one, hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"layer's input to stay as it was.* got a tensor of \[3, 8\]"):
        run(two, result)


def test_what_is_recomputed_is_autocast_as_before() -> None:
    part, seen = layers(1)[0], []
    part.first.register_forward_hook(lambda _, __, result: seen.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = offloaded()(part, torch.randn(3, 8))
    result.sum().backward()
    assert seen == [torch.bfloat16] * 2


# ---------------------------------------------------------------------------------------------------------------------
# prepare


def losses_and_gradients(model: Any, device: str = "cpu", **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    ids = kwargs.pop("ids", tokens()).to(device)
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def adapted(gradient_checkpointing: Any = True, **kwargs: Any) -> Any:
    model = qlora.prepare(pair(dtype=torch.float32)[0], gradient_checkpointing, **kwargs)
    model = qlora.add_lora(model, r=4).train()
    fill_adapters(model)
    return model


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """But for the rounding of one product, [rows, r], and of sums over tiles."""
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().max()
        assert (found[name] - expected).abs().max() <= bound, name


@pytest.mark.parametrize("options", [("offload", {}), (True, {"memory_budget": "1GB"})], ids=str)
def test_a_prepared_model_has_the_loss_and_gradients_of_plain_checkpointing(options: Any) -> None:
    wanted = losses_and_gradients(adapted())
    model = adapted(options[0], **options[1])
    for each in (model, copy.deepcopy(model)):
        for _ in range(2):
            found = losses_and_gradients(each)
            assert torch.equal(found[0], wanted[0])
            assert_close(found[1], wanted[1])


def test_a_trainer_that_enables_checkpointing_again_keeps_ours() -> None:
    model = adapted("offload")
    layer = model.base_model.model.model.layers[0]
    function = layer._gradient_checkpointing_func
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert layer._gradient_checkpointing_func is function and layer.gradient_checkpointing
    disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    disable()
    assert not layer.gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant: expected False .* got True"):
        enable({"use_reentrant": True})


def test_prepare_called_again_goes_back_to_plain_checkpointing() -> None:
    model = adapted("offload")
    for use_reentrant in (False, True):
        model = qlora.prepare(model, True, use_reentrant=use_reentrant)
        layer = model.get_base_model().model.layers[0]
        assert layer._gradient_checkpointing_func.func is torch.utils.checkpoint.checkpoint
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": use_reentrant}


def test_evaluation_and_generation_are_untouched() -> None:
    plain, model = pair()[0], qlora.prepare(pair()[0], "offload").eval()
    assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(tokens(), **options), plain.generate(tokens(), **options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_checkpointing": "cpu"}, "expected True, False or 'offload', got 'cpu'"),
        ({"gradient_checkpointing": "offload", "use_reentrant": True}, "use_reentrant: expected False"),
        ({"memory_budget": "24 apples"}, "expected bytes or a size such as '24GB'.*got '24 apples'"),
        ({"memory_budget": 0}, "got 0"),
        ({"gradient_checkpointing": False, "memory_budget": 1e9}, "without gradient_checkpointing"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qlora.prepare(pair()[0], **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU


def gpu_model(
    gradient_checkpointing: Any, num_layers: int = 6, attention: str = "sdpa", **kwargs: Any
) -> Any:
    """With "eager" attention two steps are equal bit for bit; the backward pass of the other is not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=num_layers),
        **dict(num_attention_heads=8, num_key_value_heads=4, attn_implementation=attention),
    )
    with torch.device("cuda"):
        dense = LlamaForCausalLM(config).to(torch.bfloat16)
    model = qlora.prepare(qlora.quantize_(dense), gradient_checkpointing, **kwargs)
    model = qlora.add_lora(model, r=8).train()
    fill_adapters(model)
    return model


def gpu_ids(batch: int = 2, length: int = 2048) -> Tensor:
    return torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(3))


def gpu_step(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the peak of memory above what is held before."""
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, found = losses_and_gradients(model, "cuda", ids=ids)
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_bit_for_bit_those_of_plain_checkpointing() -> None:
    """Over several steps and lengths, with blocks that are used again."""
    from qlora.checkpointing import layer_checkpoints, use_checkpoints

    plain, model = gpu_model(True, attention="eager"), gpu_model(True, attention="eager")
    base = model.get_base_model()
    use_checkpoints(base, lambda layers: layer_checkpoints(layers, is_offloaded=True))
    for length in (2048, 1920, 2048, 1000):
        ids = gpu_ids(length=length)
        wanted, found = gpu_step(plain, ids)[0], gpu_step(model, ids)[0]
        assert_same_tensors(found, wanted)


@pytest.mark.gpu
def test_offloading_frees_the_inputs_of_all_but_two_layers() -> None:
    plain, model = gpu_model(True, 16), gpu_model("offload", 16)
    ids = gpu_ids(4)
    for each in (plain, model):
        gpu_step(each, ids)
    saved = gpu_step(plain, ids)[1] - gpu_step(model, ids)[1]
    assert saved >= 12 * ids.numel() * 1024 * 2


@pytest.mark.gpu
def test_the_peak_does_not_grow_with_the_number_of_layers() -> None:
    """Beyond the gradients of the adapters, although Python queues all layers before the GPU has begun."""
    ids = gpu_ids(4)
    peaks = []
    for count in (6, 18):
        model = gpu_model("offload", count)
        gpu_step(model, ids)
        torch.cuda._sleep(2_000_000_000)
        adapters = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        peaks.append(gpu_step(model, ids)[1] - adapters)
        del model
    assert peaks[1] - peaks[0] < ids.numel() * 1024 * 2


@pytest.mark.gpu
def test_a_step_on_another_stream_is_the_same() -> None:
    model, ids = gpu_model("offload", attention="eager"), gpu_ids()
    wanted, _ = gpu_step(model, ids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, _ = gpu_step(model, ids)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_tensors(found, wanted)


@pytest.mark.gpu
def test_an_error_on_a_gpu_frees_all_memory() -> None:
    model, ids = gpu_model("offload"), gpu_ids()
    gpu_step(model, ids)
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    layer = model.get_base_model().model.layers[4]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("on purpose")))
    assert fails(lambda: losses_and_gradients(model, "cuda", ids=ids))
    handle.remove()
    assert torch.cuda.memory_allocated() <= before
    gpu_step(model, ids)
