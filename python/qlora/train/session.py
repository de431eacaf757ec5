"""One training session, from configuration to artifacts.

load -> quantise -> adapter -> held-out loss and samples -> training -> held-out loss and samples -> artifacts

With `calibrate` the quantised base is written before it is loaded (calibrated_base.py).

`output_dir` afterwards: the adapter and tokenizer, args.yaml (a CONFIG for another run), args.json, metrics.jsonl (one
log a line), metrics.json, loss.png, samples.md and the last checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qlora import files
from qlora.nn import report
from qlora.train import calibrated_base, checkpoints, compiling, data, default_task, example, samples, smollm2
from qlora.train import model as models
from qlora.train.config import Config, ConfigError, QloraArguments
from qlora.train.results import RESULT_FILES, Measured, write_history, write_results

DEFAULT_OUTPUT_DIR = "qlora-output"
PREVIOUS = "previous"  # in output_dir: the result of the run before this one
INTERRUPTED = 130

# Defaults for a dataset of the user's own, over TRL's. Where TRL and transformers differ from common QLoRA practice.
DEFAULTS: dict[str, Any] = {
    "output_dir": DEFAULT_OUTPUT_DIR,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class Prepared:
    """What training needs, before any of it has run."""

    arguments: QloraArguments
    trainer: Any
    tokenizer: Any
    interrupt: Any
    progress: Any
    samples: list[samples.Sample]
    has_held_out: bool
    title: str
    layers: str  # how the layers run


def run(config: Config, *, resume: str | None, dry_run: bool) -> int:
    """Runs the session; returns the exit status (130 where Ctrl-C stopped it)."""
    output_dir = Path(config.sft.get("output_dir") or DEFAULT_OUTPUT_DIR)
    checkpoint = None if resume is None else _find_checkpoint(output_dir, resume)
    if checkpoint is not None:
        output_dir = checkpoint.parent
    elif not dry_run:
        _check_room(output_dir, config)
    device = models.pick_device(bool(config.sft.get("use_cpu")))
    defaults = _defaults(config, device, output_dir)
    with _no_empty_directory(output_dir):  # transformers' trainer makes it
        prepared = _prepare(config, defaults, device, output_dir, dry_run=dry_run)
        if checkpoint is not None:
            _check_base(checkpoint, prepared)
        _print_plan(prepared, device)
        if dry_run:
            print("dry run: nothing was trained or written")
            return 0
    if prepared.trainer.is_world_process_zero():
        if checkpoint is None:
            _make_room(output_dir)
        _write_arguments(output_dir, config, defaults)
    before = _measure_before(prepared, output_dir, resumed=checkpoint is not None)
    with _stop_on_interrupt(prepared.interrupt), contextlib.closing(prepared.progress):
        result = prepared.trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
    write_history(output_dir, prepared.trainer)
    if prepared.interrupt.requested:
        _print_interrupted(output_dir, prepared.trainer)
        return INTERRUPTED
    if prepared.interrupt.out_of_time:
        print(f"max_minutes: stopped after {prepared.arguments.max_minutes} minutes")
    after = _measure(prepared)
    write_results(output_dir, prepared, before, after, result, device)
    return 0


@contextlib.contextmanager
def _no_empty_directory(path: Path) -> Iterator[None]:
    """Takes a directory away again that the block made and left empty, however it ends."""
    existed = path.exists()
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()


def _defaults(config: Config, device: torch.device, output_dir: Path) -> dict[str, Any]:
    dtype = config.ours.get("dtype") or models.default_dtype(device)
    defaults = DEFAULTS | {
        "dtype": dtype,
        # The model itself is in 16 bit, so that autocast has nothing to add; float16 needs its loss scaling.
        "bf16": False,
        "fp16": dtype == "float16" and device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": device.type == "cuda",
        "dataloader_pin_memory": device.type == "cuda",
    }
    if config.ours.get("dataset_name") is None:
        defaults |= default_task.settings(device)
    return defaults | {"output_dir": str(output_dir)}


def _prepare(
    config: Config, defaults: dict[str, Any], device: torch.device, output_dir: Path, *, dry_run: bool
) -> Prepared:
    from qlora.train import trainer as training

    arguments = config.arguments(defaults)
    sft = _sft_config(config, defaults)
    name = arguments.model_name_or_path
    title = name or smollm2.NAME
    if name is None:
        name = str(smollm2.model_directory())
    tokenizer = models.load_tokenizer(name, arguments.model_revision, sft.trust_remote_code)
    train, held_out = _datasets(arguments, sft, tokenizer)
    if arguments.calibrate and dry_run:
        print("dry run: the base is not calibrated")
    elif arguments.calibrate:
        texts = calibrated_base.TrainingTexts(train, tokenizer, sft.dataset_text_field)
        base = calibrated_base.calibrated_base(
            name,
            arguments,
            texts,
            output_dir,
            seed=sft.seed,
            dtype=_dtype(config, defaults),
            device=device,
            trust_remote_code=sft.trust_remote_code,
        )
        name = str(base)
    torch.manual_seed(sft.seed)
    print(f"loading {title} ...", flush=True)
    model = models.load_model(
        name,
        arguments,
        device=device,
        dtype=_dtype(config, defaults),
        trust_remote_code=sft.trust_remote_code,
    )
    if arguments.load_in_4bit:
        print(report(model).summary())
    model = models.add_adapter(model, arguments)
    interrupt = training.Interrupt(arguments.max_minutes)
    trainer = training.Trainer(
        model=model,
        args=sft,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[interrupt],
    )
    progress = training.use_short_progress(trainer)
    chosen = (
        []
        if held_out is None
        else held_out.select(range(min(arguments.num_samples, len(held_out)))).to_list()
    )
    return Prepared(
        arguments,
        trainer,
        tokenizer,
        interrupt,
        progress,
        samples.make_samples(chosen, tokenizer, sft.dataset_text_field),
        held_out is not None,
        title,
        compiling.compile_layers(trainer, arguments, device),
    )


def _dtype(config: Config, defaults: dict[str, Any]) -> str:
    dtype = str(config.ours.get("dtype") or defaults["dtype"])
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    return dtype


def _sft_config(config: Config, defaults: dict[str, Any]) -> Any:
    import warnings

    with warnings.catch_warnings():
        # TRL sets the deprecated spelling itself.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        return dataclasses.replace(
            config, sft={**config.sft, "output_dir": defaults["output_dir"]}
        ).sft_config(defaults)


def _datasets(arguments: QloraArguments, sft: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Training and held-out examples as TRL takes them."""
    from datasets import Dataset

    if arguments.dataset_name is None:
        parts = default_task.examples(tokenizer)
        if not parts[0]:
            raise ConfigError(
                "dataset_name: no docstring of the standard library is short enough for this tokenizer"
            )
        train = Dataset.from_list(parts[0])
        held_out = Dataset.from_list(parts[1]) if parts[1] else None
        print(f"data: docstrings of the Python {platform.python_version()} standard library", end="")
    else:
        raw, raw_held_out = data.train_and_held_out(arguments, sft.seed)
        train = _convert(raw, sft, tokenizer)
        held_out = None if raw_held_out is None else _convert(raw_held_out, sft, tokenizer)
        kind = data.recognise(raw.column_names, sft.dataset_text_field).name
        print(f"data: {arguments.dataset_name} ({kind})", end="")
    if held_out is not None and 0 < arguments.eval_samples < len(held_out):
        held_out = held_out.select(range(arguments.eval_samples))
    print(f", {len(train):,} examples to train on, {0 if held_out is None else len(held_out):,} held out")
    return train, held_out


