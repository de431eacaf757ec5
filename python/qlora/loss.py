"""Next-token cross-entropy in chunks: float32 softmax of a few rows at a time, gradients in the logits' own dtype.

For row i with logits z, target t and p = softmax(z):

    loss_i = log(sum_j exp(z_j)) - z_t          d loss_i / d z_j = p_j - [j == t]

Written out for all rows at once, float32 logits and their softmax take 8 bytes a value: 8 GB for 8,192 tokens of a
128 k vocabulary. Here only one chunk of rows is ever in float32. `cross_entropy` starts from the logits;
`linear_cross_entropy` from the hidden states and a frozen head, and never holds more than one chunk of logits at all.
`causal_lm_loss` is what transformers calls (`model.loss_function`): the same values as its ForCausalLMLoss; and
`compiled_causal_lm_loss`, of the same values, in which torch.compile fuses what comes between the two products of a chunk.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .compile_passes import failures
from .lazy_logits import LazyLogits

__all__ = ["causal_lm_loss", "compiled_causal_lm_loss", "cross_entropy", "linear_cross_entropy"]

# Values of one float32 chunk, of which two are live at a time: 32 MiB each, 65 rows of a 128 k vocabulary. A guess
# that keeps the kernels long against their launches, not a measured optimum.
CHUNK_VALUES = 1 << 23
# The head's weight is read again for every product, so its chunks are wider: 512 rows, 128 MiB of 16-bit logits.
HEAD_CHUNK_VALUES = 1 << 26


# Rows of a product's tile on a GPU: one row more would cost another tile.
TILE_ROWS = 128


def _rows_per_chunk(num_rows: int, vocabulary: int, values: int) -> int:
    """Rows of chunks of one size, the last but for the remainder, of at most `values` values."""
    most = max(1, values // max(1, vocabulary))
    most -= most % TILE_ROWS if most > TILE_ROWS else 0
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[:, None])[:, 0]


def _logit_gradients(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """p - onehot(t), over `log_probabilities`. expm1 keeps p_t - 1 exact where p_t is near 1."""
    index = targets[:, None]
    at_target = torch.expm1(log_probabilities.gather(-1, index))
    return log_probabilities.exp_().scatter_(-1, index, at_target)


class _CrossEntropySum(torch.autograd.Function):
    """Sum of the losses of logits [rows, vocabulary]; keeps the logits, writes their gradient in their dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        step = _rows_per_chunk(logits.shape[0], logits.shape[1], CHUNK_VALUES)
        for rows, wanted in zip(torch.split(logits, step), torch.split(targets, step), strict=True):
            ignored = wanted == ignore_index
            losses = _losses(_log_probabilities(rows), wanted.masked_fill(ignored, 0))
            total += losses.masked_fill_(ignored, 0.0).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        step = _rows_per_chunk(logits.shape[0], logits.shape[1], CHUNK_VALUES)
        chunks = (torch.split(tensor, step) for tensor in (logits, targets, gradients))
        for rows, wanted, out in zip(*chunks, strict=True):
            ignored = wanted == ctx.ignore_index
            # No name for the chunk's gradient: it is to be gone when the next one is made.
            out.copy_(
                _logit_gradients(_log_probabilities(rows), wanted.masked_fill(ignored, 0))
                .mul_(grad_total)
                .masked_fill_(ignored[:, None], 0.0)
            )
        return gradients, None, None


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    gradients: Tensor | None,
    is_compiled: bool,
) -> Tensor:
    """Sum of the losses of a chunk; the gradient towards hidden goes to `gradients`.

    A function of its own: its logits are gone when those of the next chunk are made. Their gradients take their place.
    """
    logits = F.linear(hidden, weight, bias)
    index = targets[:, None]
    softmax = _compiled_softmax() if is_compiled and gradients is not None else _softmax
    at_target = softmax(logits, index, is_overwritten=gradients is not None)
    if gradients is not None:
        logits.scatter_(-1, index, torch.expm1(at_target).to(logits.dtype))
        torch.mm(logits, weight, out=gradients)
    return -at_target.sum()


def _softmax(logits: Tensor, index: Tensor, *, is_overwritten: bool) -> Tensor:
    """The log-probabilities of the targets; where asked for, all probabilities take the logits' place.

    Few rows at a time; what can be done for all of them is not done here, where each operation is short against its launch.
    """
    at_target = torch.empty(index.shape, dtype=torch.float32, device=logits.device)
    step = _rows_per_chunk(logits.shape[0], logits.shape[1], CHUNK_VALUES)
    chunks = (torch.split(tensor, step) for tensor in (logits, index, at_target))
    for rows, wanted, out in zip(*chunks, strict=True):
        log_probabilities = _log_probabilities(rows)
        torch.gather(log_probabilities, -1, wanted, out=out)
        if is_overwritten:
            torch.exp(log_probabilities, out=rows)
        del log_probabilities  # gone when the next rows' are made
    return at_target


def _overwrite_by_softmax(logits: Tensor) -> Tensor:
    """log(sum_j exp(z_j)) of each row, whose probabilities take its place, for torch.compile: two kernels.

    Nothing else may read the logits here: torch 2.11 puts it behind their being overwritten.
    """
    values = logits.float()
    log_sums = torch.logsumexp(values, -1, keepdim=True)
    logits.copy_(torch.exp(values - log_sums))
    return log_sums


