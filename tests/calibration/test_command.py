"""`qlora quantize --calibrate`."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import tiny_run

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


def test_calibrated_checkpoint_is_of_bitsandbytes_layout(model: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import qlora

    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ("--out", out, "--dtype", "float32", "--calibrate", text, "--calibrate-tokens", "1200")
    assert tiny_run.run_in_process("quantize", model, *arguments) == 0
    assert not (tmp_path / "out.calibration").exists()
    plain = tmp_path / "plain"
    assert tiny_run.run_in_process("quantize", model, "--out", plain, "--dtype", "float32") == 0
    stored, expected = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert {key: (value.dtype, value.shape) for key, value in stored.items() if "quant_state" not in key} == {
        key: (value.dtype, value.shape) for key, value in expected.items() if "quant_state" not in key
    }
    assert stored.keys() == expected.keys()
    configs = [json.loads((path / "config.json").read_text()) for path in (out, plain)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    report = json.loads((out / "calibration.json").read_text())
    assert report["windows"] == [2, 512]
    assert len(report["layers"]) == 14 and report["mean_ratio"] < 1
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    loaded = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=qlora.QuantConfig(), dtype=torch.float32
    )
    state = loaded.state_dict()
    assert [key for key in stored if not torch.equal(state[key], stored[key])] == []


def test_a_data_set_is_a_text(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = tiny_run.write_rows(
        tmp_path / "rows.jsonl", [{"text": f"{n} plus {n} is {2 * n}"} for n in range(40)]
    )
    out = tmp_path / "out"
    arguments = ("--out", out, "--calibrate", rows, "--calibrate-tokens", "256", "--seed", "3")
    assert tiny_run.run_in_process("quantize", model, *arguments) == 0
    report = json.loads((out / "calibration.json").read_text())
    assert (report["text"], report["seed"], report["windows"]) == ("rows.jsonl", 3, [1, 256])


def test_bitsandbytes_loads_the_checkpoint(model: Path, text: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import qlora

    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ("--out", out, "--dtype", "float32", "--calibrate", text, "--calibrate-tokens", "256")
    assert tiny_run.run_in_process("quantize", model, *arguments) == 0
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    stats = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
    theirs = functional.dequantize_4bit(
        stored[name], functional.QuantState.from_dict(stats, torch.device("cpu"))
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=qlora.QuantConfig(), dtype=torch.float32
    )
    ours = loaded.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
    # One fused multiply-add or two roundings in a scale: a unit in its last place.
    assert ((theirs - ours).abs() <= 2.0**-22 * ours.abs().amax()).all()


PLAIN = """
import sys
from qlora.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILLED = """
import os, signal, sys
from qlora.calibration.work import Work
from qlora.cli import main
save = Work.save

def save_and_die(self, index, *rest):
    save(self, index, *rest)
    os.kill(os.getpid(), signal.SIGKILL)

Work.save = save_and_die
sys.exit(main(sys.argv[1:]))
"""
FULL_DISK = """
import resource, sys
from qlora.calibration.work import Work
from qlora.cli import main
save = Work.save

def save_on_a_full_disk(self, index, *rest):
    if index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save(self, index, *rest)

Work.save = save_on_a_full_disk
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("script", "status"), [(KILLED, -signal.SIGKILL), (FULL_DISK, 1)])
def test_the_same_command_goes_on_after_a_death(
    model: Path, text: Path, tmp_path: Path, script: str, status: int
) -> None:
    pytest.importorskip("matplotlib")
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ("--calibrate", text, "--calibrate-tokens", "256")
    died = tiny_run.run_script(script, "quantize", model, "--out", out, *options)
    assert died.returncode == status, died.stderr
    assert not out.exists()
    left = sorted(path.name for path in (tmp_path / "out.calibration").iterdir())
    assert left == ["layer-00000.safetensors", "plan.json"]
    if status == 1:
        messages = [line for line in died.stderr.splitlines() if line.startswith("qlora quantize: ")]
        assert len(messages) == 1 and "Traceback" not in died.stderr
    # In processes of their own like the first: the bytes are the same with the same number of threads.
    for directory in (out, whole):
        done = tiny_run.run_script(PLAIN, "quantize", model, "--out", directory, *options)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.calibration").exists()
    first, second = ((path / "model.safetensors").read_bytes() for path in (out, whole))
    assert first == second


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "expected the path of a text file (texts go in a list), got"),
        (b"", [], "text.txt: expected a text, got an empty file"),
        (b"\xff\xfe\x00", [], "expected UTF-8 text"),
        (
            b"short",
            [],
            "text.txt: expected at least 32768 tokens, got 5: take a longer text or fewer tokens",
        ),
        (b"short", ["--calibrate-tokens", "0"], "num_tokens: expected at least 1, got 0"),
        (b"short", ["--budget", "0"], "budget: expected a positive number, got 0"),
        (b"short", ["--quant-type", "fp4"], "quant_type: expected 'nf4' with a calibration, got 'fp4'"),
    ],
)
def test_bad_text_is_one_message_and_status_2(
    content: bytes | None,
    arguments: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    assert tiny_run.run_in_process("quantize", model, "--out", out, "--calibrate", path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not out.exists() and not (tmp_path / "out.calibration").exists()


def test_a_quantised_model_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = tmp_path / "four"
    assert tiny_run.run_in_process("quantize", model, "--out", four) == 0
    out = tmp_path / "out"
    assert tiny_run.run_in_process("quantize", four, "--out", out, "--calibrate", text) == 2
    assert f"expected a model in 16 or 32 bit, got a quantised one: {four}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--calibrate-tokens", "--seed", "--budget"])
def test_options_without_a_text_are_refused(
    option: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_run.run_in_process("quantize", model, "--out", tmp_path / "x", option, "9") == 2
    assert f"{option}: expected with --calibrate TEXT, got it alone" in capsys.readouterr().err
