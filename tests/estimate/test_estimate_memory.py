"""`qlora.estimate_memory` and `qlora estimate`: measured figures, what fits, messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from qlora.cli.main import main
from qlora.estimate.estimator import GIB, build
from qlora.estimate.search import STEP
from qlora.estimate.terms import KEPT, LOSS, WORKING, WORKSPACE

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def llama3_8b() -> Any:
    from qlora.bench.llama import llama3_8b_config

    return llama3_8b_config()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a configuration and no weights."""
    with torch.device("meta"):
        tiny_models.make_model("llama").config.save_pretrained(tmp_path)
    return tmp_path


def test_the_figures_of_docs_benchmarks_are_met_within_5_percent() -> None:
    """`qlora bench train` on an H100: 5.70 GB after loading, a peak of 10.47 GB at 4x2048."""
    from qlora.estimate.workspace import CUBLAS

    training = build(
        llama3_8b(), r=16, targets="all-linear", dtype=torch.bfloat16, gradient_checkpointing=True,
        gradient_accumulation=1, autocast=True, padded=False, quant_config=qlora.QuantConfig(),
    )  # fmt: skip
    assert training.model_bytes == pytest.approx(5.70e9, rel=0.05)
    assert training.peak(4, 2048).num_bytes + CUBLAS == pytest.approx(10.47e9, rel=0.05)


def test_nothing_of_the_weights_is_read(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["config.json"]
    found = qlora.estimate_memory(str(directory), seq=64, batch=2)
    assert found.peak == sum(found.terms.values())
    assert found.total == found.peak + found.context + found.slack
    rank, width, inner, layers = 16, 64, 128, 2
    ranks = 2 * (width + width) + 2 * (width + width // 2) + 3 * (width + inner)
    adapters = layers * ranks * rank * 4
    assert adapters <= found.terms["adapters"] <= adapters + layers * 14 * 512
    assert found.terms["optimizer state"] >= 2 * adapters
    assert found.terms["gradients"] >= adapters  # of the batch before: accumulation is on


def test_a_4_bit_checkpoint_needs_what_its_16_bit_one_does(directory: Path) -> None:
    before = qlora.estimate_memory(str(directory), seq=64, batch=2)
    path = directory / "config.json"
    stored = json.loads(path.read_text()) | {"quantization_config": qlora.QuantConfig().to_dict()}
    path.write_text(json.dumps(stored))
    assert qlora.estimate_memory(str(directory), seq=64, batch=2).terms == before.terms


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"seq": 64}, {"seq": 128}),
        ({"batch": 2}, {"batch": 3}),
        ({}, {"gradient_checkpointing": False}),
        ({"seq": 4096, "batch": 4, "gradient_checkpointing": "offload"}, {"seq": 4096, "batch": 4}),
        ({"gradient_accumulation": 1, "seq": 8}, {"gradient_accumulation": 2, "seq": 8}),
        ({"targets": ["q_proj", "v_proj"]}, {}),
        ({"r": 8}, {"r": 64}),
        ({}, {"padded": True}),
        ({}, {"dtype": "fp32"}),
    ],
    ids=str,
)
def test_more_of_anything_needs_more(directory: Path, less: dict[str, Any], more: dict[str, Any]) -> None:
    def peak(settings: dict[str, Any]) -> int:
        found = qlora.estimate_memory(str(directory), **({"seq": 256, "batch": 2} | settings))
        return found.peak - found.terms[WORKSPACE]  # a bound that may cover what else grows

    assert peak(less) < peak(more)


def test_embeddings_on_the_host_are_not_counted(directory: Path) -> None:
    whole, less = (
        qlora.estimate_memory(str(directory), seq=64, batch=2, embedding_offload=offload)
        for offload in (False, True)
    )
    table = 256 * 64 * 2
    assert whole.peak - less.peak == whole.model_bytes - less.model_bytes == table