@functools.cache
def _compiled_softmax() -> Callable[..., Tensor]:
    """`_softmax` by compiled code, or by itself, after a warning, where torch.compile fails."""
    compiled = torch.compile(_overwrite_by_softmax, fullgraph=True)
    has_failed = False

    def softmax(logits: Tensor, index: Tensor, *, is_overwritten: bool) -> Tensor:
        nonlocal has_failed
        if not has_failed:
            at_target = logits.gather(-1, index).float()
            try:
                return at_target.sub_(compiled(logits))
            except failures() as error:  # raised while tracing: nothing has been computed
                has_failed = True
                warnings.warn(f"qlora: the loss runs without torch.compile: {error}", stacklevel=2)
        return _softmax(logits, index, is_overwritten=is_overwritten)

    return softmax


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of the losses of hidden @ weight^T + bias for a frozen head.

    The gradient towards hidden is made in forward, chunk by chunk and unscaled (fp16 loses nothing to a small 1 / n),
    so that the logits are computed once and no more than a chunk of them exists.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, is_compiled: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = _rows_per_chunk(hidden.shape[0], weight.shape[0], HEAD_CHUNK_VALUES)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            out = None if gradients is None else gradients[rows]
            total += _head_loss(hidden[rows], weight, bias, targets[rows], out, is_compiled)
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients.float() * grad_total).to(gradients.dtype), None, None, None, None


def _reduce(total: Tensor, targets: Tensor, ignore_index: int, num_items: Tensor | int | None) -> Tensor:
    if num_items is None:
        return total / (targets != ignore_index).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _check(name: str, values: Tensor, targets: Tensor) -> None:
    if values.dim() != 2 or not values.is_floating_point():
        raise ValueError(
            f"qlora.{name}: expected a floating [rows, width], got {values.dtype} {list(values.shape)}"
        )
    if targets.dtype != torch.int64 or targets.shape != values.shape[:1]:
        wanted = f"int64 [{values.shape[0]}]"
        raise ValueError(
            f"qlora.{name}: targets: expected {wanted}, got {targets.dtype} {list(targets.shape)}"
        )


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of logits, softmax in float32 whatever their dtype.

    Args:
        logits: floating [rows, vocabulary]. Kept for backward; their gradient has their dtype.
        targets: int64 [rows]; rows equal to `ignore_index` do not count.
        num_items: what the sum is divided by; None is the number of rows that count (0 of them give NaN, as torch).

    Returns:
        float32 [].

    Raises:
        ValueError: a shape or dtype is not as said.
    """
    _check("cross_entropy", logits, targets)
    total = _CrossEntropySum.apply(logits, targets, ignore_index)
    return _reduce(total, targets, ignore_index, num_items)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    compile: bool = False,
) -> Tensor:
    """Cross-entropy of hidden @ weight^T + bias without the logits ever existing as a whole.

    Rows that do not count are left out of the products too. The head is frozen: no gradient towards weight or bias.

    Args:
        hidden: floating [rows, width].
        weight: [vocabulary, width] and bias [vocabulary], of the dtype of hidden.
        targets, ignore_index, num_items: as in `cross_entropy`.
        compile: with torch.compile between the two products of a chunk, where a gradient towards hidden is asked for; it
            compiles at the first call of a process, and once more for any number of rows.

    Returns:
        float32 [].

    Raises:
        ValueError: a shape or dtype is not as said, or the head wants a gradient.
    """
    _check("linear_cross_entropy", hidden, targets)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "qlora.linear_cross_entropy: weight: expected a frozen head, got one that requires grad"
        )
    if weight.dtype != hidden.dtype or weight.shape[1:] != hidden.shape[1:]:
        wanted = f"{hidden.dtype} [vocabulary, {hidden.shape[1]}]"
        raise ValueError(
            f"qlora.linear_cross_entropy: weight: expected {wanted}, got {weight.dtype} {list(weight.shape)}"
        )
    kept = (targets != ignore_index).nonzero()[:, 0]
    count = kept.numel() if num_items is None else num_items
    if kept.numel() < targets.numel():
        hidden, targets = hidden[kept], targets[kept]
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _LinearCrossEntropySum.apply(hidden, weight, bias, targets, compile)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    compile: bool = False,
    **kwargs: Any,  # noqa: ARG001  transformers passes what else its forward was called with
) -> Tensor:
    """Next-token loss with the signature and value of transformers' ForCausalLMLoss, without its float32 logits.

    Args:
        logits: [..., vocab_size]; logits of a `LazyLogits` are never computed as a whole.
        labels: int64 [..., length], shifted here so that position i predicts i + 1; `ignore_index` does not count.
        num_items_in_batch: what the sum is divided by; None is the number of labels that count.
        shift_labels: labels that are shifted already, instead of `labels`.
        compile: as in `linear_cross_entropy`, for logits of a `LazyLogits`.

    Returns:
        float32 [].
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    if isinstance(logits, LazyLogits) and not logits.is_computed and logits.shape[-1] == vocab_size:
        hidden, weight, bias = logits.inputs()
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
            compile=compile,
        )
    flat = logits.view(-1, vocab_size)
    return cross_entropy(flat, targets, ignore_index=ignore_index, num_items=num_items_in_batch)


def compiled_causal_lm_loss(*args: Any, **kwargs: Any) -> Tensor:
    """`causal_lm_loss` with `compile`. A function, of which a copied or pickled model has the same."""
    return causal_lm_loss(*args, **{**kwargs, "compile": True})
