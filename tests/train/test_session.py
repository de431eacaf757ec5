"""Whole sessions of `qlora train` on a tiny random model: artifacts, resume, interruption, damage."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

import tiny_run

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("default")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from qlora.train import checkpoints  # noqa: E402
from qlora.train import trainer as training  # noqa: E402

STEPS = 6
SAVE_STEPS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    tiny_run.write_model(directory / "model")
    tiny_run.write_rows(directory / "rows.jsonl", tiny_run.additions(40))
    return directory


def keys(inputs: Path, output: Path) -> list[str]:
    """Dropout on, so that a resumed run must restore the random state too."""
    values = {
        "model_name_or_path": inputs / "model",
        "dataset_name": inputs / "rows.jsonl",
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "dtype": "float32",
        "use_cpu": "true",
        "num_samples": 2,
        "sample_tokens": 4,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_same_adapter(got: Path, expected: Path) -> None:
    first, second = adapter(got), adapter(expected)
    assert first.keys() == second.keys()
    different = [name for name in second if not torch.equal(first[name], second[name])]
    assert not different, f"not equal bit for bit: {different}"


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output)) == 0
    return output


def test_every_artifact_is_there(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    wanted = "adapter_model.safetensors adapter_config.json tokenizer.json loss.png metrics.json metrics.jsonl args.json"
    assert set(wanted.split()) | {"args.yaml", "samples.md"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_loss_falls_and_is_recorded(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    loss = metrics["held_out_loss"]
    assert loss["after"] < loss["before"]
    assert metrics["steps"] == STEPS


def test_each_log_line_has_loss_speed_and_memory(finished: Path) -> None:
    logs = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [log for log in logs if "loss" in log]
    assert [log["step"] for log in steps] == list(range(1, STEPS + 1))
    assert all(log["tokens_per_s"] > 0 and log["peak_memory_gb"] > 0 for log in steps)


def test_samples_show_before_and_after(finished: Path) -> None:
    text = (finished / "samples.md").read_text()
    assert text.count("Before:") == text.count("After:") == text.count("Wanted:") == 2


def test_adapters_are_kept_and_optimised_in_float32(finished: Path) -> None:
    assert {tensor.dtype for tensor in adapter(finished).values()} == {torch.float32}


def test_written_arguments_repeat_the_run(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    assert tiny_run.run_in_process("train", finished / "args.yaml", f"--output_dir={output}") == 0
    assert_same_adapter(output, finished)


def test_memory_options_leave_the_result_as_it_is(inputs: Path, finished: Path, tmp_path: Path) -> None:
    options = ["--checkpointing_offload=true", "--memory_budget=1GB", "--embedding_offload=true"]
    assert tiny_run.run_in_process("train", *keys(inputs, tmp_path / "output"), *options) == 0
    assert_same_adapter(tmp_path / "output", finished)


def test_dry_run_writes_nothing(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_run.run_in_process("train", *keys(inputs, tmp_path / "output"), "--dry-run") == 0
    assert not (tmp_path / "output").exists()
    shown = capsys.readouterr().out
    assert "answer | " in shown
    assert "prompt | " in shown


def test_loss_is_on_the_answer_only(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl", [{"instruction": "QUESTION", "output": "REPLY"}] * 4)
    arguments = [*keys(inputs, tmp_path / "output"), f"--dataset_name={rows}", "--dry-run"]
    assert tiny_run.run_in_process("train", *arguments) == 0
    marked = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("  prompt | ", "  answer | "))
    ]
    assert marked[-1] == "  answer | REPLY<|im_end|>"
    assert all(line.startswith("  prompt | ") for line in marked[:-1])


def test_interrupted_run_resumes_to_the_same_weights(
    inputs: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "output"
    begin = training.Speed.on_step_begin

    def press_ctrl_c(
        self: training.Speed, args: object, state: object, control: object, **kwargs: object
    ) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == 2:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training.Speed, "on_step_begin", press_ctrl_c)
        assert tiny_run.run_in_process("train", *keys(inputs, output)) == 130
    # Between two regular checkpoints, in the middle of an epoch.
    assert checkpoints.last_complete(output)[0] == output / "checkpoint-3"
    assert not (output / "metrics.json").exists()
    assert f"To continue: qlora train --resume --output_dir {output}" in capsys.readouterr().out

    # The configuration comes from the interrupted run itself.
    assert tiny_run.run_in_process("train", "--resume", f"--output_dir={output}") == 0
    assert_same_adapter(output, finished)
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "loss" in log] == list(range(1, STEPS + 1))
    before = [
        json.loads((run / "metrics.json").read_text())["held_out_loss"]["before"]
        for run in (output, finished)
    ]
    assert before[0] == before[1]


@pytest.mark.slow
def test_interrupted_run_with_compiled_layers_resumes_to_the_same_weights(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = training.Speed.on_step_begin

    def press_ctrl_c(
        self: training.Speed, args: object, state: object, control: object, **kwargs: object
    ) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == 1:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    compiled = ["--compile_layers=true", "--max_steps=3"]
    assert tiny_run.run_in_process("train", *keys(inputs, whole), *compiled) == 0
    assert "layers: 2 LlamaDecoderLayer compiled" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(training.Speed, "on_step_begin", press_ctrl_c)
        assert tiny_run.run_in_process("train", *keys(inputs, parts), *compiled) == 130
    assert tiny_run.run_in_process("train", "--resume", f"--output_dir={parts}") == 0
    assert_same_adapter(parts, whole)


KILLED_WHILE_SAVING = """
import os, signal, sys
from qlora.cli import main
from qlora.train import checkpoints

