"""`estimate_memory` and what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ..config import COMPUTE_DTYPES, QuantConfig, dtype_name
from ..preparation import check_checkpointing
from . import fake, search
from .attention import CountedLabels, cuda_attention_kernels, unpacked_batches
from .layers import TimelineMeter
from .terms import ADAPTERS, CUBLAS_WORKSPACE, MOVING, TERMS
from .timeline import Peak, Step, Timeline
from .workspace import CUBLAS, MIB, workspace_bytes

GIB = 1 << 30
CONTEXT = 600 * MIB  # assumed: CUDA context and loaded kernels; 0.4 to 0.6 GiB by driver and GPU
_SETTLED = 4  # steps of a size until a memory budget has found its plan
SLACK = 0.05  # assumed: what the allocator reserves beyond what is allocated, of all that comes and goes


@dataclass
class Estimate:
    """Bytes of one training step.

    Attributes:
        model, seq, batch, settings: what was asked.
        terms: bytes by term at the peak.
        phase: of the step in which the peak is.
        model_bytes: what the model takes before training, without adapters.
        context, slack: assumed bytes outside the allocator's peak: CUDA context, and memory reserved but not allocated.
        gpu: GiB of the card, or None.
        seq_limit: the longest sequence that the model is made for, or None; longest_seq goes no further.
        longest_seq: longest sequence at this batch that fits the card, a multiple of search.STEP; 0 if none; None
            without gpu.
        largest_batch: the same of the batch at this length.
        num_layers, num_recomputed: with a memory budget, the checkpointed layers and those that it has recomputed; else
            None.
    """

    model: str
    seq: int
    batch: int
    settings: dict[str, Any]
    terms: dict[str, int]
    phase: str
    model_bytes: int
    context: int
    slack: int
    seq_limit: int | None = None
    gpu: float | None = None
    longest_seq: int | None = None
    largest_batch: int | None = None
    num_layers: int | None = None
    num_recomputed: int | None = None

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated() would say."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        """What the card must have."""
        return self.peak + self.context + self.slack

    @property
    def fits(self) -> bool | None:
        return None if self.gpu is None else self.total <= self.gpu * GIB

    def to_dict(self) -> dict[str, Any]:
        """All of it, in plain values; sizes in bytes, gpu in GiB."""
        return vars(self) | {"peak": self.peak, "total": self.total, "fits": self.fits}


class FakeTraining:
    """A model of fake tensors, on which steps of any size run, as in the middle of a training.

    Args:
        model: from `fake.trainable`, on the meta device.
        keeps_gradients: whether gradients of the batch before are there when the next one goes forward.
        autocast: dtype, or None for none.
        padded: whether the batch has padding.
        meter: that of the model's memory budget, if it has one.
        has_host_embeddings: whether the input embeddings are not on the GPU.
    """

    def __init__(
        self,
        model: Any,
        *,
        keeps_gradients: bool,
        autocast: torch.dtype | None,
        padded: bool,
        meter: TimelineMeter | None = None,
        has_host_embeddings: bool = False,
    ) -> None:
        self.model, self.autocast, self.padded = model, autocast, padded
        self.keeps_gradients = keeps_gradients
        self.meter, self.budget = meter, fake.budget_of(model)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake.materialise(model, self._mode)
        table = model.get_input_embeddings().weight if has_host_embeddings else None
        held = [(term, tensor) for term, tensor in fake.held_tensors(model) if tensor is not table]
        self._step = Step(model, held)
        self.model_bytes = bytes_of(tensor for term, tensor in held if term != ADAPTERS)
        self._peaks: dict[tuple[int, int], Peak] = {}
        self._run(1, 2)  # makes the optimizer's state

    def peak(self, batch: int, seq: int) -> Peak:
        """The peak of a step; with a memory budget, of the first of its size, in which all layers are recomputed."""
        if (batch, seq) not in self._peaks:
            if self.budget is not None:
                self.budget.forget()
            self._peaks[batch, seq] = self._run(batch, seq).peak()
        return self._peaks[batch, seq]

    def peak_within_budget(self, batch: int, seq: int) -> tuple[Peak, int]:
        """The peak of a later step of the same size, and how many layers it recomputes."""
        assert self.budget is not None
        self.budget.forget()
        peaks = [self._run(batch, seq).peak() for _ in range(_SETTLED)]
        return peaks[-1], self.budget.num_layers - self.budget.num_kept

    def _run(self, batch: int, seq: int) -> Timeline:
        timeline = Timeline(workspace_bytes)
        if self.meter is not None:
            self.meter.timeline = timeline
        try:
            with (
                warnings.catch_warnings(),
                cuda_attention_kernels(),
                unpacked_batches(),
                self._mode,
                CountedLabels(batch, seq),
            ):
                warnings.simplefilter("ignore")  # of the kinds that the training itself will show
                inputs = self._inputs(batch, seq)
                self._step.run(inputs, timeline, keeps_gradients=self.keeps_gradients, autocast=self.autocast)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                "qlora.estimate_memory: model: expected one whose step does not depend on the values of tensors, got "
                f"{type(self.model.get_base_model()).__name__}, which does in {error.func}"
            ) from error
        return timeline

    def _inputs(self, batch: int, seq: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros((batch, seq), dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        return inputs | ({"attention_mask": torch.ones_like(ids)} if self.padded else {})


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What the allocator counts for tensors, storage shared among them once."""
    timeline = Timeline()
    timeline.hold(tensors, "")
    return timeline.peak().num_bytes


