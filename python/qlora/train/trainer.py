"""TRL's SFTTrainer with whole checkpoints and with speed and memory in every log line."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.sft_trainer import SFTTrainer

from qlora.loss import causal_lm_loss, compiled_causal_lm_loss
from qlora.train import checkpoints


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer; every checkpoint it leaves is either marked whole or known to be broken.

    `model` has been through `qlora.prepare`, whose loss is used while training. `speed` measures the optimiser steps
    alone, without evaluation and saving.
    """

    args: Any
    model: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.speed = Speed()
        trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, *args, **kwargs)
        # TRL casts the adapters of 4-bit models to bfloat16, in which AdamW's small steps are lost.
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.data = parameter.data.to(trainable[name])
        self._has_plain_loss = (
            self.args.loss_type == "nll"
            and self.args.label_smoothing_factor == 0
            and self.compute_loss_func is None
            and not self.aux_loss_enabled
            and getattr(model.get_base_model(), "loss_function", None)
            in (causal_lm_loss, compiled_causal_lm_loss)
        )
        self.add_callback(self.speed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss where that is TRL's too: one product with the head, on the trained tokens only.

        TRL's projects every token through the head where there is no Triton, and computes the logits twice.
        """
        if not self._has_plain_loss or not self.model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counted = (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
        )
        self._total_train_tokens += int(
            self.accelerator.reduce(torch.as_tensor(counted, device=self.args.device))
        )
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        inputs["use_cache"] = False
        return super(SFTTrainer, self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_s"] = round(self.speed.tokens_per_second(self._total_train_tokens), 1)
        if "loss" in logs or "eval_loss" in logs:
            logs["peak_memory_gb"] = round(peak_memory_bytes() / 1e9, 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unmark(directory)
        # Rotation deletes older checkpoints at the end of the call: it has to wait until the new one is marked whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(directory)
            checkpoints.keep_newest(directory.parent, limit, self.state.best_model_checkpoint)


class Speed(TrainerCallback):  # type: ignore[misc]
    """Seconds spent between the begin and the end of optimiser steps, in all and since the last log."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._since_log = 0.0
        self._tokens_at_log = 0
        self._began: float | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._began is not None:
            elapsed = time.perf_counter() - self._began
            self.total_seconds += elapsed
            self._since_log += elapsed
            self._began = None

    def tokens_per_second(self, tokens: int) -> float:
        """Speed since the last call, which must have been told the tokens trained on up to then."""
        done, seconds = tokens - self._tokens_at_log, self._since_log
        self._tokens_at_log, self._since_log = tokens, 0.0
        return done / seconds if seconds > 0 else 0.0


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ends training after the running step with a checkpoint: on Ctrl-C (`request`) or when the time is over."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.requested = False
        self.out_of_time = False
        self._max_seconds = None if max_minutes is None else max_minutes * 60
        self._began = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._max_seconds is not None and time.monotonic() - self._began >= self._max_seconds:
            self.out_of_time = state.global_step < state.max_steps
        if self.requested or self.out_of_time:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False
        return control


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' bar, with one short line a log instead of its dictionary, and a line a log without a terminal."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                disable=not sys.stderr.isatty(),
            )
        self.current_step = state.global_step

    def close(self) -> None:
        """Takes the bar off the terminal, where training ended in an error."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        line = describe_log(logs or {}, state)
        if not line or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(line, flush=True)


def describe_log(logs: dict[str, float], state: TrainerState) -> str:
    """One log line: `step 20/200  loss 2.913  ...`; "" for a log that holds neither loss."""
    parts = [f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"]
    if "loss" in logs:
        parts += [
            f"loss {logs['loss']:.3f}",
            f"{logs.get('tokens_per_s', 0):,.0f} tokens/s",
            f"peak {logs.get('peak_memory_gb', 0):.2f} GB",
            f"lr {logs.get('learning_rate', 0):.1e}",
            f"epoch {logs.get('epoch', 0):.2f}",
        ]
    elif "eval_loss" in logs and state.max_steps == 0:
        return f"held-out loss before training {logs['eval_loss']:.3f}"
    elif "eval_loss" in logs:
        parts += [f"held-out loss {logs['eval_loss']:.3f}"]
    else:
        return ""
    return "  ".join(parts)


def peak_memory_bytes() -> int:
    """Peak of the GPU memory that torch allocated, or of the process's resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def use_short_progress(trainer: SFTTrainer) -> Progress:
    """Replaces transformers' own progress or printing callback by ours, which it returns."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    progress = Progress()
    trainer.add_callback(progress)
    return progress