def _convert(raw: Any, sft: Any, tokenizer: Any) -> Any:
    form = data.recognise(raw.column_names, sft.dataset_text_field)
    if sft.assistant_only_loss:
        return data.keep_conversations(raw, form)
    return data.convert(
        raw, form, has_template=bool(tokenizer.chat_template) or sft.chat_template_path is not None
    )


def _find_checkpoint(output_dir: Path, resume: str) -> Path:
    checkpoint, skipped = checkpoints.to_resume(output_dir, resume)
    for directory in skipped:
        print(f"resume: skipping {directory}, which was not written to its end")
    print(f"resuming from {checkpoint}")
    return checkpoint


def _check_base(checkpoint: Path, prepared: Prepared) -> None:
    """Refuses to go on over a calibrated base other than that of the checkpoint: the data have changed."""
    content = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    was, now = content["base_model_name_or_path"], prepared.trainer.model.peft_config["default"]
    if prepared.arguments.calibrate and Path(was).name != Path(now.base_model_name_or_path).name:
        raise ConfigError(
            f"resume: expected the base that {checkpoint} was trained on, {was}, got {now.base_model_name_or_path}: "
            "calibrated on other data or arguments"
        )


def _check_room(output_dir: Path, config: Config) -> None:
    """Refuses to start a fresh run over an unfinished one, unless the user says so."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: expected a directory, {output_dir} is a file")
    old = checkpoints.checkpoints(output_dir)
    if old and not (output_dir / "metrics.json").exists() and not config.ours.get("overwrite_output_dir"):
        raise ConfigError(
            f"output_dir: {output_dir} holds an unfinished run ({old[-1].name}): add --resume to continue it, choose "
            "another --output_dir, or delete its checkpoints with --overwrite_output_dir"
        )


def _make_room(output_dir: Path) -> None:
    """Once a fresh run is known to be able to start: the checkpoints of the one before go, its result moves aside.

    So an adapter never stands beside another run's arguments, and a run that is given up costs none.
    """
    for directory in checkpoints.checkpoints(output_dir):
        checkpoints.remove(directory)
    (output_dir / "before.json").unlink(missing_ok=True)
    if (output_dir / "adapter_config.json").exists():
        previous = output_dir / PREVIOUS
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for path in (output_dir / name for name in RESULT_FILES):
            if path.exists():
                os.replace(path, previous / path.name)
        print(f"the result of the run before is kept in {previous}")


def _print_plan(prepared: Prepared, device: torch.device) -> None:
    trainer, arguments = prepared.trainer, prepared.arguments
    first = trainer.train_dataset[0]
    print(example.render(first["input_ids"], first["labels"], prepared.tokenizer))
    _print_cut(trainer)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    base = (
        f"{arguments.quant_type}, block {arguments.block_size}" if arguments.load_in_4bit else "not quantised"
    )
    print(f"LoRA r={arguments.lora_r} on a base in {base}: {trainable:,} trainable parameters; {where}")
    print(prepared.layers, flush=True)


def _print_cut(trainer: Any) -> None:
    import pyarrow.compute  # type: ignore[import-untyped]

    limit = trainer.args.max_length
    if limit is None or trainer.args.packing:
        return
    lengths = (
        pyarrow.compute.list_value_length(batch["input_ids"])
        for batch in trainer.train_dataset.with_format("arrow").iter(batch_size=1000)
    )
    cut = sum(pyarrow.compute.sum(pyarrow.compute.greater_equal(part, limit)).as_py() for part in lengths)
    if cut:
        print(
            f"  {cut:,} of {len(trainer.train_dataset):,} examples reach max_length {limit} and are cut there"
        )


def _write_arguments(output_dir: Path, config: Config, defaults: dict[str, Any]) -> None:
    """args.yaml and args.json: the given keys over the defaults that were in force, one file a CONFIG for a rerun."""
    import yaml

    effective = {**defaults, **config.given, "output_dir": str(output_dir)}
    effective.pop("overwrite_output_dir", None)
    content = yaml.safe_dump(effective, sort_keys=True, allow_unicode=True)
    files.write_text(output_dir / "args.yaml", content)
    files.write_json(output_dir / "args.json", effective)


def _measure_before(prepared: Prepared, output_dir: Path, *, resumed: bool) -> Measured:
    """Measures the untrained adapter, or reads what the interrupted run measured."""
    path = output_dir / "before.json"
    if resumed:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Measured(**json.loads(path.read_text()))
    before = _measure(prepared)
    if prepared.trainer.is_world_process_zero():
        files.write_json(path, dataclasses.asdict(before))
    return before


def _measure(prepared: Prepared) -> Measured:
    loss = None
    if prepared.has_held_out:
        loss = float(prepared.trainer.evaluate()["eval_loss"])
    answers: list[str] = []
    if prepared.samples:
        answers = samples.generate(
            prepared.trainer.model,
            prepared.tokenizer,
            [sample.prompt for sample in prepared.samples],
            prepared.arguments.sample_tokens,
            is_templated=prepared.samples[0].is_templated,
        )
    return Measured(loss, answers)


@contextlib.contextmanager
def _stop_on_interrupt(interrupt: Any) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the running step; the second one is an ordinary one."""

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def ask(_: int, __: FrameType | None) -> None:
        interrupt.requested = True
        restore()
        print(
            "\nstopping after this step with a checkpoint; Ctrl-C again stops at once",
            file=sys.stderr,
            flush=True,
        )

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def _print_interrupted(output_dir: Path, trainer: Any) -> None:
    state = trainer.state
    again = "" if str(output_dir) == DEFAULT_OUTPUT_DIR else f" --output_dir {output_dir}"
    print(
        f"stopped at step {state.global_step} of {state.max_steps}. To continue: qlora train --resume{again}"
    )
