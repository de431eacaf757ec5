"""Keys from the command line and from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.train.config import Config, ConfigError, dump, read, take_keys

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings("default")

OWN = {"--resume": 1, "--dry-run": 0}


def test_values_are_typed_by_the_dataclass_fields(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # 1e-4 without a point is text in YAML 1.1.
    file.write_text(
        "learning_rate: 1e-4\nmax_steps: 5\npacking: true\nlora_target_modules: [q_proj, v_proj]\n"
    )
    config = read(file, [])
    assert config.sft == {"learning_rate": 1e-4, "max_steps": 5, "packing": True}
    assert config.ours == {"lora_target_modules": ["q_proj", "v_proj"]}


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_steps: 5\nlora_r: 4\n")
    assert read(file, [("max-steps", ["7"])]).given == {"max_steps": 7, "lora_r": 4}


def test_null_and_none_unset_a_key(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_length: null\n")
    assert read(file, []).sft == {"max_length": None}
    assert read(None, [("max_length", ["none"])]).sft == {"max_length": None}
    # A word where words are allowed.
    assert read(None, [("report_to", ["none"])]).sft == {"report_to": "none"}


def test_dump_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    keys = [
        ("lora_r", ["4"]),
        ("learning_rate", ["2e-5"]),
        ("columns", ["a:b", "c:d"]),
        ("max_length", ["none"]),
    ]
    config = read(None, keys)
    file = tmp_path / "again.yaml"
    file.write_text(dump(config))
    assert read(file, []) == config


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("learning_rat", ["1"], r"unknown key 'learning_rat': did you mean 'learning_rate'\?"),
        ("cutoff_len", ["1"], "unknown key 'cutoff_len': here it is called 'max_length'"),
        ("qqqq", ["1"], "unknown key 'qqqq': `qlora train --help-keys` lists every key"),
        ("max_steps", ["many"], "max_steps: invalid int value: 'many'"),
        ("max_steps", ["1", "run.yaml"], "max_steps: expected one value, got 2: '1 run.yaml'"),
        ("quant_type", ["int4"], "quant_type: invalid choice: 'int4'"),
        ("packing", ["perhaps"], "packing: .*perhaps"),
        ("lora_r", [], "lora_r: expected one argument"),
    ],
)
def test_a_key_that_cannot_be_meant_is_one_error(key: str, values: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(None, [(key, values)])


@pytest.mark.parametrize(("key", "value"), [("checkpointing_offload", "true"), ("memory_budget", "24GB")])
def test_what_needs_checkpointing_is_refused_without_it(key: str, value: str) -> None:
    with pytest.raises(
        ConfigError, match=f"gradient_checkpointing: expected true, .*beside {key}, got false"
    ):
        read(None, [("gradient_checkpointing", ["false"]), (key, [value])])
    for allowed in ([], [("gradient_checkpointing", ["true"])]):
        assert key in read(None, [*allowed, (key, [value])]).ours
    assert read(None, [("gradient_checkpointing", ["false"]), ("checkpointing_offload", ["false"])]).sft


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "expected `key: value` lines in .*, got a list"), ("a: [", "is not valid YAML")],
)
def test_a_file_that_is_no_configuration_is_one_error(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(file, [])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*nothing.yaml: No such file"):
        read(tmp_path / "nothing.yaml", [])


def test_given_keys_win_over_defaults() -> None:
    config = Config({"lora_r": 4}, {"max_steps": 3, "use_cpu": True})
    defaults = {
        "lora_r": 8,
        "lora_alpha": 9,
        "max_steps": 1,
        "learning_rate": 0.5,
        "bf16": False,
        "output_dir": "x",
    }
    ours, sft = config.arguments(defaults), config.sft_config(defaults)
    assert (ours.lora_r, ours.lora_alpha) == (4, 9)
    assert (sft.max_steps, sft.learning_rate) == (3, 0.5)


def test_take_keys_splits_the_commands_own_options_from_keys() -> None:
    words = [
        "run.yaml",
        "--resume",
        "out",
        "--lora_r",
        "4",
        "--dry-run",
        "--columns",
        "a:b",
        "c:d",
        "--x=-1",
        "--y",
        "-2",
    ]
    own, keys = take_keys(words, OWN)
    assert own == ["run.yaml", "--resume", "out", "--dry-run"]
    assert keys == [("lora_r", ["4"]), ("columns", ["a:b", "c:d"]), ("x", ["-1"]), ("y", ["-2"])]
