"""`qlora train --calibrate`: the base fitted to the training data, the same one before and after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny_run

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytestmark = pytest.mark.filterwarnings("default")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qlora  # noqa: E402
from qlora.train import trainer as training  # noqa: E402
from qlora.train.calibrated_base import TrainingTexts  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    tiny_run.write_model(directory / "model")
    tiny_run.write_rows(directory / "rows.jsonl", tiny_run.additions(80))
    return directory


def keys(inputs: Path, output: Path) -> list[str]:
    values = {
        "model_name_or_path": inputs / "model",
        "dataset_name": inputs / "rows.jsonl",
        "output_dir": output,
        "calibrate_tokens": 600,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "dtype": "float32",
        "use_cpu": "true",
        "num_samples": 1,
        "sample_tokens": 4,
    }
    return [*(f"--{key}={value}" for key, value in values.items()), "--calibrate"]


def base(output: Path) -> Path:
    (found,) = output.glob("calibrated-*")
    return found


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output)) == 0
    return output


def test_the_adapter_is_trained_on_a_base_fitted_to_the_training_data(inputs: Path, finished: Path) -> None:
    """The base is what loading with the training texts as calibration gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == base(finished)
    assert json.loads((base(finished) / "calibration.json").read_text())["windows"] == [1, 512]
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    texts = {row["prompt"] + row["completion"] + "<|im_end|>" for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(base(finished))
    seen: list[str] = []

    class Noted(TrainingTexts):
        def __getitem__(self, index: int) -> str:
            seen.append(super().__getitem__(index))
            return seen[-1]

    from datasets import Dataset

    examples = Dataset.from_list(rows).train_test_split(test_size=4, seed=42)["train"]
    config = qlora.QuantConfig(
        compute_dtype="float32",
        calibration=qlora.Calibration(Noted(examples, tokenizer, "text"), num_tokens=600, seed=42),
    )
    model = AutoModelForCausalLM.from_pretrained(
        inputs / "model", quantization_config=config, dtype=torch.float32
    )
    assert seen and set(seen) <= texts
    state, stored = model.state_dict(), load_file(base(finished) / "model.safetensors")
    assert [key for key in stored if not torch.equal(stored[key], state[key])] == []


def test_a_resumed_run_goes_on_over_the_same_base(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedTrainer(training.Trainer):
        def training_step(self, *rest: object, **others: object) -> torch.Tensor:
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*rest, **others)  # type: ignore[no-any-return]

    output = tmp_path / "output"
    monkeypatch.setattr(training, "Trainer", InterruptedTrainer)
    assert tiny_run.run_in_process("train", *keys(inputs, output)) == 130
    monkeypatch.undo()
    written = {path.name: path.stat().st_mtime_ns for path in base(output).iterdir()}
    assert tiny_run.run_in_process("train", "--resume", output) == 0
    assert {path.name: path.stat().st_mtime_ns for path in base(output).iterdir()} == written
    first, second = (load_file(path / "adapter_model.safetensors") for path in (output, finished))
    assert [name for name in second if not torch.equal(first[name], second[name])] == []


def test_resuming_over_other_data_is_refused(
    inputs: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    arguments = [*keys(inputs, output), "--calibrate_tokens=500", "--resume"]
    assert tiny_run.run_in_process("train", *arguments) == 2
    assert "resume: expected the base that" in capsys.readouterr().err


def test_the_base_is_found_where_the_output_was_moved(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output)) == 0
    moved = tmp_path / "moved"
    output.rename(moved)
    arguments = ("--prompt", "7 plus 49 is ", "--max-new-tokens", "4")
    assert tiny_run.run_in_process("generate", moved, *arguments) == 0
    merged = ("--out", tmp_path / "merged", "--mode", "dequantized", "--dtype", "float32")
    assert tiny_run.run_in_process("merge", moved, *merged) == 0
    assert "merged 14 layers" in capsys.readouterr().out


def test_dry_run_does_not_calibrate(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output), "--dry-run") == 0
    assert "dry run: the base is not calibrated" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--quant_type=fp4", "calibrate: expected a base in nf4, got quant_type fp4"),
        ("--load_in_4bit=false", "calibrate: expected a base in nf4, got load_in_4bit false"),
        (
            "--calibrate_tokens=99999",
            "calibrate: qlora: calibration: 76 texts: expected at least 99840",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_one_error(
    inputs: Path, tmp_path: Path, extra: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert tiny_run.run_in_process("train", *keys(inputs, output), extra) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not output.exists()


def test_texts_are_those_that_are_trained_on() -> None:
    tokenizer = tiny_run.make_tokenizer()
    question, answer = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    chat = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    examples = [
        {"text": "plain"},
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": [question], "completion": [answer]},
        {"messages": [question, answer]},
    ]
    texts = TrainingTexts(examples, tokenizer, "text")
    assert [texts[index] for index in range(len(texts))] == [
        "plain<|im_end|>",
        "1+1=2<|im_end|>",
        chat,
        chat,
    ]