mark = checkpoints.mark_complete

def kill_at_step_4(directory):
    if directory.name == "checkpoint-4":
        os.kill(os.getpid(), signal.SIGKILL)
    mark(directory)

checkpoints.mark_complete = kill_at_step_4
sys.exit(main(sys.argv[1:]))
"""

FULL_DISK = """
import resource, sys
from qlora.cli import main
from qlora.train import trainer

save = trainer.Trainer._save_checkpoint

def save_on_a_full_disk(self, model, trial):
    if self.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save(self, model, trial)

trainer.Trainer._save_checkpoint = save_on_a_full_disk
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("script", "status"), [(KILLED_WHILE_SAVING, -signal.SIGKILL), (FULL_DISK, 1)])
def test_death_while_saving_leaves_the_last_checkpoint_usable(
    inputs: Path, finished: Path, tmp_path: Path, script: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    process = tiny_run.run_script(script, "train", *keys(inputs, output))
    assert process.returncode == status, process.stderr
    if status == 1:
        message = [line for line in process.stderr.splitlines() if line.startswith("qlora train: ")]
        assert len(message) == 1
        assert "Traceback" not in process.stderr
    assert (output / "checkpoint-4").is_dir()
    assert checkpoints.last_complete(output) == (output / "checkpoint-2", [output / "checkpoint-4"])

    assert tiny_run.run_in_process("train", "--resume", output) == 0
    assert "skipping" in capsys.readouterr().out
    assert_same_adapter(output, finished)


def test_unfinished_run_is_not_overwritten_unasked(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    (output / "checkpoint-2").mkdir(parents=True)
    assert tiny_run.run_in_process("train", *keys(inputs, output)) == 2
    assert "holds an unfinished run (checkpoint-2): add --resume" in capsys.readouterr().err
    assert (output / "checkpoint-2").is_dir()


def test_run_that_cannot_start_leaves_the_finished_one_alone(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    before = {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("*")}
    assert tiny_run.run_in_process("train", *keys(inputs, output), "--columns=prompt:question") == 2
    assert {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_time_limit_ends_training_as_the_last_step_does(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output), "--max_minutes=0") == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == 1
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dataset_name=none.jsonl"], "dataset_name: no file none.jsonl"),
        (["--model_name_or_path=/nowhere"], "model_name_or_path: cannot load"),
        (["--columns=prompt:question"], "no known format has the columns"),
        (["--dtype=int8"], "dtype: expected bfloat16, float16 or float32, got 'int8'"),
        (["--block_size=65"], "block_size: expected one of"),
        (["--lora_target_modules=q_prj"], "q_proj"),
        (["--lora_rank=4"], "unknown key 'lora_rank': here it is called 'lora_r'"),
        (["--resume"], "resume: no complete checkpoint in"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    inputs: Path, tmp_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output), *extra) in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora train: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not output.exists() or not any(output.iterdir())


def test_a_new_run_keeps_the_earlier_result_aside(tmp_path: Path) -> None:
    """An adapter never stands beside another run's arguments, and no result is lost before there is a new one."""
    from qlora.train.session import _make_room

    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "args.json",
        "metrics.json",
        "notes.txt",
    ):
        (tmp_path / name).write_text(name)
    _make_room(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"previous", "notes.txt"}
    assert (tmp_path / "previous" / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"
    (tmp_path / "args.json").write_text("of a run that was given up")
    _make_room(tmp_path)
    assert (tmp_path / "previous" / "args.json").read_text() == "args.json"