def test_a_memory_budget_lies_between_all_and_no_layers_recomputed(directory: Path) -> None:
    settings: dict[str, Any] = {"seq": 1024, "batch": 64, "gradient_accumulation": 1}
    least = qlora.estimate_memory(str(directory), **settings)
    most = qlora.estimate_memory(str(directory), gradient_checkpointing=False, **settings)
    assert (least.num_layers, least.num_recomputed) == (None, None)
    found = qlora.estimate_memory(str(directory), memory_budget=1.5 * most.peak, **settings)
    assert (found.num_layers, found.num_recomputed) == (2, 0)
    budget = least.peak + 0.8 * (most.peak - least.peak)
    found = qlora.estimate_memory(str(directory), memory_budget=budget, gpu=1.0, **settings)
    assert (found.num_layers, found.num_recomputed) == (2, 1)
    assert least.peak < found.peak <= budget
    lean = qlora.estimate_memory(str(directory), gpu=1.0, **settings)
    assert found.longest_seq >= lean.longest_seq > 0 and found.largest_batch >= lean.largest_batch > 0


def test_flash_attention_keeps_no_matrix_of_scores(directory: Path) -> None:
    """Four times the length takes four times what comes and goes, not sixteen."""
    short, long = (qlora.estimate_memory(str(directory), seq=seq, batch=8) for seq in (512, 2048))
    names = (KEPT, WORKING, LOSS)
    grown = sum(long.terms[name] for name in names) / sum(short.terms[name] for name in names)
    assert grown == pytest.approx(4, rel=0.1)


def test_what_fits_fits_and_a_step_more_does_not(directory: Path) -> None:
    def total(seq: int, batch: int) -> int:
        return qlora.estimate_memory(str(directory), seq=seq, batch=batch).total

    found = qlora.estimate_memory(str(directory), seq=256, batch=128, gpu=1.0)
    assert found.longest_seq is not None and found.largest_batch is not None
    assert 0 < found.longest_seq < 2048 and found.largest_batch > 0
    assert total(found.longest_seq, 128) <= GIB < total(found.longest_seq + STEP, 128)
    assert total(256, found.largest_batch) <= GIB < total(256, found.largest_batch + 1)


def test_the_command_prints_and_writes_the_same(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "estimate.json"
    arguments = ["--seq", "64", "--batch", "2", "--targets", "q_proj,v_proj", "--r", "4", "--gpu", "0.5"]
    assert main(["estimate", str(directory), *arguments, "--json", str(written)]) == 0
    text = capsys.readouterr().out
    result = json.loads(written.read_text())
    assert result["peak"] == sum(result["terms"].values())
    assert result["settings"]["targets"] == ["q_proj", "v_proj"]
    assert f"{result['peak'] / 1e9:.3f}" in text and f"{result['total'] / 1e9:.3f}" in text
    assert (result["fits"], result["longest_seq"], result["largest_batch"]) == (False, 0, 0)
    assert "does not fit 0.5 GiB" in text and "largest batch at 64 tokens: none" in text


def test_the_command_knows_the_modes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpointing", "offload", "--memory-budget", "1GB", "--embedding-offload"]
    assert main(["estimate", str(directory), "--seq", "64", *options]) == 0
    assert "0 of 2 layers recomputed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "1"], "seq: expected an integer of at least 2, got 1"),
        (["--batch", "0"], "batch: expected an integer of at least 1, got 0"),
        (["--gpu", "-1"], "gpu: expected a positive number of GiB, got -1.0"),
        (["--dtype", "int8"], "dtype: expected one of ('float32', 'float16', 'bfloat16'), got 'int8'"),
        (["--targets", "q_prj"], "got 'q_prj'; did you mean 'q_proj'"),
        (["--r", "0"], "r: expected an integer of at least 1, got 0"),
        (["--memory-budget", "much"], "memory_budget: expected bytes or a size such as '24GB'"),
        (
            ["--checkpointing", "none", "--memory-budget", "1GB"],
            "expected None without gradient_checkpointing",
        ),
    ],
)
def test_bad_values_are_named(
    directory: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(directory), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(tmp_path)]) == 2
    assert (
        f"model: expected a directory with config.json or a hub name, got '{tmp_path}'"
        in capsys.readouterr().err
    )


def test_a_model_of_another_kind_is_named() -> None:
    from transformers import T5Config

    with pytest.raises(ValueError, match="expected a causal language model, got T5Config"):
        qlora.estimate_memory(T5Config())
