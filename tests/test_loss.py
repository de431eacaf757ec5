"""qlora.loss against torch's cross-entropy in float64, and LazyLogits against the ordinary head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from qlora import loss as qloss
from qlora.lazy_logits import LazyHead, LazyLogits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test crosses chunk borders."""
    monkeypatch.setattr(qloss, "CHUNK_VALUES", 5 * 97)
    monkeypatch.setattr(qloss, "HEAD_CHUNK_VALUES", 5 * 97)


def example(dtype, rows=23, width=16, vocabulary=97, spread=3.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * spread / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[[0, 7, 22]] = IGNORED
    return hidden, weight, targets


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)])
def test_cross_entropy_equals_float64_within_float32_rounding(dtype, num_items):
    hidden, weight, targets = example(dtype)
    logits = (hidden @ weight.T).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    count = (targets != IGNORED).sum() if num_items is None else num_items
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="sum") / count
    got = qloss.cross_entropy(logits, targets, num_items=num_items)
    expected.backward()
    got.backward()
    assert got.dtype is torch.float32
    # Each row's loss is a float32 logsumexp of 97 values; their sum rounds once a row.
    torch.testing.assert_close(got.double(), expected, rtol=32 * unit_roundoff(torch.float32), atol=0)
    assert logits.grad.dtype is dtype
    # One rounding to the logits' dtype; p and the scale carry a few float32 roundings.
    scale = 1 / float(count)
    tolerance = unit_roundoff(dtype) * 1.01 + 64 * unit_roundoff(torch.float32)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        logits.grad.double(),
        exact.grad,
        rtol=tolerance,
        atol=smallest + scale * 64 * unit_roundoff(torch.float32),
    )
    assert not logits.grad[targets == IGNORED].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_linear_cross_entropy_equals_head_and_cross_entropy(dtype, with_bias, compile):
    hidden, weight, targets = example(dtype)
    bias = torch.linspace(-1, 1, weight.shape[0]).to(dtype) if with_bias else None
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(exact, weight.double(), None if bias is None else bias.double())
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    got = qloss.linear_cross_entropy(hidden, weight, targets, bias=bias, compile=compile)
    expected.backward()
    got.backward()
    # A logit rounds to dtype once (|z| * u), and a loss moves by at most twice the largest change of a logit.
    largest = logits.abs().max().item()
    assert abs(got.item() - expected.item()) <= 2 * largest * unit_roundoff(dtype) + 1e-6
    # dz: |change of p| <= 2 p |change of z|, plus its rounding to dtype; dh sums p - onehot (L1 norm <= 2) times W.
    width = weight.abs().max().item()
    bound = width * 2 * (2 * largest * unit_roundoff(dtype) + 3 * unit_roundoff(dtype)) / 20
    assert (hidden.grad.double() - exact.grad).abs().max().item() <= bound + 1e-7
    assert not hidden.grad[targets == IGNORED].any()


def test_compiled_losses_take_few_graphs_for_any_rows_and_the_gradient_of_a_confident_row():
    torch._dynamo.reset()
    counters.clear()
    hidden, weight, targets = example(torch.float32, rows=41)
    hidden[3] = 4 * weight[targets[3]]  # p_t is next to 1
    for rows in (41, 23, 9, 31):
        for compile in (True, False):
            part = hidden[:rows].clone().requires_grad_()
            loss = qloss.linear_cross_entropy(part, weight, targets[:rows], compile=compile)
            (gradient,) = torch.autograd.grad(loss, part)
            if compile:
                got = loss, gradient
        torch.testing.assert_close(got, (loss, gradient), rtol=1e-5, atol=1e-7)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3  # of the first number, of any, of one row


def test_a_loss_that_cannot_be_compiled_says_so_once_and_is_the_same(monkeypatch):
    def cannot(*_args, **_kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_kwargs: cannot)
    monkeypatch.setattr(qloss, "_compiled_softmax", qloss._compiled_softmax.__wrapped__)
    softmax = qloss._compiled_softmax()
    monkeypatch.setattr(qloss, "_compiled_softmax", lambda: softmax)
    hidden, weight, targets = example(torch.float32)
    hidden.requires_grad_()
    with pytest.warns(UserWarning, match="runs without torch.compile: no compiler") as warned:
        got = [qloss.linear_cross_entropy(hidden, weight, targets, compile=True) for _ in range(2)]
    assert len(warned) == 1
    expected = qloss.linear_cross_entropy(hidden, weight, targets)
    assert got == [expected, expected]


def test_confident_rows_keep_their_gradient():
    """p_t - 1 of a row with p_t = 1 - 1e-4 would round to 0 if p were rounded to bfloat16 first."""
    logits = torch.tensor([[10.0, 0.0, 0.0]]).bfloat16().requires_grad_()
    qloss.cross_entropy(logits, torch.tensor([0])).backward()
    expected = torch.softmax(logits.detach().double(), -1)[0, 0] - 1
    assert logits.grad[0, 0].item() == pytest.approx(expected.item(), rel=2**-8)