def estimate_memory(
    model: str | Any,
    *,
    seq: int = 1024,
    batch: int = 4,
    r: int = 16,
    targets: str | Sequence[str] = "all-linear",
    dtype: torch.dtype | str = "bfloat16",
    gradient_checkpointing: bool | str = True,
    memory_budget: float | str | None = None,
    embedding_offload: bool = False,
    gradient_accumulation: int = 4,
    autocast: bool = False,
    padded: bool = False,
    quant_config: QuantConfig | None = None,
    gpu: float | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """What a training step needs of a GPU's memory. Reads the configuration of a model, no weight, and needs no GPU.

    The defaults are those of `qlora train`: adapters in float32 and their AdamW state, no autocast, gradients that
    are added up over several batches.

    Args:
        model: a directory, a hub name, or a transformers configuration.
        seq, batch: tokens of a sequence, at least 2, and sequences of a batch.
        r, targets: of the adapter, as in `qlora.add_lora`.
        dtype: of what is not in 4 bits and of the products.
        gradient_checkpointing, memory_budget, embedding_offload: as in `qlora.prepare`. With a budget longest_seq and
            largest_batch are those of a step that recomputes all layers.
        gradient_accumulation: batches of an optimizer step; from 2 on gradients are there while a batch goes forward.
        autocast: run forward under torch.autocast of `dtype`, as TrainingArguments' bf16=True does.
        padded: the batch has padding, so that attention takes a mask.
        quant_config: None: QuantConfig().
        gpu: GiB of a card: also look for the longest sequence and the largest batch that fit.
        trust_remote_code: run the model code of a hub repository.

    Raises:
        ValueError: a value is not as said, the model has no configuration or is no causal language model, or its step
            depends on values. What `qlora.add_lora` and `qlora.prepare` raise.
    """
    name = _check_dtype(dtype)
    for what, value, least in (
        ("seq", seq, 2), ("batch", batch, 1), ("gradient_accumulation", gradient_accumulation, 1)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"qlora.estimate_memory: {what}: expected an integer of at least {least}, got {value!r}"
            )
    if gpu is not None and not gpu > 0:
        raise ValueError(f"qlora.estimate_memory: gpu: expected a positive number of GiB, got {gpu!r}")
    config = fake.read_config(model, trust_remote_code=trust_remote_code) if isinstance(model, str) else model
    training = build(
        config,
        r=r,
        targets=targets,
        dtype=getattr(torch, name),
        gradient_checkpointing=gradient_checkpointing,
        memory_budget=memory_budget,
        embedding_offload=embedding_offload,
        gradient_accumulation=gradient_accumulation,
        autocast=autocast,
        padded=padded,
        quant_config=quant_config or QuantConfig(),
        trust_remote_code=trust_remote_code,
    )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    result = _estimate(training, batch, seq)
    if training.budget is not None:
        peak, recomputed = training.peak_within_budget(batch, seq)
        result = _of_peak(training, batch, seq, peak)
        result.num_layers, result.num_recomputed = training.budget.num_layers, recomputed
    result.model = model if isinstance(model, str) else type(model).__name__
    result.settings = {
        "r": r, "targets": targets if isinstance(targets, str) else list(targets), "dtype": name,
        "gradient_checkpointing": gradient_checkpointing, "memory_budget": memory_budget,
        "embedding_offload": embedding_offload, "gradient_accumulation": gradient_accumulation,
        "autocast": autocast, "padded": padded,
    }  # fmt: skip
    result.seq_limit = limit
    if gpu is not None:
        room = int(gpu * GIB)
        result.gpu = gpu
        result.longest_seq = search.largest(
            lambda length: _estimate(training, batch, length).total,
            room,
            step=search.STEP,
            start=seq,
            limit=limit,
        )
        result.largest_batch = search.largest(
            lambda size: _estimate(training, size, seq).total, room, step=1, start=batch, limit=None
        )
    return result


def _check_dtype(dtype: torch.dtype | str) -> str:
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(dtype), dtype_name(dtype))
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"qlora.estimate_memory: dtype: expected one of {COMPUTE_DTYPES}, got {dtype!r}")
    return name


def build(
    config: Any,
    *,
    r: int,
    targets: str | Sequence[str],
    dtype: torch.dtype,
    gradient_checkpointing: bool | str,
    gradient_accumulation: int,
    autocast: bool,
    padded: bool,
    quant_config: QuantConfig,
    memory_budget: float | str | None = None,
    embedding_offload: bool = False,
    trust_remote_code: bool = False,
) -> FakeTraining:
    """The model of a configuration, ready for fake steps."""
    model = fake.meta_model(config, dtype, quant_config, trust_remote_code=trust_remote_code)
    num_bytes = check_checkpointing(gradient_checkpointing, memory_budget)
    meter = None if num_bytes is None else TimelineMeter(CUBLAS)
    adapted = fake.trainable(
        model,
        r=r,
        targets=targets,
        gradient_checkpointing=gradient_checkpointing,
        memory_budget=num_bytes,
        embedding_offload=embedding_offload,
        meter=meter,
    )
    return FakeTraining(
        adapted,
        keeps_gradients=gradient_accumulation > 1,
        autocast=dtype if autocast else None,
        padded=padded,
        meter=meter,
        has_host_embeddings=embedding_offload,
    )


def _estimate(training: FakeTraining, batch: int, seq: int) -> Estimate:
    return _of_peak(training, batch, seq, training.peak(batch, seq))


def _of_peak(training: FakeTraining, batch: int, seq: int, peak: Peak) -> Estimate:
    found = peak.terms | {CUBLAS_WORKSPACE: CUBLAS}
    terms = {term: found.get(term, 0) for term in TERMS}
    moving = sum(terms[term] for term in MOVING)
    return Estimate("", seq, batch, {}, terms, peak.phase, training.model_bytes, CONTEXT, int(SLACK * moving))
