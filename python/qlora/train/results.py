"""What a finished run leaves in `output_dir`, and what it says at its end."""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora import files
from qlora.train import samples
from qlora.train.plot import write_loss_plot

if TYPE_CHECKING:
    from qlora.train.session import Prepared


DESCRIPTIONS = ("loss.png", "metrics.json", "metrics.jsonl", "samples.md", "args.yaml")
RESULT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "args.json", *DESCRIPTIONS)


@dataclass
class Measured:
    """Held-out loss (None without held-out data) and the samples' answers at one moment."""

    loss: float | None
    answers: list[str]


def write_history(output_dir: Path, trainer: Any) -> None:
    """metrics.jsonl: every log of the run, also of the part before it was resumed."""
    if trainer.is_world_process_zero():
        lines = [json.dumps(entry) for entry in trainer.state.log_history]
        files.write_text(output_dir / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def write_results(
    output_dir: Path, prepared: Prepared, before: Measured, after: Measured, result: Any, device: torch.device
) -> None:
    """The adapter first, then all that describes it; ends with a summary on the terminal."""
    trainer = prepared.trainer
    if not trainer.is_world_process_zero():
        return
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=output_dir) as scratch:
        trainer.model.save_pretrained(scratch)
        prepared.tokenizer.save_pretrained(scratch)
        files.move_files(Path(scratch), output_dir)
    if prepared.samples:
        text = samples.as_markdown(
            prepared.samples, before.answers, after.answers, f"{prepared.title}: samples"
        )
        files.write_text(output_dir / "samples.md", text)
    history = trainer.state.log_history
    write_loss_plot(
        output_dir / "loss.png", history, _held_out_points(prepared, before, after), prepared.title
    )
    metrics = _metrics(prepared, before, after, result, device)
    files.write_json(output_dir / "metrics.json", metrics)
    (output_dir / "before.json").unlink(missing_ok=True)
    _print_results(output_dir, prepared, before, after, metrics)


def _held_out_points(prepared: Prepared, before: Measured, after: Measured) -> list[tuple[int, float]]:
    state = prepared.trainer.state
    points = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    ends = ((0, before.loss), (state.global_step, after.loss))
    return points + [(step, loss) for step, loss in ends if loss is not None]


def _metrics(
    prepared: Prepared, before: Measured, after: Measured, result: Any, device: torch.device
) -> dict[str, Any]:
    trainer = prepared.trainer
    logs = [entry for entry in trainer.state.log_history if "tokens_per_s" in entry]
    change = None
    if before.loss is not None and after.loss is not None:
        change = 100 * (after.loss / before.loss - 1)
    names = ("qlora-kernels", "torch", "transformers", "peft", "trl")
    return {
        "model": prepared.title,
        "held_out_loss": {"before": before.loss, "after": after.loss, "change_percent": change},
        "steps": trainer.state.global_step,
        "training_loss": result.training_loss,
        "seconds_in_steps": round(trainer.speed.total_seconds, 2),
        "tokens_per_s": logs[-1]["tokens_per_s"] if logs else None,
        "peak_memory_gb": max((entry["peak_memory_gb"] for entry in logs), default=None),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "CPU",
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "versions": {name: _version(name) for name in names} | {"python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print_results(
    output_dir: Path, prepared: Prepared, before: Measured, after: Measured, metrics: dict[str, Any]
) -> None:
    for sample, old, new in zip(prepared.samples, before.answers, after.answers, strict=True):
        print(f"\n{_shorten(sample.shown, 6)}\n  wanted: {_one_line(sample.wanted)}")
        print(f"  before: {_one_line(old)}\n  after:  {_one_line(new)}")
    print(f"\ntrained {metrics['steps']} steps in {metrics['seconds_in_steps']:.0f} s")
    if before.loss is not None and after.loss is not None:
        change = metrics["held_out_loss"]["change_percent"]
        print(f"held-out loss: {before.loss:.3f} -> {after.loss:.3f} ({change:+.1f} %)")
    described = [name for name in DESCRIPTIONS if (output_dir / name).exists()]
    print(f"written to {output_dir}: the adapter, {', '.join(described)}")


def _one_line(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _shorten(text: str, lines: int) -> str:
    parts = text.splitlines()
    return "\n".join(parts if len(parts) <= lines else [*parts[: lines - 1], "    ..."])