@pytest.mark.parametrize("shifted", [False, True])
def test_causal_lm_loss_equals_transformers(shifted):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils", reason="transformers is not installed")
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 9, 97, generator=generator)
    labels = torch.randint(97, (2, 9), generator=generator)
    labels[0, :4] = IGNORED
    extra = {"shift_labels": labels.roll(1)} if shifted else {}
    for num_items in (None, torch.tensor(40)):
        expected = loss_utils.ForCausalLMLoss(logits, labels, 97, num_items_in_batch=num_items, **extra)
        got = qloss.causal_lm_loss(logits, labels, 97, num_items_in_batch=num_items, **extra)
        torch.testing.assert_close(got, expected, rtol=64 * unit_roundoff(torch.float32), atol=0)


def test_no_counted_row_gives_nan_as_torch_does():
    assert qloss.cross_entropy(torch.zeros(3, 5), torch.full((3,), IGNORED)).isnan()


@pytest.mark.parametrize("bad", ["rank", "targets dtype", "targets shape"])
def test_bad_arguments_say_what_came(bad):
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    if bad == "rank":
        logits = logits[None]
    elif bad == "targets dtype":
        targets = targets.int()
    else:
        targets = targets[:2]
    with pytest.raises(ValueError, match=r"qlora.cross_entropy: .*expected .*got "):
        qloss.cross_entropy(logits, targets)


def head_and_hidden(bias=False, dtype=torch.float32):
    torch.manual_seed(3)
    head = LazyHead(16, 97, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    return head, hidden


def test_lazy_logits_answer_metadata_without_values():
    head, hidden = head_and_hidden()
    logits = head(hidden)
    assert isinstance(logits, LazyLogits) and torch.is_tensor(logits)
    assert logits.shape == (2, 9, 97) and logits.dtype is torch.float32 and logits.requires_grad
    assert logits.size(-1) == 97 and logits.dim() == 3 and logits.device == hidden.device
    assert not logits.float().is_computed and not logits.is_computed


def test_lazy_logits_become_ordinary_logits_when_used():
    head, hidden = head_and_hidden(bias=True)
    logits = head(hidden)
    expected = F.linear(hidden, head.weight, head.bias)
    assert torch.equal(logits, expected) and logits.is_computed
    (gradient,) = torch.autograd.grad((head(hidden) / 2).tanh().sum(), hidden)
    (wanted,) = torch.autograd.grad((expected / 2).tanh().sum(), hidden)
    torch.testing.assert_close(gradient, wanted)
    assert head(hidden)[:, -1].shape == (2, 97)


@pytest.mark.parametrize("why", ["eval", "no_grad", "trainable", "hook"])
def test_lazy_head_is_an_ordinary_head_where_laziness_is_unsafe(why):
    head, hidden = head_and_hidden()
    if why == "eval":
        head.eval()
    elif why == "trainable":
        head.requires_grad_(True)
    elif why == "hook":
        head.register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(why != "no_grad"):
        assert type(head(hidden)) is torch.Tensor


def test_loss_of_lazy_logits_equals_loss_of_logits_and_computes_none():
    head, hidden = head_and_hidden(bias=True)
    labels = torch.randint(97, (2, 9))
    logits = head(hidden)
    got = qloss.causal_lm_loss(logits, labels, 97)
    assert not logits.is_computed
    (gradient,) = torch.autograd.grad(got, hidden)
    expected = qloss.causal_lm_loss(F.linear(hidden, head.weight, head.bias), labels, 97)
    (wanted,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, wanted)


def test_autocast_decides_the_dtype_of_lazy_logits():
    head, hidden = head_and_hidden()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        expected = nn.Linear.forward(head, hidden)
    assert logits.dtype is torch.bfloat16
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 485, 2047, 2048, 8188])
@pytest.mark.parametrize("vocabulary", [97, 32000, 49152, 128256, 262144])
def test_chunks_are_of_one_size_and_whole_tiles_where_that_is_the_most_that_fits(num_rows, vocabulary):
    values = 1 << 26
    rows = qloss._rows_per_chunk(num_rows, vocabulary, values)
    assert 1 <= rows <= max(1, values // vocabulary)
    count = -(-num_rows // rows)
    assert count * rows - num_rows < max(1, count)  # the last lacks a row of each other at most
    tiles = -(-rows // qloss.TILE_ROWS)
    assert tiles * qloss.TILE_ROWS <= values // vocabulary or tiles == 1


def test_of_a_float32_chunk_no_more_is_done_than_softmax_needs():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    hidden, weight, targets = example(torch.bfloat16, rows=43)
    with pytest.MonkeyPatch.context() as patch, Recorder():
        patch.setattr(qloss, "HEAD_CHUNK_VALUES", 20 * 97)
        qloss.linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    counts = {name: names.count(name) for name in ("mm", "_log_softmax", "gather", "exp", "scatter_", "sum")}
    assert counts == {"mm": 4, "_log_softmax": 8, "gather": 8, "exp": 8, "scatter_": 2, "sum": 2}
