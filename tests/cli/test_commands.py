"""`qlora generate`, `merge` and `quantize` on the result of a small training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import tiny_run

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("default")

import torch  # noqa: E402

GENERATE = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that changes the model's answers."""
    directory = tmp_path_factory.mktemp("trained")
    rows = tiny_run.write_rows(directory / "rows.jsonl", [{"prompt": "say ", "completion": "ooooooo"}] * 16)
    output = directory / "output"
    keys = ["--max_steps=20", "--learning_rate=3e-2", "--lora_r=8", "--num_samples=0", "--eval_fraction=0"]
    keys += ["--per_device_train_batch_size=8", "--gradient_accumulation_steps=1", "--use_cpu=true"]
    names = [f"--model_name_or_path={model}", f"--dataset_name={rows}", f"--output_dir={output}"]
    assert tiny_run.run_in_process("train", *names, *keys) == 0
    return output


def generate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert tiny_run.run_in_process("generate", *arguments, "--raw", *GENERATE) == 0
    return capsys.readouterr().out.strip()


def test_adapter_answers_as_it_was_trained(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = generate(capsys, adapter, "--prompt", "say ")
    assert trained == "oooooo"
    assert generate(capsys, model, "--adapter", adapter, "--prompt", "say ") == trained
    assert generate(capsys, model, "--prompt", "say ") != trained


def test_generate_takes_the_last_training_by_default(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qlora-output").symlink_to(adapter)
    assert generate(capsys, "--prompt", "say ") == "oooooo"


def test_prompts_come_from_stdin_one_a_line(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say \n\nsay \n"))
    assert generate(capsys, adapter) == ">>> say \noooooo\n>>> say \noooooo"


def test_sampling_repeats_with_its_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "a", "--temperature", "5")
    first = generate(capsys, model, *options, "--seed", "1")
    assert generate(capsys, model, *options, "--seed", "1") == first
    assert generate(capsys, model, *options, "--seed", "2") != first


def test_merged_checkpoint_answers_without_the_adapter(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert tiny_run.run_in_process("merge", adapter, "--out", merged) == 0
    assert "merged 14 layers" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert generate(capsys, merged, "--no-4bit", "--prompt", "say ") == "oooooo"


def test_the_quantisation_of_the_training_is_read_back(adapter: Path, tmp_path: Path) -> None:
    from qlora.cli.trained import quantisation_of

    assert quantisation_of(adapter) == {}  # the defaults were not given
    copy = tmp_path / "adapter"
    copy.mkdir()
    (copy / "args.json").write_text('{"quant_type": "fp4", "block_size": 128, "lora_r": 4}')
    assert quantisation_of(copy) == {"quant_type": "fp4", "block_size": 128}


def test_quantised_checkpoint_loads_with_the_same_values(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import qlora

    out = tmp_path / "nf4"
    assert (
        tiny_run.run_in_process("quantize", model, "--out", out, "--block-size", "128", "--dtype", "float32")
        == 0
    )
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    )
    assert (out / "tokenizer.json").is_file()
    # With a configuration of ours, so that ours also reads it where bitsandbytes is installed.
    reloaded = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=qlora.QuantConfig(), dtype=torch.float32
    )
    config = qlora.QuantConfig(block_size=128, compute_dtype="float32")
    direct = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, direct(tokens).logits)


def test_failed_quantize_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PreTrainedModel

    def no_space(_: object, directory: str, **__: object) -> None:
        (Path(directory) / "model.safetensors").write_bytes(bytes(10))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", no_space)
    assert tiny_run.run_in_process("quantize", model, "--out", tmp_path / "nf4") == 1
    assert capsys.readouterr().err.endswith("qlora quantize: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--adapter", "nowhere", "--prompt", "x"],
            "--adapter: expected a directory with adapter_config",
        ),
        (["generate", "--prompt", "x"], "there is no training output in qlora-output"),
        (["generate", "{model}", "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["merge", "{model}", "--out", "out"], "ADAPTER: expected a directory with adapter_config.json"),
        (["merge", "{adapter}", "--out", "{model}"], "--overwrite replaces it"),
        (["quantize", "{model}", "--out", "{model}"], "exists already"),
        (["quantize", "{model}", "--out", "out", "--block-size", "65"], "block_size: expected one of"),
    ],
)
def test_bad_arguments_are_one_message_and_status_2(
    model: Path,
    adapter: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert tiny_run.run_in_process(*(word.format(model=model, adapter=adapter) for word in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora ")]
    assert len(errors) == 1
    assert message in errors[0]
